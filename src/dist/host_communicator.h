// Collectives on host memory beside the caller's work: a thread of its own calls the transport.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "mesa/dist/communicator.h"
#include "transport.h"

namespace mesa {

class HostCommunicator : public Communicator {
 public:
  /// `control` outlives this and learns where the rank stands; it may be null.
  HostCommunicator(Transport& transport, Control* control);
  ~HostCommunicator() override;
  void all_reduce(const Tensor& x) override;
  void reduce_scatter(const Tensor& x, const Tensor& part) override;
  void all_gather(const Tensor& part, const Tensor& x) override;
  void broadcast(const Tensor& x, int64_t root) override;
  void finish() override;

 private:
  void begin(std::function<void()> collective);
  void work();
  void rethrow();
  std::exception_ptr reason(std::exception_ptr error);

  Transport& transport_;
  Control* control_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  int64_t begun_ = 0, done_ = 0;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace mesa
