// The ranks of this run, however they were started.
#pragma once
#include <memory>

#include "mesa/dist/communicator.h"

namespace mesa {

class Transport;

/// Pulses go out each second, and half a timeout of silence is a failure.
inline constexpr double kLeastRankTimeout = 8;

/// The number that a launcher gave this process, before anybody is connected; 0 where none did.
int64_t launched_rank();

/// One rank alone, unless the process was started as one of several: by mpirun, or by srun with MPI; or by anything that sets RANK,
/// WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which needs no MPI and serves GPUs; rank 0 listens on that port. With WORLD_SIZE 1
/// these also make a run of one rank that has all that several have, so that its cost can be measured.
class World {
 public:
  /// Connects the ranks. `timeout`: seconds that a rank may stay silent or keep others waiting; MESA_RANK_TIMEOUT goes before it. Throws
  /// Error with what is missing.
  explicit World(double timeout);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  const RankInfo& me() const { return me_; }
  /// True where no rank need be asked for anything.
  bool alone() const { return control_ == nullptr; }
  bool leads() const { return me_.rank == 0; }
  /// Null where this rank is alone.
  Control* control() { return control_.get(); }
  /// For tensors on this device; made by the first call, which all ranks must make.
  Communicator& communicator(Device device);

 private:
  void connect(double timeout);

  RankInfo me_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace mesa
