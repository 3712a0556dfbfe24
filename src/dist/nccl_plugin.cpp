// Collectives among GPUs through NCCL: a plugin, loaded where ranks train on GPUs.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <thread>
#include <utility>
#include <vector>

#include "mesa/base/cuda.h"
#include "nccl_open.h"

namespace mesa {
namespace {

/// What a collective may take of a GPU while the backward pass goes on: it holds them for as long as it runs. NCCL_MAX_CTAS in the
/// environment goes before it, says NCCL's guide.
constexpr int kMultiprocessors = 8;

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    case DType::i64: return ncclInt64;
    default: fail("NCCL adds no tensors of ", to_string(dtype), " here");
  }
}

bool failed(ncclResult_t code) { return code != ncclSuccess && code != ncclInProgress; }

std::string words_of(ncclResult_t code, ncclComm_t comm) {
  const char* more = ncclGetLastError(comm);
  return concat(ncclGetErrorString(code), more == nullptr || *more == '\0' ? "" : ": ", more == nullptr ? "" : more);
}

/// While this lives the rank waits in a collective: the wire then knows who is missing, and ends what does not end.
struct AtCollective {
  AtCollective(Control& wire, int64_t collective) : wire(wire), collective(collective) { wire.at_collective(collective, true); }
  ~AtCollective() { wire.at_collective(collective, false); }
  AtCollective(const AtCollective&) = delete;
  AtCollective& operator=(const AtCollective&) = delete;
  Control& wire;
  int64_t collective;
};

/// Collectives run on a stream of their own, behind what the compute stream had when they were asked for.
class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(const RankInfo& me, const std::string& id, Control* control) : Communicator(me), control_(*control) {
    try {
      connect(id);
    } catch (const RankFailure& e) {
      release();
      if (!e.lost()) throw;
      throw RankFailure(concat(e.what(),
                               " (NCCL was connecting the ranks' GPUs: with NCCL_DEBUG=INFO it says how, NCCL_SOCKET_IFNAME names "
                               "the network)"));
    } catch (...) {
      release();
      throw;
    }
  }
  ~NcclCommunicator() override {
    try {
      leave();
    } catch (const Error& e) {
      std::fprintf(stderr, "warning: rank %lld leaves without the others: %s\n", static_cast<long long>(rank()), e.what());
    }
    release();
  }

  void all_reduce(const Tensor& x) override {
    const cudaStream_t stream = ready({x});
    begin("ncclAllReduce", [&] { return ncclAllReduce(x.raw(), x.raw(), count(x), type_of(x.dtype()), ncclSum, comm_, stream); });
  }
  void reduce_scatter(const Tensor& x, const Tensor& part) override {
    const cudaStream_t stream = ready({x, part});
    begin("ncclReduceScatter",
          [&] { return ncclReduceScatter(x.raw(), part.raw(), count(part), type_of(x.dtype()), ncclSum, comm_, stream); });
  }
  void all_gather(const Tensor& part, const Tensor& x) override {
    const cudaStream_t stream = ready({part, x});
    begin("ncclAllGather", [&] { return ncclAllGather(part.raw(), x.raw(), bytes(part), ncclUint8, comm_, stream); });
  }
  void broadcast(const Tensor& x, int64_t root) override {
    const cudaStream_t stream = ready({x});
    begin("ncclBroadcast", [&] { return ncclBroadcast(x.raw(), x.raw(), bytes(x), ncclUint8, static_cast<int>(root), comm_, stream); });
  }

  Device device() const override { return kCuda; }

  /// Makes transfers faster at best, so a refusal is no error; but all must have registered what they send, or none (NCCL's guide, user
  /// buffer registration).
  void will_use(const Tensor& x) override {
    check_given();
    void* handle = nullptr;
    const ncclResult_t code = ncclCommRegister(comm_, x.raw(), bytes(x), &handle);
    if (code == ncclInProgress) {
      const AtCollective here(control_, begun_);
      poll("ncclCommRegister", code, [] { return true; });
    }
    const std::vector<std::string> refusals = control_.exchange("memory for NCCL", failed(code) ? words_of(code, comm_) : "");
    const auto refusal = std::find_if(refusals.begin(), refusals.end(), [](const std::string& why) { return !why.empty(); });
    if (refusal == refusals.end()) {
      registered_.push_back(handle);
      kept_.push_back(x);
      return;
    }
    if (!failed(code)) ncclCommDeregister(comm_, handle);
    if (rank() == 0)
      std::fprintf(stderr, "warning: NCCL copies gradients before it sends them: rank %zu cannot register their memory (%s)\n",
                   static_cast<size_t>(refusal - refusals.begin()), refusal->c_str());
  }

  /// The host waits, too: only so can it leave when another rank is lost. It reads the loss next in any case.
  void finish() override {
    check_given();
    cuda::check_status(cudaEventRecord(done_, stream_), "recording an event");
    const AtCollective here(control_, begun_);
    poll("a collective", state(), [this] {
      const cudaError_t status = cudaEventQuery(done_);
      if (status == cudaErrorNotReady) return false;
      if (status != cudaSuccess) control_.throw_if_failed(Control::kDeath);  // memory of a process that died may have been read
      cuda::check_status(status, "a collective");
      return true;
    });
    cuda::check_status(cudaStreamWaitEvent(static_cast<cudaStream_t>(cuda::stream()), done_, 0), "waiting for an event");
    under_way_.clear();
  }

 private:
  void check_given() const { check(comm_ != nullptr, "NCCL was given up after an error"); }
  static size_t count(const Tensor& x) { return static_cast<size_t>(x.numel()); }
  static size_t bytes(const Tensor& x) { return static_cast<size_t>(x.bytes()); }

  void connect(const std::string& id) {
    ncclUniqueId unique;
    check(id.size() == sizeof unique, "nccl: the leader's id has ", id.size(), " bytes");
    std::copy(id.begin(), id.end(), reinterpret_cast<char*>(&unique));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // a rank that does not come must not hold the others here for ever
    config.maxCTAs = kMultiprocessors;
    begin("connecting the ranks' GPUs",
          [&] { return ncclCommInitRankConfig(&comm_, static_cast<int>(size()), unique, static_cast<int>(rank()), &config); });
    int least = 0, greatest = 0;
    cuda::check_status(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    cuda::check_status(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "creating a stream");
    for (cudaEvent_t* event : {&asked_, &done_})
      cuda::check_status(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
  }

  /// All together, and watched like a collective.
  void leave() {
    if (control_.failed() || comm_ == nullptr) return;
    for (void* handle : registered_) ncclCommDeregister(comm_, handle);
    begin("ncclCommFinalize", [this] { return ncclCommFinalize(comm_); });
    ncclCommDestroy(std::exchange(comm_, nullptr));
  }
  /// What waits for a rank that is gone never ends by itself, and freeing memory would wait for it.
  void abort() {
    if (comm_ != nullptr) ncclCommAbort(std::exchange(comm_, nullptr));
  }
  void release() {
    abort();
    for (cudaEvent_t event : {asked_, done_})
      if (event != nullptr) cudaEventDestroy(event);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  /// The stream, once all that the compute stream has by now is before it.
  cudaStream_t ready(std::initializer_list<Tensor> tensors) {
    check_given();
    for (const Tensor& x : tensors) {
      check(x.is_contiguous() && x.device().kind == DeviceKind::cuda, "NCCL takes contiguous tensors on a GPU");
      under_way_.push_back(x);
    }
    cuda::check_status(cudaEventRecord(asked_, static_cast<cudaStream_t>(cuda::stream())), "recording an event");
    cuda::check_status(cudaStreamWaitEvent(stream_, asked_, 0), "waiting for an event");
    return stream_;
  }
  /// Counts from before the call: also one that does not return is noticed.
  template <class Call>
  void begin(const char* what, const Call& call) {
    const AtCollective here(control_, ++begun_);
    poll(what, call(), [] { return true; });
  }

  ncclResult_t state() {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t answer = ncclCommGetAsyncError(comm_, &state);
    return answer == ncclSuccess ? state : answer;
  }
  /// Until NCCL, which has answered `code`, is not busy any more and `done`; leaves by an exception when NCCL or another rank fails.
  template <class Done>
  void poll(const char* what, ncclResult_t code, const Done& done) try {
    for (int i = 0;; ++i) {
      if (failed(code)) give_up(what, code);
      if (code == ncclSuccess && done()) return;
      if (i % 256 == 255) control_.throw_if_failed();
      std::this_thread::yield();
      code = state();
    }
  } catch (...) {
    abort();
    throw;
  }
  /// NCCL notices a lost rank by its connections, and may do so long before the wire, which knows which rank it was.
  [[noreturn]] void give_up(const char* what, ncclResult_t code) {
    const std::string why = concat("nccl: ", what, ": ", words_of(code, comm_));
    const bool network = code == ncclRemoteError || code == ncclSystemError;
    control_.throw_if_failed(network ? control_.silence() : Control::kDeath);
    if (code == ncclRemoteError) throw control_.report("has lost another rank: " + why, true);
    throw Error(why);
  }

  Control& control_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t asked_ = nullptr, done_ = nullptr;
  int64_t begun_ = 0;
  std::vector<void*> registered_;
  std::vector<Tensor> kept_;       // what is registered outlives the registration
  std::vector<Tensor> under_way_;  // and what collectives read and write, their end
};

}  // namespace
}  // namespace mesa

extern "C" {
__attribute__((visibility("default"))) void mesa_nccl_id(std::string* id) {
  ncclUniqueId unique;
  const ncclResult_t code = ncclGetUniqueId(&unique);
  if (code != ncclSuccess) mesa::fail("nccl: ncclGetUniqueId: ", mesa::words_of(code, nullptr));
  id->assign(reinterpret_cast<const char*>(&unique), sizeof unique);
}
__attribute__((visibility("default"))) mesa::Communicator* mesa_open_nccl(const mesa::RankInfo* me, const std::string* id,
                                                                          mesa::Control* control) {
  return new mesa::NcclCommunicator(*me, *id, control);
}
}
