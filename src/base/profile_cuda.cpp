// A profile by CUDA events, which stay for the next one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <utility>

#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"

namespace mesa::cuda {

namespace {

struct Span {
  std::string name;
  cudaEvent_t from, to;
};

struct Profile {
  bool on = false;
  std::vector<Span> spans;
  std::vector<size_t> open;  // which of them have no end yet, the inner ones last
  std::vector<cudaEvent_t> free;

  cudaEvent_t take() {
    cudaEvent_t event = nullptr;
    if (free.empty()) {
      check_status(cudaEventCreate(&event), "creating an event");
    } else {
      event = free.back();
      free.pop_back();
    }
    return event;
  }
};
cudaError_t mark(cudaEvent_t event) { return cudaEventRecord(event, static_cast<cudaStream_t>(stream())); }
double seconds_between(cudaEvent_t from, cudaEvent_t to) {
  float ms = 0;
  check_status(cudaEventElapsedTime(&ms, from, to), "reading a time");
  return 1e-3 * static_cast<double>(ms);
}
Profile& profile() {
  static Profile& one = *new Profile;
  return one;
}

}  // namespace

void start_profile() {
  profile().on = true;
  profile().spans.clear();  // of a profile that an error ended
}
void stop_profile() { profile().on = false; }
bool profiling() { return profile().on && !recording(); }

std::vector<ProfileRow> end_profile() {
  Profile& p = profile();
  p.on = false;
  const std::vector<Span> spans = std::exchange(p.spans, {});
  synchronize("a profile's end");
  std::map<std::string, ProfileRow> by_name;
  for (const Span& span : spans) {
    ProfileRow& row = by_name[span.name];
    row.name = span.name, ++row.calls, row.ms += 1e3 * seconds_between(span.from, span.to);
    p.free.insert(p.free.end(), {span.from, span.to});
  }
  std::vector<ProfileRow> rows;
  for (auto& [name, row] : by_name) rows.push_back(std::move(row));
  std::sort(rows.begin(), rows.end(), [](const ProfileRow& a, const ProfileRow& b) { return a.ms > b.ms; });
  return rows;
}

double seconds_of(const std::function<void()>& f, const std::function<void()>& ahead) {
  struct Events {  // which go back even if f throws
    cudaEvent_t from = profile().take(), to = profile().take();
    ~Events() { profile().free.insert(profile().free.end(), {from, to}); }
  } const events;
  synchronize("timing");
  if (ahead) ahead();
  check_status(mark(events.from), "marking the stream");
  f();
  check_status(mark(events.to), "marking the stream");
  synchronize("timing");
  return seconds_between(events.from, events.to);
}

void detail::begin_timed(std::string_view name) {
  Profile& p = profile();
  const Span span{std::string(name), p.take(), p.take()};
  check_status(mark(span.from), "marking the stream");
  p.open.push_back(p.spans.size());
  p.spans.push_back(span);
}
void detail::end_timed() {  // also when an error is on its way, which then is what is told
  Profile& p = profile();
  mark(p.spans[p.open.back()].to);
  p.open.pop_back();
}

}  // namespace mesa::cuda
