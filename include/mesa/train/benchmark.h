// Storage policies side by side on one training step: how fast, how many bytes, and how true to the exact gradient.
#pragma once
#include <array>
#include <functional>
#include <string>
#include <vector>

#include "mesa/base/cuda_profile.h"
#include "mesa/train/setup.h"

namespace mesa {

struct BenchmarkOptions {
  std::vector<StorageConfig> policies;  ///< empty: the config's own; the same one may be listed twice
  int64_t steps = 10;                   ///< measured steps of each policy, at least 1
  int64_t warmup = 2;                   ///< steps of each policy before them
  int64_t training_steps = 3;           ///< before gradients are compared: just after initialization the network is almost linear
  bool profile = false;                 ///< on a GPU: time each kernel, in a few steps more
  int64_t draws = 3;                    ///< gradients compared, each with other random numbers, at least 1
  std::function<void(const std::string& what)> progress;  ///< told before each piece of work; may be empty
};

/// Of repeated measurements.
struct Spread {
  double minimum = 0, median = 0, maximum = 0;
};
Spread spread_of(std::vector<double> values);

struct PolicyResult {
  std::string storage;
  Spread images_per_second;
  Spread relative_speed;  ///< to the first policy, step against the step beside it: what slows the machine cancels out
  Spread step_ms;         ///< from an idle device to one that is done; within it a GPU is waited for as in training
  Spread forward_ms, backward_ms, optimizer_ms;       ///< forward includes the loss, backward frees what was kept; on a GPU of steps apart
  Spread activation_bytes_per_image;                  ///< metered right after forward
  Spread peak_bytes;                                  ///< of a process that trains with this policy alone
  Spread gradient_relative_error;                     ///< ||g - g_exact|| / ||g_exact|| over all parameters, same weights and batch
  std::array<int64_t, kMemoryKinds> bytes_by_kind{};  ///< at the peak of the last step
  std::vector<SiteRecord> sites;                      ///< of one batch
  std::vector<cuda::ProfileRow> profile;              ///< of one step
};

struct BenchmarkResult {
  std::string model, precision, device, isa, matmul;
  int64_t parameters = 0, batch_size = 0, threads = 0, steps = 0, warmup = 0;
  double exact_activation_bytes_per_image = 0;
  std::vector<PolicyResult> policies;
};

/// Trains one model for each policy, from the same weights on the same random batch, a step of each in turn (A B C A B C), so that whatever
/// else the machine does falls on all of them alike. The policy `exact` is the reference of the gradients, listed or not.
/// The loss is the config's, a teacher's part included; the labels are not mixed. train.accumulation is ignored. Sets the number of OpenMP
/// threads from train.threads. Throws UsageError for options, rules or values that do not fit, Error if a loss is not finite.
BenchmarkResult run_benchmark(const RunConfig& config, const BenchmarkOptions& options);

/// Tables for people: one of speed, bytes and errors, one of bytes by kind, and of each policy's kernels where they were timed.
std::string format_benchmark(const BenchmarkResult& result);
/// The same for programs, with every site.
std::string benchmark_json(const BenchmarkResult& result);

}  // namespace mesa
