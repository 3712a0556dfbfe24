// A profile by CUDA events, which stay for the next one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>

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
  std::vector<cudaEvent_t> free;

  cudaEvent_t mark() {
    cudaEvent_t event = nullptr;
    if (free.empty()) {
      check_status(cudaEventCreate(&event), "creating an event");
    } else {
      event = free.back();
      free.pop_back();
    }
    check_status(cudaEventRecord(event, static_cast<cudaStream_t>(stream())), "marking the stream");
    return event;
  }
};
Profile& profile() {
  static Profile& one = *new Profile;
  return one;
}

}  // namespace

void start_profile() { profile().on = true; }
bool profiling() { return profile().on && !recording(); }

std::vector<ProfileRow> end_profile() {
  Profile& p = profile();
  p.on = false;
  synchronize("a profile's end");
  std::map<std::string, ProfileRow> by_name;
  for (const Span& span : p.spans) {
    float ms = 0;
    check_status(cudaEventElapsedTime(&ms, span.from, span.to), "reading a time");
    ProfileRow& row = by_name[span.name];
    row.name = span.name, ++row.calls, row.ms += static_cast<double>(ms);
    p.free.insert(p.free.end(), {span.from, span.to});
  }
  p.spans.clear();
  std::vector<ProfileRow> rows;
  for (auto& [name, row] : by_name) rows.push_back(std::move(row));
  std::sort(rows.begin(), rows.end(), [](const ProfileRow& a, const ProfileRow& b) { return a.ms > b.ms; });
  return rows;
}

void detail::begin_timed(std::string_view name) { profile().spans.push_back({std::string(name), profile().mark(), nullptr}); }
void detail::end_timed() { profile().spans.back().to = profile().mark(); }

}  // namespace mesa::cuda
