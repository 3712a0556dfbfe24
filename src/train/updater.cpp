#include "updater.h"

#include <bit>
#include <cmath>
#include <optional>

#include "mesa/kernels/elementwise.h"

namespace mesa {

Updater::Updater(const RunConfig& config, BuiltModel& model, StoragePolicy& policy, Optimizer& optimizer, Ema* ema,
                 const Schedule& schedule, const TransformOptions& transform)
    : config_(config),
      model_(model),
      policy_(policy),
      optimizer_(optimizer),
      ema_(ema),
      schedule_(schedule),
      transform_(transform),
      objective_(config, model.net.input(), model.device) {
  if (config.train.cuda_graph) recorded_.emplace(config, model, policy);
}

double Updater::forward_backward(const SentBatch& batch, uint64_t micro_step, double scale, const Meanwhile& meanwhile) {
  Tensor loss;
  if (recorded_) {
    const cuda::Mark before = cuda::mark();
    loss = recorded_->run(batch, micro_step, std::bit_cast<uint64_t>(scale), [&](const SentBatch& from, const uint64_t* live_step) {
      return pass(from, micro_step, live_step, scale, [](const cuda::Mark&) {});
    });
    meanwhile(before);
  } else {
    loss = pass(batch, micro_step, nullptr, scale, meanwhile);
  }
  return to(loss, kCpu).data<float>()[0];  // only now: until here a GPU need not be waited for
}

Tensor Updater::pass(const SentBatch& batch, uint64_t micro_step, const uint64_t* live_step, double scale, const Meanwhile& meanwhile) {
  Allocator& memory = Allocator::of(model_.device);
  const int64_t before = memory.use().of(MemoryKind::activations);
  const Prepared data = prepare(batch, transform_);
  const Targets targets = objective_.targets(data);
  Tape tape(policy_, static_cast<uint64_t>(config_.seed), micro_step, live_step);
  const Var loss = objective_(model_.net, data.images, targets);
  activation_bytes_ = memory.use().of(MemoryKind::activations) - before;
  meanwhile({});  // before the backward pass is handed over, so that copies begun here run beside it
  tape.backward(loss, {}, scale);
  return loss.value();
}

namespace {

/// Enough to find the pictures again.
std::string samples_of(const Batch& batch) {
  std::string out = concat("the batch holds the samples ", batch.sample_indices[0]);
  for (size_t i = 1; i < batch.sample_indices.size() && i < 4; ++i) out += concat(", ", batch.sample_indices[i]);
  return out + (batch.sample_indices.size() > 4 ? ", ..." : "");
}

}  // namespace

UpdateResult Updater::operator()(int64_t count, const std::function<SentBatch()>& next, const Meanwhile& meanwhile, TrainingState& state) {
  UpdateResult result;
  result.lr = schedule_.at(state.step);
  model_.params.clear_gradients();
  model_.params.remember_buffers();
  const double share = 1.0 / static_cast<double>(count);
  std::optional<SentBatch> suspect;  // the last one that was used
  uint64_t suspect_step = 0;
  std::string packed;  // the site where a codec met a NaN or infinity
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(result.loss)) {  // no update any more, but its batches belong to it
      next();
      continue;
    }
    suspect.reset();
    suspect = next();
    suspect_step = static_cast<uint64_t>(state.micro_step++);
    result.loss += share * forward_backward(*suspect, suspect_step, share, meanwhile);
    result.images += suspect->host.labels.numel();
    if (packed.empty()) packed = policy_.first_nonfinite();
  }
  ++state.step;
  result.gradient_norm = std::isfinite(result.loss) ? optimizer_.gradient_norm() : result.loss;
  if (!std::isfinite(result.gradient_norm) || !packed.empty()) {
    const char* what = !std::isfinite(result.loss) ? "the loss" : packed.empty() ? "the gradient" : "an activation";
    result.bad = concat(what, " is not finite; the first bad value is in ", find_culprit(*suspect, suspect_step, packed), "; ",
                        samples_of(suspect->host));
    ++state.bad_steps;
    ++state.bad_in_a_row;
    policy_.roll_back();
    model_.params.restore_buffers();
    return result;
  }
  state.bad_in_a_row = 0;
  policy_.commit();
  optimizer_.step(result.lr, clipping_scale(config_.train.clip_norm, result.gradient_norm));
  if (ema_ != nullptr) ema_->update();
  return result;
}

std::string Updater::find_culprit(const SentBatch& batch, uint64_t micro_step, const std::string& packed) {
  if (const std::string bad = first_bad_parameter(model_.params); !bad.empty()) return "the parameter " + bad;
  // The same step again, with every result and gradient looked at; a policy of its own leaves the run's ranges alone.
  StoragePolicy exact("exact", {{"*", "exact", {}, ""}});
  const Prepared data = prepare(batch, transform_);
  const Targets targets = objective_.targets(data);
  Tape tape(exact, static_cast<uint64_t>(config_.seed), micro_step);
  tape.check_finite(true);
  const Var loss = objective_(model_.net, data.images, targets);
  if (tape.first_bad().empty()) tape.backward(loss);
  model_.params.clear_gradients();
  if (!tape.first_bad().empty()) return tape.first_bad();
  return packed.empty() ? "no exact value: it appears only in what is stored" : packed;
}

}  // namespace mesa
