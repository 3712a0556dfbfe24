// The ranks of this run, however they were started.
#pragma once
#include <memory>

#include "mesa/dist/communicator.h"

namespace mesa {

class Transport;

/// Pulses go out each second, and half a timeout of silence is a failure.
inline constexpr double kLeastRankTimeout = 8;

/// One rank alone, unless the process was started as one of several: by mpirun, or by srun with MPI; or by anything that sets RANK,
/// WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which needs no MPI and serves GPUs; rank 0 listens on that port.
class World {
 public:
  /// Connects the ranks. `timeout`: seconds that a rank may stay silent or keep others waiting; MESA_RANK_TIMEOUT goes before it. Throws
  /// Error with what is missing.
  explicit World(double timeout);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  const RankInfo& me() const { return me_; }
  bool alone() const { return me_.world == 1; }
  bool leads() const { return me_.rank == 0; }
  /// Null where there is one rank only.
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
