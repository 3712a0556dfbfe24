#include "mesa/train/benchmark.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>

#include "mesa/base/cuda.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/objective.h"
#include "mesa/train/optimizer_setup.h"

namespace mesa {
namespace {

using Clock = std::chrono::steady_clock;
using BytesByKind = std::array<int64_t, kMemoryKinds>;

double milliseconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double, std::milli>(to - from).count(); }

/// The one batch that every policy trains on.
struct FixedBatch {
  Tensor images, labels;

  FixedBatch(const RunConfig& config, const ImageConfig& model, Device device) {
    const int64_t B = config.train.batch_size;
    const Shape shape{B, model.channels, model.image_size, model.image_size};
    RandomStream random(RandomKey::of(static_cast<uint64_t>(config.seed), "benchmark.batch", 0));
    std::vector<float> pixels(static_cast<size_t>(shape.numel()));
    for (float& pixel : pixels) pixel = static_cast<float>(random.normal());
    std::vector<int64_t> classes(static_cast<size_t>(B));
    for (int64_t& label : classes) label = static_cast<int64_t>(random.below(static_cast<uint64_t>(model.classes)));
    const Tensor exact = Tensor::from<float>(shape, pixels, MemoryKind::inputs);
    images = Tensor::empty(shape, picture_dtype(config, device), device, MemoryKind::inputs);
    kernels::copy(to(exact, device), images);
    labels = to(Tensor::from<int64_t>({B}, classes, MemoryKind::inputs), device, MemoryKind::inputs);
  }
};

/// What one step took.
struct StepSample {
  double step_ms = 0, forward_ms = 0, backward_ms = 0, optimizer_ms = 0;
  int64_t activation_bytes = 0;
  BytesByKind peak{};
};

/// A step as training makes it, or one in which a GPU is waited for after each phase, so that the clock sees each by itself.
enum class Waits { as_in_training, after_each_phase };

/// A model with its own weights, moments and running ranges, trained with one policy.
class Contestant {
 public:
  Contestant(const RunConfig& config, const NetConfig& model, const StorageConfig& storage, Device device)
      : config_(config),
        memory_(Allocator::of(device)),
        before_(memory_.use().live),
        built_(config, model, device),
        objective_(config, model.input(), device),
        policy_(make_policy(storage)) {
    built_.params.allocate_gradients();
    optimizer_ = make_optimizer(config, built_.params);
    ema_ = make_ema(config, built_.params);
    take_over_what_stayed();
  }

  /// Leaves the gradients of `batch` in the parameters. `step` selects the random numbers.
  StepSample differentiate(const FixedBatch& batch, uint64_t step) { return run(batch, step, false, Waits::as_in_training); }
  /// The same, and an update.
  StepSample train(const FixedBatch& batch, uint64_t step, Waits waits = Waits::as_in_training) { return run(batch, step, true, waits); }

  void copy_weights(Contestant& from) {
    auto source = from.built_.params.params().begin();
    for (Param& param : built_.params.params()) {
      kernels::copy((source++)->value, param.value);
      param.touch();
    }
  }

  const StoragePolicy& policy() const { return policy_; }
  ParamStore& params() { return built_.params; }

 private:
  StepSample run(const FixedBatch& batch, uint64_t step, bool update, Waits waits) {
    StepSample sample;
    const auto phase_done = [&] {
      if (waits == Waits::after_each_phase) wait();
      return Clock::now();
    };
    memory_.reset_peak();
    before_ = memory_.use().live;
    const BytesByKind held_before = held_;
    built_.params.clear_gradients();
    wait();
    const auto start = Clock::now();
    Clock::time_point forward_done;
    double loss_value = 0;
    {
      const Targets targets = objective_.targets({batch.images, batch.labels, Tensor()});
      Tape tape(policy_, static_cast<uint64_t>(config_.seed), step);
      const Var loss = objective_(built_.net, batch.images, targets);
      sample.activation_bytes = memory_.use().of(MemoryKind::activations) - before_[static_cast<int>(MemoryKind::activations)];
      forward_done = phase_done();
      tape.backward(loss);
      loss_value = to(loss.value(), kCpu).data<float>()[0];  // read behind the backward pass, as training does
    }
    check(std::isfinite(loss_value), "the loss of step ", step, " with storage ", policy_.name(), " is ", loss_value);
    const auto backward_done = phase_done();
    if (update) optimizer_->step(config_.optimizer.lr, scale_of_gradients());
    if (update && ema_) ema_->update();
    wait();
    const auto end = Clock::now();
    sample.step_ms = milliseconds(start, end);
    sample.forward_ms = milliseconds(start, forward_done);
    sample.backward_ms = milliseconds(forward_done, backward_done);
    sample.optimizer_ms = milliseconds(backward_done, end);
    // The other models are alive too: of what was there before the step only the batch and what this one holds count.
    const BytesByKind peak = memory_.use().peak_kind;
    for (int kind = 0; kind < kMemoryKinds; ++kind) {
      const bool shared = kind == static_cast<int>(MemoryKind::inputs);
      sample.peak[kind] = shared ? peak[kind] : peak[kind] - before_[kind] + held_before[kind];
    }
    take_over_what_stayed();
    return sample;
  }

  void wait() const {
    if (built_.device.kind == DeviceKind::cuda) cuda::synchronize();
  }

  /// What a training run does before its optimizer step; without clipping it only looks whether the norm is finite.
  double scale_of_gradients() const { return clipping_scale(config_.train.clip_norm, optimizer_->gradient_norm()); }

  /// What is there now and was not at `before_` belongs to this model: running ranges and bf16 copies come with the first step.
  void take_over_what_stayed() {
    const BytesByKind now = memory_.use().live;
    for (int kind = 0; kind < kMemoryKinds; ++kind) held_[kind] += now[kind] - before_[kind];
  }

  const RunConfig& config_;
  Allocator& memory_;
  BytesByKind before_, held_{};
  BuiltModel built_;
  Objective objective_;
  StoragePolicy policy_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Ema> ema_;  // or null
};

/// ||g - g_exact|| / ||g_exact||, in double.
double relative_error(ParamStore& params, ParamStore& exact) {
  double difference = 0, norm = 0;
  auto reference = exact.params().begin();
  for (const Param& param : params.params()) {
    const Param& expected = *reference++;
    if (!expected.grad_written) continue;
    check(param.grad_written, "no gradient reached ", param.name);
    const Tensor mine = to(param.grad, kCpu), theirs = to(expected.grad, kCpu);
    const float* g = mine.data<float>();
    const float* e = theirs.data<float>();
    const int64_t n = param.grad.numel();
#pragma omp parallel for reduction(+ : difference, norm)
    for (int64_t i = 0; i < n; ++i) {
      const double d = static_cast<double>(g[i]) - e[i];
      difference += d * d;
      norm += static_cast<double>(e[i]) * e[i];
    }
  }
  return norm > 0 ? std::sqrt(difference / norm) : 0;
}

using Contestants = std::vector<std::unique_ptr<Contestant>>;

/// What the contestants share: one config, one batch, and a count of steps that selects the random numbers.
struct Bench {
  const RunConfig& config;
  const NetConfig& model;
  const BenchmarkOptions& options;
  Device device;
  FixedBatch batch{config, model.input(), device};
  uint64_t step = 0;

  void tell(const std::string& what) const {
    if (options.progress) options.progress(what);
  }
};

/// Gives every contestant the weights of an exact model after a few steps and compares its gradients with that model's. A draw is one step
/// number, the same for all: dropout falls alike, and stochastic rounding differs from draw to draw.
void compare_gradients(Bench& bench, const Contestants& contestants, BenchmarkResult& result) {
  Contestant exact(bench.config, bench.model, reference_storage(), bench.device);
  bench.tell("training a few steps");
  for (int64_t i = 0; i < bench.options.training_steps; ++i) exact.train(bench.batch, bench.step++);
  std::vector<std::vector<double>> errors(contestants.size());
  for (const auto& contestant : contestants) contestant->copy_weights(exact);
  for (int64_t draw = 0; draw < bench.options.draws; ++draw, ++bench.step) {
    bench.tell(concat("comparing gradients ", draw + 1, "/", bench.options.draws));
    const StepSample sample = exact.differentiate(bench.batch, bench.step);
    result.exact_activation_bytes_per_image = static_cast<double>(sample.activation_bytes) / static_cast<double>(result.batch_size);
    for (size_t i = 0; i < contestants.size(); ++i) {
      contestants[i]->differentiate(bench.batch, bench.step);
      if (draw == 0) contestants[i]->policy().check_rules_matched();
      errors[i].push_back(relative_error(contestants[i]->params(), exact.params()));
    }
  }
  for (size_t i = 0; i < contestants.size(); ++i) result.policies[i].gradient_relative_error = spread_of(errors[i]);
}

using Samples = std::vector<StepSample>;

template <class Value>
Spread spread_over(const Samples& samples, const Value& value) {
  std::vector<double> values;
  for (const StepSample& sample : samples) values.push_back(value(sample));
  return spread_of(std::move(values));
}

void summarize(const Samples& samples, int64_t batch_size, PolicyResult& out) {
  const auto spread = [&](auto&& value) { return spread_over(samples, value); };
  const double B = static_cast<double>(batch_size);
  out.step_ms = spread([](const StepSample& s) { return s.step_ms; });
  out.images_per_second = spread([&](const StepSample& s) { return 1e3 * B / s.step_ms; });
  out.activation_bytes_per_image = spread([&](const StepSample& s) { return static_cast<double>(s.activation_bytes) / B; });
  out.peak_bytes = spread([](const StepSample& s) {
    int64_t total = 0;
    for (int64_t bytes : s.peak) total += bytes;
    return static_cast<double>(total);
  });
  out.bytes_by_kind = samples.back().peak;
}

/// On the CPU the steps themselves tell their phases. On a GPU a wait between them would cost the step, so they are taken from steps of
/// their own.
void measure_phases(Bench& bench, const Contestants& contestants, const std::vector<Samples>& whole, BenchmarkResult& result) {
  std::vector<Samples> samples = whole;
  if (bench.device.kind == DeviceKind::cuda) {
    const int64_t steps = std::min<int64_t>(bench.options.steps, 5);
    samples.assign(contestants.size(), {});
    for (int64_t i = 0; i < steps; ++i, ++bench.step) {
      bench.tell(concat("phases ", i + 1, "/", steps));
      for (size_t c = 0; c < contestants.size(); ++c)
        samples[c].push_back(contestants[c]->train(bench.batch, bench.step, Waits::after_each_phase));
    }
  }
  for (size_t c = 0; c < contestants.size(); ++c) {
    PolicyResult& out = result.policies[c];
    out.forward_ms = spread_over(samples[c], [](const StepSample& s) { return s.forward_ms; });
    out.backward_ms = spread_over(samples[c], [](const StepSample& s) { return s.backward_ms; });
    out.optimizer_ms = spread_over(samples[c], [](const StepSample& s) { return s.optimizer_ms; });
  }
}

/// Means over a few steps.
void profile_steps(Bench& bench, const Contestants& contestants, BenchmarkResult& result) {
  constexpr int64_t kSteps = 3;
  for (size_t c = 0; c < contestants.size(); ++c) {
    bench.tell("timing the kernels of " + result.policies[c].storage);
    const struct Taken {
      Taken() { cuda::start_profile(); }
      ~Taken() {
        if (cuda::profiling()) cuda::stop_profile();
      }
    } until_an_error;
    for (int64_t i = 0; i < kSteps; ++i) contestants[c]->train(bench.batch, bench.step++);
    result.policies[c].profile = cuda::end_profile();
    for (cuda::ProfileRow& row : result.policies[c].profile) row.calls /= kSteps, row.ms /= kSteps;
  }
}

void measure_steps(Bench& bench, const Contestants& contestants, BenchmarkResult& result) {
  const int64_t warmup = bench.options.warmup, steps = bench.options.steps;
  std::vector<Samples> samples(contestants.size());
  for (int64_t i = 0; i < warmup + steps; ++i, ++bench.step) {
    bench.tell(i < warmup ? concat("warming up ", i + 1, "/", warmup) : concat("step ", i - warmup + 1, "/", steps));
    for (size_t c = 0; c < contestants.size(); ++c) {
      const StepSample sample = contestants[c]->train(bench.batch, bench.step);
      if (i >= warmup) samples[c].push_back(sample);
    }
  }
  for (size_t c = 0; c < contestants.size(); ++c) {
    summarize(samples[c], result.batch_size, result.policies[c]);
    std::vector<double> ratios;
    for (size_t i = 0; i < samples[c].size(); ++i) ratios.push_back(samples[0][i].step_ms / samples[c][i].step_ms);
    result.policies[c].relative_speed = spread_of(std::move(ratios));
    result.policies[c].sites = contestants[c]->policy().sites();
  }
  measure_phases(bench, contestants, samples, result);
  if (bench.options.profile) profile_steps(bench, contestants, result);
}

}  // namespace

Spread spread_of(std::vector<double> values) {
  check(!values.empty(), "a spread of no values");
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return {values.front(), (values[(n - 1) / 2] + values[n / 2]) / 2, values.back()};
}

BenchmarkResult run_benchmark(const RunConfig& config, const BenchmarkOptions& options) {
  if (options.steps < 1) throw UsageError(concat("steps: ", options.steps, ": at least 1 step must be measured"));
  if (options.warmup < 0) throw UsageError(concat("warmup: ", options.warmup, ": cannot be negative"));
  check(options.draws >= 1, "gradients cannot be compared ", options.draws, " times");
  check(options.training_steps >= 0, "cannot train for ", options.training_steps, " steps");
  const NetConfig model = model_config(config, known_classes(config));
  const Device device = choose_device(config.device);
  if (options.profile && device.kind != DeviceKind::cuda) throw UsageError("profile: only a GPU's kernels are timed; use --device cuda");
  use_threads(config);
  const std::vector<StorageConfig> policies = options.policies.empty() ? std::vector{config.storage} : options.policies;

  BenchmarkResult result;
  result.model = config.model.name;
  result.precision = config.train.precision;
  result.device = to_string(device.kind);
  result.isa = to_string(cpu_isa());
  result.matmul = kernels::matmul_backend();
  result.batch_size = config.train.batch_size;
  result.threads = omp_get_max_threads();
  result.steps = options.steps;
  result.warmup = options.warmup;
  const struct Tuning {
    explicit Tuning(bool on) { kernels::tune_products(on); }
    ~Tuning() { kernels::tune_products(false); }
  } tuning(config.train.autotune);
  Bench bench{config, model, options, device};
  Contestants contestants;
  for (const StorageConfig& storage : policies) {
    contestants.push_back(std::make_unique<Contestant>(config, model, storage, device));
    result.policies.emplace_back().storage = storage.name;
  }
  result.parameters = contestants.front()->params().count();
  compare_gradients(bench, contestants, result);
  measure_steps(bench, contestants, result);
  return result;
}

}  // namespace mesa
