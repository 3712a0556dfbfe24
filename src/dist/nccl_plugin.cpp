// Collectives among GPUs through NCCL: a plugin, loaded where several ranks train on GPUs.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdio>
#include <thread>
#include <vector>

#include "mesa/base/cuda.h"
#include "nccl_open.h"

namespace mesa {
namespace {

void check_nccl(ncclResult_t code, const char* what) {
  if (code != ncclSuccess && code != ncclInProgress) fail("nccl: ", what, ": ", ncclGetErrorString(code));
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    case DType::i64: return ncclInt64;
    default: fail("NCCL adds no tensors of ", to_string(dtype), " here");
  }
}

/// Collectives run on a stream of their own, behind what the compute stream had when they were asked for.
class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(const RankInfo& me, const std::string& id, Control* control) : Communicator(me), control_(control) {
    ncclUniqueId unique;
    check(id.size() == sizeof unique, "nccl: the leader's id has ", id.size(), " bytes");
    std::copy(id.begin(), id.end(), reinterpret_cast<char*>(&unique));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // a rank that does not come must not hold the others here for ever
    check_nccl(ncclCommInitRankConfig(&comm_, static_cast<int>(me.world), unique, static_cast<int>(me.rank), &config), "ncclCommInitRank");
    poll("connecting the ranks' GPUs", [] { return true; });
    int least = 0, greatest = 0;
    cuda::check_status(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    cuda::check_status(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "creating a stream");
    for (cudaEvent_t* event : {&asked_, &done_})
      cuda::check_status(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
  }
  ~NcclCommunicator() override {
    if (control_->failed())
      ncclCommAbort(comm_);  // what waits for a rank that is gone never ends by itself
    else {
      for (void* handle : registered_) ncclCommDeregister(comm_, handle);
      ncclCommDestroy(comm_);
    }
    cudaEventDestroy(asked_);
    cudaEventDestroy(done_);
    cudaStreamDestroy(stream_);
  }

  void all_reduce(const Tensor& x) override {
    begin("ncclAllReduce", ncclAllReduce(x.raw(), x.raw(), count(x), type_of(x.dtype()), ncclSum, comm_, ready(x)));
  }
  void reduce_scatter(const Tensor& x, const Tensor& part) override {
    begin("ncclReduceScatter", ncclReduceScatter(x.raw(), part.raw(), count(part), type_of(x.dtype()), ncclSum, comm_, ready(x)));
  }
  void all_gather(const Tensor& part, const Tensor& x) override {
    begin("ncclAllGather", ncclAllGather(part.raw(), x.raw(), static_cast<size_t>(part.bytes()), ncclUint8, comm_, ready(x)));
  }
  void broadcast(const Tensor& x, int64_t root) override {
    begin("ncclBroadcast",
          ncclBroadcast(x.raw(), x.raw(), static_cast<size_t>(x.bytes()), ncclUint8, static_cast<int>(root), comm_, ready(x)));
  }

  Device device() const override { return kCuda; }

  /// Makes transfers faster at best, so a refusal is no error.
  void will_use(const Tensor& x) override {
    void* handle = nullptr;
    const ncclResult_t code = ncclCommRegister(comm_, x.raw(), static_cast<size_t>(x.bytes()), &handle);
    if (code != ncclSuccess && code != ncclInProgress) {
      std::fprintf(stderr, "warning: rank %lld: ncclCommRegister: %s; gradients are sent from memory that is not registered\n",
                   static_cast<long long>(rank()), ncclGetErrorString(code));
      return;
    }
    if (code == ncclInProgress) poll("ncclCommRegister", [] { return true; });
    registered_.push_back(handle);
    kept_.push_back(x);
  }

  /// The host waits, too: only so can it leave when another rank is lost. It reads the loss next in any case.
  void finish() override {
    cuda::check_status(cudaEventRecord(done_, stream_), "recording an event");
    control_->at_collective(begun_, true);
    poll("a collective", [this] {
      const cudaError_t status = cudaEventQuery(done_);
      if (status != cudaErrorNotReady) cuda::check_status(status, "a collective");
      return status == cudaSuccess;
    });
    control_->at_collective(begun_, false);
    cuda::check_status(cudaStreamWaitEvent(static_cast<cudaStream_t>(cuda::stream()), done_), "waiting for an event");
  }

 private:
  static size_t count(const Tensor& x) { return static_cast<size_t>(x.numel()); }

  /// The stream, once all that the compute stream has by now is before it.
  cudaStream_t ready(const Tensor& x) {
    check(x.is_contiguous() && x.device().kind == DeviceKind::cuda, "NCCL takes contiguous tensors on a GPU");
    cuda::check_status(cudaEventRecord(asked_, static_cast<cudaStream_t>(cuda::stream())), "recording an event");
    cuda::check_status(cudaStreamWaitEvent(stream_, asked_), "waiting for an event");
    return stream_;
  }
  void begin(const char* what, ncclResult_t code) {
    ++begun_;
    check_nccl(code, what);
    if (code == ncclInProgress) poll(what, [] { return true; });
  }

  /// Until NCCL is not busy any more and `done`; leaves by an exception when NCCL or another rank fails.
  template <class Done>
  void poll(const char* what, const Done& done) {
    for (int i = 0;; ++i) {
      ncclResult_t state = ncclSuccess;
      check_nccl(ncclCommGetAsyncError(comm_, &state), what);
      check_nccl(state, what);
      if (state == ncclSuccess && done()) return;
      if (i % 256 == 255) control_->throw_if_failed();
      std::this_thread::yield();
    }
  }

  Control* control_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t asked_ = nullptr, done_ = nullptr;
  int64_t begun_ = 0;
  std::vector<void*> registered_;
  std::vector<Tensor> kept_;  // what is registered outlives the registration
};

}  // namespace
}  // namespace mesa

extern "C" {
__attribute__((visibility("default"))) void mesa_nccl_id(std::string* id) {
  ncclUniqueId unique;
  mesa::check_nccl(ncclGetUniqueId(&unique), "ncclGetUniqueId");
  id->assign(reinterpret_cast<const char*>(&unique), sizeof unique);
}
__attribute__((visibility("default"))) mesa::Communicator* mesa_open_nccl(const mesa::RankInfo* me, const std::string* id,
                                                                          mesa::Control* control) {
  return new mesa::NcclCommunicator(*me, *id, control);
}
}
