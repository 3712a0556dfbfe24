// The connections behind the stand-in for NCCL: every rank has one to rank 0, which adds up in the order of the ranks and hands out.
#pragma once
#include <nccl.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mesa::emulation {

/// Of a collective, as NCCL reports it.
struct NcclFailure {
  ncclResult_t code;
  std::string words;
};

enum class Collective : int32_t { all_reduce, reduce_scatter, all_gather, broadcast, finalize };

/// What all ranks must ask for alike.
struct Call {
  Collective what;
  ncclDataType_t type;
  int32_t root;
  int32_t registered;    ///< whether its memory is
  uint64_t bytes_given;  ///< by each rank
  bool operator==(const Call&) const = default;
};

/// A listening socket on the loopback interface, and its port.
struct Listening {
  int fd, port;
};
Listening listen_on_loopback();

class Star {
 public:
  Star(int rank, int ranks);
  ~Star();
  /// Rank 0 waits for the others, these look for it at the port. `gpu`: each must have another. Throws NcclFailure.
  void connect(const Listening& at, int gpu);
  /// The rank's result. Throws NcclFailure.
  std::vector<char> run(const Call& call, const std::vector<char>& given);
  /// From any thread: whatever waits for another rank ends with an error.
  void cut();

 private:
  std::vector<char> lead(const Call& call, const std::vector<char>& given);
  void say(int other, const NcclFailure& verdict, const std::vector<char>& bytes = {});
  void hear(int other, std::vector<char>& bytes);

  const int rank_, ranks_;
  std::vector<std::atomic<int>> others_;  // connections by rank; of another rank than 0 only the first
  std::atomic<bool> cut_ = false;
};

}  // namespace mesa::emulation
