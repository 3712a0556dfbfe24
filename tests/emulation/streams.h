// The queues behind the emulated streams: copies, fills and events wait in them until the host or a kernel waits for that stream, so that
// work which nobody waits for shows as data that never came. Kernels and products run at once, after what stands before them; with
// MESA_EMULATION_LATE in the environment they wait, too, and copies beside them are made as early or as late as events allow, so that
// memory which is used again too soon shows.
#pragma once
#include <cuda_runtime_api.h>

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace mesa::emulation {

/// `may_begin`, if any, is asked until it says yes: what other processes take part in is not done as soon as somebody waits for it.
struct Work {
  std::function<void()> run;
  std::function<bool()> may_begin;
};

struct Stream {
  bool blocking = true;  // waits for the legacy default stream, and it for this one
  std::deque<Work> waiting;
  bool recording = false, spoiled = false;  // work is kept in `recorded` and not done; something could not be
  std::vector<std::function<void()>> recorded;
};

/// Everything that the process has made. Never destroyed, as it is used until the end.
struct Streams {
  std::recursive_mutex mutex;  // of the whole runtime
  Stream legacy;               // the default stream, 0
  std::set<Stream*> all;
};
Streams& streams();

/// Null for no stream of ours.
Stream* stream_of(cudaStream_t handle);
/// Adds work at the end of a stream. The legacy stream is not a queue: it waits for all blocking streams, and they for it.
void enqueue(Stream& stream, std::function<void()> work, std::function<bool()> may_begin = nullptr);
/// What a call answers that cannot be recorded, on a stream that records.
cudaError_t spoil(Stream& stream);
/// Does what waits.
void finish(Stream& stream);
void finish_all();
void finish_stream(cudaStream_t stream);

/// Remembers an error for cudaGetLastError.
cudaError_t result(cudaError_t status);
/// What a wait returns: kernels that wrote where nothing is are noticed then, as on a GPU.
cudaError_t state_of_device();
/// As after a kernel's error on a GPU: from now on (or until `now` is false) whatever waits, copies or asks fails.
void lose_device(bool now);
cudaError_t alive();
/// How often the host has waited for the device, and how often a graph was made or run.
int64_t waits();
int64_t graphs_made();
int64_t graph_launches();
/// Whom to tell, from now on, that a copy is asked for, by its bytes; nobody, if empty.
void tell_of_copies(std::function<void(size_t bytes)> whom);
/// The device's clock, by which its events tell the time, goes forward by what work is said to take.
void pass(std::chrono::microseconds time);
/// While one lives, it goes by nothing else.
class ToldTime {
 public:
  ToldTime();
  ~ToldTime();
  ToldTime(const ToldTime&) = delete;
  ToldTime& operator=(const ToldTime&) = delete;
};
/// Whether there is a device at all.
cudaError_t ready();

}  // namespace mesa::emulation
