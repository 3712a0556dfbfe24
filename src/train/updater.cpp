#include "updater.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>

#include "mesa/kernels/elementwise.h"
#include "mesa/train/signals.h"

namespace mesa {

Updater::Updater(const RunConfig& config, BuiltModel& model, StoragePolicy& policy, GradientSync* sync, Optimizer& optimizer, Ema* ema,
                 const Schedule& schedule, const TransformOptions& transform, Team& team, int64_t records)
    : config_(config),
      model_(model),
      policy_(policy),
      sync_(sync),
      optimizer_(optimizer),
      ema_(ema),
      schedule_(schedule),
      transform_(transform),
      objective_(config, model.net.input(), model.device),
      team_(team) {
  if (config.train.cuda_graph) recorded_.emplace(config, model, policy, records);
}

double Updater::forward_backward(const SentBatch& batch, uint64_t micro_step, double scale, const Meanwhile& meanwhile, bool last) {
  Tensor loss;
  if (recorded_) {
    const cuda::Mark before = cuda::mark();
    const auto result =
        recorded_->run(batch, micro_step, std::bit_cast<uint64_t>(scale), [&](const SentBatch& from, const uint64_t* live_step) {
          return pass(
              from, micro_step, live_step, scale, [](const cuda::Mark&) {}, false);
        });
    loss = result.loss;
    // A pass that really ran has given back memory which the GPU still works in, and the next batch may get it: its copy waits for all.
    meanwhile(result.from_record ? before : cuda::Mark());
  } else {
    loss = pass(batch, micro_step, nullptr, scale, meanwhile, last);
  }
  return to(loss, kCpu).data<float>()[0];  // only now: until here a GPU need not be waited for
}

Tensor Updater::pass(const SentBatch& batch, uint64_t micro_step, const uint64_t* live_step, double scale, const Meanwhile& meanwhile,
                     bool last) {
  Allocator& memory = Allocator::of(model_.device);
  const int64_t before = memory.use().of(MemoryKind::activations);
  const Prepared data = prepare(batch, transform_, model_.images);
  const Targets targets = objective_.targets(data);
  Tape tape(policy_, static_cast<uint64_t>(config_.seed), micro_step, live_step, static_cast<uint64_t>(config_.rank));
  const Var loss = objective_(model_.net, data.images, targets);
  activation_bytes_ = memory.use().of(MemoryKind::activations) - before;
  meanwhile({});  // before the backward pass is handed over, so that copies begun here run beside it
  std::function<void(Param&)> ready;
  if (sync_ != nullptr && last) ready = [&](Param& param) { sync_->ready(param); };
  tape.backward(loss, ready, scale);
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
  // Gradients add up as if every batch were full: how many images all ranks have, they know at the end.
  const int64_t full = config_.train.batch_size;
  const double of_gradient = 1.0 / static_cast<double>(count) / static_cast<double>(team_.size());
  std::optional<SentBatch> suspect;  // the last one that was used
  uint64_t suspect_step = 0;
  std::string packed;  // the site where a codec met a NaN or infinity
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(result.loss) && team_.alone()) {  // no update any more, but its batches belong to it
      next();
      continue;
    }
    suspect.reset();
    suspect = next();
    suspect_step = static_cast<uint64_t>(state.micro_step++);
    const bool last = i + 1 == count;
    const int64_t images = suspect->host.labels.numel();
    const double part = static_cast<double>(images) / static_cast<double>(full);
    if (sync_ != nullptr && last) sync_->begin();
    result.loss += static_cast<double>(images) * forward_backward(*suspect, suspect_step, of_gradient * part, meanwhile, last);
    result.images += images;
    if (packed.empty()) packed = policy_.first_nonfinite();
  }
  if (sync_ != nullptr) sync_->finish();
  ++state.step;
  const bool somewhere = agree(result, packed);
  const double uneven = static_cast<double>(count * team_.size() * full) / static_cast<double>(result.images);  // 1 where all are full
  result.gradient_norm = std::isfinite(result.loss) ? optimizer_.gradient_norm(uneven) : result.loss;
  if (!std::isfinite(result.gradient_norm) || somewhere) {
    const char* what = !std::isfinite(result.loss) ? "the loss" : !somewhere ? "the gradient" : "an activation";
    result.bad = concat(what, " is not finite; the first bad value is in ", name_culprit(*suspect, suspect_step, packed));
    ++state.bad_steps;
    ++state.bad_in_a_row;
    policy_.roll_back();
    model_.params.restore_buffers();
    return result;
  }
  state.bad_in_a_row = 0;
  policy_.commit();
  if (config_.train.range_sync) average_ranges();
  optimizer_.step(result.lr, uneven * clipping_scale(config_.train.clip_norm, result.gradient_norm));
  if (optimizer_.sharded()) sync_->share_values();
  if (ema_ != nullptr) ema_->update();
  team_.average(model_.params.buffer_arena());  // running statistics of the whole batch
  return result;
}

/// Makes of the sum of this rank's losses the mean of all ranks', and the images theirs. True if a codec met a NaN or infinity on any of
/// them.
bool Updater::agree(UpdateResult& result, const std::string& packed) {
  std::vector<double> sums{result.loss, static_cast<double>(result.images), static_cast<double>(!packed.empty()),
                           static_cast<double>(received_signal() != 0), static_cast<double>(bad_samples_ ? bad_samples_() : 0)};
  team_.add_up(sums);
  result.loss = sums[0] / sums[1];
  result.images = std::llround(sums[1]);
  result.bad_samples = std::llround(sums[4]);
  if (sums[3] > 0) result.signal = team_.largest(received_signal());  // all stop
  return sums[2] > 0;
}

/// Running ranges become the mean over ranks, which all go on with and which a checkpoint holds.
void Updater::average_ranges() {
  if (team_.alone()) return;
  const std::map<std::string, Tensor> ranges = policy_.state();  // handles of what the codecs use
  int64_t total = 0;
  for (const auto& [name, range] : ranges) total += range.numel();
  if (total == 0) return;
  const Tensor all = Tensor::empty({total}, DType::f32, model_.device);
  const auto each = [&](const auto& move) {
    int64_t at = 0;
    for (const auto& [name, range] : ranges) {
      move(range.reshape({range.numel()}), all.narrow(0, at, range.numel()));
      at += range.numel();
    }
  };
  each([](const Tensor& range, const Tensor& part) { transfer(range, part); });
  team_.average(all);
  each([](const Tensor& range, const Tensor& part) { transfer(part, range); });
}

/// Of all ranks, the first that finds something in its own part of the batch tells what.
std::string Updater::name_culprit(const SentBatch& batch, uint64_t micro_step, const std::string& packed) {
  const std::string mine = find_culprit(batch, micro_step, packed);
  const std::string found = team_.first_of("what is not finite", mine.empty() ? "" : concat(mine, "; ", samples_of(batch.host)));
  return found.empty() ? concat("no exact value: it appears only in what is stored; ", samples_of(batch.host)) : found;
}

/// The same step again, with every result and gradient looked at. Exact values tell what is stored from what is computed; where they do not
/// fit, the run's own storage has to do, with a policy of its own that leaves the run's ranges alone.
std::string Updater::find_culprit(const SentBatch& batch, uint64_t micro_step, const std::string& packed) {
  if (const std::string bad = first_bad_parameter(model_.params); !bad.empty()) return "the parameter " + bad;
  for (const bool as_stored : {false, true}) try {
      const std::string found =
          first_bad_value(as_stored ? make_policy(config_.storage) : StoragePolicy("exact", {{"*", "exact", {}, ""}}), batch, micro_step);
      return found.empty() ? packed : found;
    } catch (const OutOfMemory&) {
      model_.params.clear_gradients();
    }
  return packed;
}

std::string Updater::first_bad_value(StoragePolicy policy, const SentBatch& batch, uint64_t micro_step) {
  const Prepared data = prepare(batch, transform_, model_.images);
  const Targets targets = objective_.targets(data);
  Tape tape(policy, static_cast<uint64_t>(config_.seed), micro_step, nullptr, static_cast<uint64_t>(config_.rank));
  tape.check_finite();
  const Var loss = objective_(model_.net, data.images, targets);
  if (tape.first_bad().empty()) tape.backward(loss);
  model_.params.clear_gradients();
  return tape.first_bad();
}

}  // namespace mesa
