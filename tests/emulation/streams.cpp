#include "streams.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "device_memory.h"
#include "mesa/base/cuda.h"

namespace mesa::emulation {
namespace {

/// The device's.
struct Clock {
  using Real = std::chrono::steady_clock;
  static inline std::atomic<std::chrono::microseconds> told;
  static inline std::optional<Real::time_point> stopped;
  static Real::time_point now() { return stopped.value_or(Real::now()) + told.load(); }
};
using Graph = std::vector<std::function<void()>>;

/// One cudaEventRecord.
struct Record {
  Stream* stream = nullptr;
  bool done = false;
  Clock::Real::time_point when;
};

struct Event {
  bool timed = true;
  std::shared_ptr<Record> last;
};

std::set<Event*>& events() {
  static std::set<Event*>& all = *new std::set<Event*>;
  return all;
}

/// Null for no event of ours.
Event* event_of(cudaEvent_t handle) {
  auto* event = reinterpret_cast<Event*>(handle);
  return events().count(event) ? event : nullptr;
}

/// Kernels and products wait in their stream, too, and what other streams have comes before them where nothing forbids it.
bool late() {
  static const bool on = std::getenv("MESA_EMULATION_LATE") != nullptr;
  return on;
}

int at_work = 0;  // work may wait for other work
bool lost = false;

/// Whoever asks again and again leaves the processor to those that it waits for.
void nap() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

void wait_until(const std::function<bool()>& may_begin) {
  while (!may_begin()) nap();
}

/// Does what stands first. False if it may not begin yet and `wait` is false, too.
bool advance(Stream& stream, bool wait) {
  if (const auto& may_begin = stream.waiting.front().may_begin) {
    if (wait) {
      wait_until(may_begin);
    } else if (!may_begin()) {
      nap();
      return false;
    }
  }
  const std::function<void()> work = std::move(stream.waiting.front().run);
  stream.waiting.pop_front();
  struct AtWork {
    AtWork() { ++at_work; }
    ~AtWork() { --at_work; }
  } const here;
  work();
  return true;
}

/// Does what stands before the event in its own stream; that may wait for other streams in turn, but only for what was recorded earlier.
/// False if there is something that may not begin yet, and `wait` is false.
bool reach(const Record& record, bool wait) {
  const DeviceAccess access;
  while (!record.done)
    if (!advance(*record.stream, wait)) return false;
  return true;
}

}  // namespace

Streams& streams() {
  static Streams& one = *new Streams;
  return one;
}

Stream* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return &streams().legacy;
  auto* stream = reinterpret_cast<Stream*>(handle);
  return streams().all.count(stream) ? stream : nullptr;
}

cudaError_t spoil(Stream& stream) {
  stream.spoiled = true;
  return result(cudaErrorStreamCaptureUnsupported);
}

bool record(std::function<void()> work) {
  if (!mesa::cuda::stream) return false;
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(static_cast<cudaStream_t>(mesa::cuda::stream()));
  if (stream == nullptr || at_work > 0 || !(stream->recording || late())) return false;
  enqueue(*stream, std::move(work));
  return true;
}

void finish(Stream& stream) {
  if (stream.waiting.empty()) return;
  const DeviceAccess access;
  if (late())
    for (Stream* other : streams().all)
      while (other != &stream && !other->waiting.empty() && advance(*other, false)) {
      }
  while (!stream.waiting.empty()) advance(stream, true);
}

void finish_all() {
  for (Stream* stream : streams().all) finish(*stream);
}

void enqueue(Stream& stream, std::function<void()> work, std::function<bool()> may_begin) {
  if (stream.recording) return stream.recorded.push_back(std::move(work));
  if (&stream != &streams().legacy) return stream.waiting.push_back({std::move(work), std::move(may_begin)});
  for (Stream* other : streams().all)
    if (other->blocking) finish(*other);
  const DeviceAccess access;
  if (may_begin) wait_until(may_begin);
  work();
}

void finish_stream(cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return;
  enqueue(*stream, [] {});
  finish(*stream);
}

void finish_current_stream() {
  if (mesa::cuda::stream && at_work == 0) finish_stream(static_cast<cudaStream_t>(mesa::cuda::stream()));
}

namespace {
int64_t wait_count = 0, made_count = 0, graph_count = 0;
}
int64_t waits() { return wait_count; }
int64_t graphs_made() { return made_count; }
int64_t graph_launches() { return graph_count; }

void pass(std::chrono::microseconds time) { Clock::told = Clock::told.load() + time; }
ToldTime::ToldTime() { Clock::stopped = Clock::Real::now(); }
ToldTime::~ToldTime() { Clock::stopped.reset(); }

void lose_device(bool now) { lost = now; }
cudaError_t alive() { return lost ? result(cudaErrorIllegalAddress) : cudaSuccess; }

cudaError_t state_of_device() {
  ++wait_count;
  if (alive() != cudaSuccess) return alive();
  const std::string where = damage();
  if (where.empty()) return cudaSuccess;
  std::fprintf(stderr, "emulation: device memory was written %s\n", where.c_str());
  return result(cudaErrorIllegalAddress);
}

}  // namespace mesa::emulation

using namespace mesa::emulation;

extern "C" {

// --- streams ----------------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  if (ready() != cudaSuccess) return ready();
  if (flags != cudaStreamDefault && flags != cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  const std::lock_guard lock(streams().mutex);
  auto* stream = new Stream;
  stream->blocking = flags == cudaStreamDefault;
  streams().all.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return ready();
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr || stream == &streams().legacy) return result(cudaErrorInvalidResourceHandle);
  finish(*stream);
  streams().all.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->recording) return spoil(*stream);
  finish_stream(handle);
  return state_of_device();
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {  // not ready the first time, then done
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->recording) return spoil(*stream);
  if (stream->waiting.empty()) return cudaSuccess;
  const DeviceAccess access;
  while (!stream->waiting.empty() && advance(*stream, false)) {
  }
  return result(cudaErrorNotReady);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  const Event* const event = event_of(event_handle);
  if (stream == nullptr || event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->recording) return spoil(*stream);
  if (alive() != cudaSuccess) return alive();
  if (event->last)
    enqueue(
        *stream, [] {}, [record = event->last] { return reach(*record, false); });
  return cudaSuccess;
}

// --- events -----------------------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  if (ready() != cudaSuccess) return ready();
  const std::lock_guard lock(streams().mutex);
  auto* event = new Event;
  event->timed = !(flags & cudaEventDisableTiming);
  events().insert(event);
  *handle = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const std::lock_guard lock(streams().mutex);
  Event* const event = event_of(handle);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  events().erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(stream_handle);
  Event* const event = event_of(handle);
  if (stream == nullptr || event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->recording) return spoil(*stream);
  if (alive() != cudaSuccess) return alive();
  event->last = std::make_shared<Record>();
  event->last->stream = stream;
  enqueue(*stream, [record = event->last] {
    record->done = true;
    record->when = Clock::now();
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const std::lock_guard lock(streams().mutex);
  const Event* const event = event_of(handle);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (event->last) reach(*event->last, true);
  return state_of_device();
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {  // not ready the first time, then done
  const std::lock_guard lock(streams().mutex);
  const Event* const event = event_of(handle);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (alive() != cudaSuccess) return alive();
  if (!event->last || event->last->done) return cudaSuccess;
  reach(*event->last, false);
  return result(cudaErrorNotReady);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from_handle, cudaEvent_t to_handle) {
  const std::lock_guard lock(streams().mutex);
  const Event *const from = event_of(from_handle), *const to = event_of(to_handle);
  for (const Event* event : {from, to})
    if (event == nullptr || !event->timed || !event->last) return result(cudaErrorInvalidResourceHandle);
  if (!from->last->done || !to->last->done) return result(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(to->last->when - from->last->when).count();
  return cudaSuccess;
}

// --- graphs: the recorded work in its order ---------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream == &streams().legacy) return result(cudaErrorStreamCaptureUnsupported);
  if (stream->recording) return result(cudaErrorIllegalState);
  stream->recording = true;
  stream->spoiled = false;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  *graph = nullptr;
  if (stream == nullptr || !stream->recording) return result(cudaErrorIllegalState);
  auto recorded = std::exchange(stream->recorded, {});
  stream->recording = false;
  if (stream->spoiled) return result(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph(std::move(recorded)));
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Stream* const stream = stream_of(handle);
  *status = stream && stream->recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  ++made_count;
  *ready = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->recording) return spoil(*stream);
  ++graph_count;
  enqueue(*stream, [all = *reinterpret_cast<Graph*>(ready)] {
    for (const auto& work : all) work();
  });
  if (!late()) finish(*stream);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) {
  delete reinterpret_cast<Graph*>(ready);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

}  // extern "C"
