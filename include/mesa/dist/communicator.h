// Collectives over the ranks of a run: what one machine's engine needs to become many.
#pragma once
#include <memory>

#include "mesa/dist/control.h"
#include "mesa/tensor/tensor.h"

namespace mesa {

/// Collectives begin in the order of the calls, which must be the same on all ranks, and run beside what the caller does next. Tensors are
/// contiguous, of one dtype and size on all ranks, and left alone until finish() returns. Sums are bit for bit the same on all ranks and
/// from run to run with the same number of ranks. Errors, and failures of other ranks, come out of finish() or the next call.
class Communicator {
 public:
  explicit Communicator(RankInfo me) : me_(std::move(me)) {}
  virtual ~Communicator() = default;
  const RankInfo& me() const { return me_; }
  int64_t rank() const { return me_.rank; }
  int64_t size() const { return me_.world; }

  /// x <- the sum over ranks: f32, f64, bf16 (rounded after each addition) or i64.
  virtual void all_reduce(const Tensor& x) = 0;
  /// part <- this rank's part of the sum of x: x is `size` parts one after the other, and the part may be its own place in x, whose other
  /// parts then hold anything.
  virtual void reduce_scatter(const Tensor& x, const Tensor& part) = 0;
  /// x <- the parts of all ranks, one after the other. A part may be its own place in x.
  virtual void all_gather(const Tensor& part, const Tensor& x) = 0;
  /// Memory that will be given to collectives again and again, for as long as this lives: a network card may then read it in place.
  virtual void will_use(const Tensor&) {}
  /// x <- root's x; any dtype.
  virtual void broadcast(const Tensor& x, int64_t root) = 0;
  /// Returns when everything begun has been done. On a GPU: when work given to its stream from now on will see it.
  virtual void finish() = 0;
  /// False of one rank alone, which has nothing to add to what it has. One that is connected runs through all that several do.
  virtual bool connected() const { return true; }
  /// Where the tensors live that it takes.
  virtual Device device() const { return kCpu; }
  /// Returns when all ranks have come here.
  void barrier();

 private:
  RankInfo me_;
};

/// One rank alone: every collective is done already. With another `me` it stands for one of several ranks in a plan, whose tensors have no
/// memory.
std::unique_ptr<Communicator> single_communicator(const RankInfo& me = {});

}  // namespace mesa
