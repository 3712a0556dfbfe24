// A stand-in for libnccl, for communicators that do not block: processes on one machine, collectives in the order of the emulated streams.
// It is as unkind as NCCL may be. What is asked for goes on the stream later (ncclInProgress) the first time, of long and of short ones;
// nothing else may be asked for meanwhile; a collective whose ranks do not all come never ends; and a lost rank is an error on those only
// that are connected to it.
//
// MESA_EMULATION_NCCL, of one rank: never_connects; refuses_memory; tells, what of the GPU is taken as a kind of collective first runs; and
// at the n-th collective that runs, internal_error@n, remote_error@n (reported by this rank while the others wait), or loses_network@n: its
// connections close, and the process stops.
#include <nccl.h>
#include <signal.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "../device_memory.h"
#include "../streams.h"
#include "mesa/base/threads.h"
#include "star.h"

namespace mesa::emulation {
namespace {

constexpr int kPollsInProgress = 5;
constexpr size_t kLong = 1 << 20;  // bytes

struct Job {
  Call call;
  const void* from = nullptr;
  void* to = nullptr;
  std::vector<char> given, result;
  bool begun = false;
  std::atomic<bool> done = false;
};

struct Wish {
  std::string what;
  int at = 0;  // which collective
};
Wish wish() {
  const char* text = std::getenv("MESA_EMULATION_NCCL");
  const std::string all = text ? text : "";
  const size_t at = all.find('@');
  return {all.substr(0, at), at == std::string::npos ? 0 : std::atoi(all.c_str() + at + 1)};
}

size_t size_of_type(ncclDataType_t type) {
  switch (type) {
    case ncclUint8: return 1;
    case ncclBfloat16: return 2;
    case ncclFloat32: return 4;
    case ncclFloat64:
    case ncclInt64: return 8;
    default: return 0;
  }
}

Listening& listening() {
  static Listening one{-1, 0};
  return one;
}

}  // namespace

/// What a rank's work on streams holds on to, also after the communicator is gone.
class Rank {
 public:
  Rank(int rank, int ranks, const Listening& at, int gpu) : ranks_(ranks), star_(rank, ranks) {
    const SignalsBlocked blocked;
    thread_ = std::thread([this, at, gpu] { serve(at, gpu); });
  }
  ~Rank() { end(); }
  int ranks() const { return ranks_; }
  void end() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    star_.cut();
    if (thread_.joinable()) thread_.join();
  }
  /// From the first call on `job` is on its way; true when its result is there, or never will be.
  bool passed(Job& job) {
    if (!job.begun && !ended_) {
      job.begun = true;
      const auto* from = static_cast<const char*>(job.from);
      const DeviceAccess access;
      job.given.assign(from, from + job.call.bytes_given);
      post(job);
    }
    return job.done || ended_;
  }
  void post(Job& job) {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(&job);
    changed_.notify_all();
  }
  ncclResult_t state() {
    const std::lock_guard lock(mutex_);
    return failure_.code != ncclSuccess ? failure_.code : connected_ ? ncclSuccess : ncclInProgress;
  }
  std::string words() {
    const std::lock_guard lock(mutex_);
    return failure_.words;
  }

 private:
  void serve(const Listening& at, int gpu) {
    try {
      if (wish().what == "never_connects") return;
      star_.connect(at, gpu);
      std::unique_lock lock(mutex_);
      connected_ = true;
      for (int number = 1;; ++number) {
        changed_.wait(lock, [this] { return ended_ || !jobs_.empty(); });
        if (ended_) return;
        Job& job = *jobs_.front();
        jobs_.pop_front();
        lock.unlock();
        go_wrong_at(number);
        job.result = star_.run(job.call, job.given);
        job.done = true;
        lock.lock();
      }
    } catch (const NcclFailure& failure) {
      const std::lock_guard lock(mutex_);
      failure_ = failure;
    }
  }
  void go_wrong_at(int number) {
    const Wish mine = wish();
    if (mine.at != number) return;
    if (mine.what == "internal_error") throw NcclFailure{ncclInternalError, "emulated: as asked for"};
    if (mine.what == "remote_error") throw NcclFailure{ncclRemoteError, "emulated: as asked for"};
    star_.cut();
    raise(SIGSTOP);
  }

  const int ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job*> jobs_;
  NcclFailure failure_{ncclSuccess, ""};
  bool connected_ = false;
  std::atomic<bool> ended_ = false;
  Star star_;
  std::thread thread_;
};

}  // namespace mesa::emulation

using namespace mesa::emulation;

struct ncclComm {
  std::shared_ptr<Rank> rank;
  int busy = kPollsInProgress;                 // polls that still answer ncclInProgress
  std::function<void()> later;                 // what the last call has not done yet
  std::set<std::pair<Collective, bool>> used;  // those that have run before, and whether they were long
  std::map<const char*, size_t> registered = {};
  std::shared_ptr<Job> leaving = nullptr;
  std::string words = {};
};

namespace {

ncclResult_t refuse(ncclComm_t comm, const std::string& words) {
  comm->words = "emulated: " + words;
  return ncclInvalidArgument;
}

bool is_registered(const ncclComm& comm, const void* memory, size_t bytes) {
  const auto* at = static_cast<const char*>(memory);
  for (const auto& [begin, size] : comm.registered)
    if (at >= begin && at + bytes <= begin + size) return true;
  return false;
}

/// `more` on the stream, or in a while.
ncclResult_t launch(ncclComm_t comm, Call call, const void* from, void* to, size_t bytes_got, cudaStream_t handle) {
  if (comm->busy > 0 || comm->rank->state() == ncclInProgress) return refuse(comm, "the last call is still in progress");
  if (const ncclResult_t state = comm->rank->state(); state != ncclSuccess) return state;
  if (!allocated_on_device(from, call.bytes_given) || !allocated_on_device(to, bytes_got)) return refuse(comm, "no memory of the device");
  call.registered = is_registered(*comm, from, call.bytes_given) && is_registered(*comm, to, bytes_got);
  const std::lock_guard lock(streams().mutex);
  if (stream_of(handle) == nullptr || stream_of(handle)->recording) return refuse(comm, "no stream, or one that records");
  const auto job = std::make_shared<Job>();
  job->call = call, job->from = from, job->to = to;
  const auto enqueue_now = [rank = comm->rank, job, handle] {
    const std::lock_guard lock(streams().mutex);
    enqueue(
        *stream_of(handle), [job] { std::copy(job->result.begin(), job->result.end(), static_cast<char*>(job->to)); },
        [rank, job] { return rank->passed(*job); });
  };
  if (!comm->used.insert({call.what, call.bytes_given > kLong}).second) {
    enqueue_now();
    return ncclSuccess;
  }
  if (wish().what == "tells") std::fprintf(stderr, "emulated NCCL: a collective of a new kind, %zu MB taken\n", device_use().used >> 20);
  comm->busy = kPollsInProgress;
  comm->later = enqueue_now;
  return ncclInProgress;
}

}  // namespace

extern "C" {

const char* ncclGetErrorString(ncclResult_t code) {
  switch (code) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}
const char* ncclGetLastError(ncclComm_t comm) {
  if (comm == nullptr) return "";
  if (const std::string words = comm->rank->words(); !words.empty()) comm->words = words;
  return comm->words.c_str();
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) try {
  listening() = listen_on_loopback();
  *id = {};
  std::memcpy(id->internal, &listening().port, sizeof(int));
  return ncclSuccess;
} catch (const NcclFailure& failure) {
  return failure.code;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
  if (config == nullptr || config->size != sizeof *config || config->blocking != 0 || rank < 0 || rank >= ranks) return ncclInvalidArgument;
  Listening at{rank == 0 ? listening().fd : -1, 0};
  std::memcpy(&at.port, id.internal, sizeof(int));
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return ncclUnhandledCudaError;
  *comm = new ncclComm{std::make_shared<Rank>(rank, ranks, at, properties.pciBusID), kPollsInProgress, nullptr, {}};
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = comm->rank->state();
  if (*state == ncclSuccess && comm->leaving && !comm->leaving->done) *state = ncclInProgress;
  if (*state != ncclSuccess) return ncclSuccess;
  if (comm->busy > 0 && --comm->busy > 0) {
    *state = ncclInProgress;
  } else if (comm->later) {
    std::exchange(comm->later, nullptr)();
  }
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  if (op != ncclSum) return refuse(comm, "no other operation than a sum");
  const size_t bytes = count * size_of_type(type);
  return launch(comm, {Collective::all_reduce, type, 0, 0, bytes}, from, to, bytes, stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                               cudaStream_t stream) {
  if (op != ncclSum) return refuse(comm, "no other operation than a sum");
  const size_t bytes = count * size_of_type(type), all = bytes * static_cast<size_t>(comm->rank->ranks());
  return launch(comm, {Collective::reduce_scatter, type, 0, 0, all}, from, to, bytes, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * size_of_type(type), all = bytes * static_cast<size_t>(comm->rank->ranks());
  return launch(comm, {Collective::all_gather, type, 0, 0, bytes}, from, to, all, stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * size_of_type(type);
  return launch(comm, {Collective::broadcast, type, root, 0, bytes}, from, to, bytes, stream);
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void* memory, size_t bytes, void** handle) {
  if (wish().what == "refuses_memory") return refuse(comm, "as asked for");
  if (!allocated_on_device(memory, bytes)) return refuse(comm, "no memory of the device");
  comm->registered[static_cast<char*>(memory)] = bytes;
  *handle = memory;
  return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle) {
  return comm->registered.erase(static_cast<char*>(handle)) == 1 ? ncclSuccess : refuse(comm, "nothing is registered there");
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  comm->leaving = std::make_shared<Job>();
  comm->leaving->call = {Collective::finalize, ncclUint8, 0, 0, 0};
  comm->rank->post(*comm->leaving);
  return ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!comm->leaving || !comm->leaving->done) return refuse(comm, "the communicator is not finalized");
  return ncclCommAbort(comm);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->rank->end();
  delete comm;
  return ncclSuccess;
}

}  // extern "C"
