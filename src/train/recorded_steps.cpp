#include "recorded_steps.h"

namespace mesa {
namespace {

/// Kinds of passes: two phases of running ranges, and the first or a later batch of an update. More would mean that no record is used
/// again.
constexpr size_t kMostRecords = 12;

}  // namespace

void RecordedSteps::check(const RunConfig& config, bool gpu) {
  const auto refuse = [&](const auto&... why) { config.refuse("train.cuda_graph", why...); };
  if (!gpu) refuse("needs a GPU (device: cuda)");
  if (cuda::built() && cuda::synchronous()) refuse("records work, but MESA_SYNC=1 waits for each kernel");
  if (own_blocks()) refuse("records work, but with MESA_OWN_BLOCKS=1 the driver allocates within it");
  if (config.model.attention == "cudnn") refuse("does not record model.attention: cudnn; use fused");
  for (const StorageRuleConfig& rule : config.storage.rules)
    if (rule.codec == "host") refuse("cannot record copies to the host; the rule '", rule.match, "' has codec: host");
}

RecordedSteps::RecordedSteps(const RunConfig& config, BuiltModel& model, StoragePolicy& policy, int64_t memory)
    : model_(model), policy_(policy) {
  check(config, is_gpu(model.device));
  memory_ = Allocator::of(model.device).new_cache(memory);
}

RecordedSteps::Result RecordedSteps::run(const SentBatch& batch, uint64_t step, uint64_t variant, const Pass& pass) {
  if (eager_ > 0) {
    --eager_;
    const Allocator::Using own(Allocator::of(model_.device), memory_);  // the record will need as much
    return {pass(batch, nullptr), false};
  }
  take_in(batch, step);
  bool accumulating = false;
  for (Param& p : model_.params.params()) {
    accumulating |= p.grad_written;
    if (p.bf16_copy().defined()) p.as(DType::bf16);  // a record has no copy in it that was fresh
  }
  policy_.first_nonfinite();  // reads what is counted, which a record cannot
  const uint64_t kind = mix64(policy_.phase() ^ mix64(variant ^ mix64(accumulating)));
  auto found = recorded_.find(kind);
  if (found == recorded_.end()) {
    if (recorded_.size() >= kMostRecords) return {pass(batch, nullptr), false};
    found = recorded_.emplace(kind, record(pass)).first;
  } else {
    policy_.repeat();
    size_t i = 0;
    for (Param& p : model_.params.params()) p.grad_written = found->second.written[i++];
  }
  cuda::run(found->second.work);
  return {found->second.loss, true};
}

/// Records read the batch and the step where they are now.
void RecordedSteps::take_in(const SentBatch& batch, uint64_t step) {
  if (!batch_.pixels.defined()) {
    const auto room = [&](const Tensor& t) {
      return t.defined() ? Tensor::empty(t.shape(), t.dtype(), model_.device, MemoryKind::inputs) : Tensor();
    };
    batch_.pixels = room(batch.pixels), batch_.labels = room(batch.labels);
    batch_.mirrored = room(batch.mirrored), batch_.mixing = room(batch.mixing);
    step_ = Tensor::empty({1}, DType::i64, model_.device, MemoryKind::inputs);
  }
  if (batch.arrival) cuda::wait_for(batch.arrival);
  transfer(batch.pixels, batch_.pixels);
  transfer(batch.labels, batch_.labels);
  if (batch.mirrored.defined()) transfer(batch.mirrored, batch_.mirrored);
  if (batch.mixing.defined()) transfer(batch.mixing, batch_.mixing);
  transfer(Tensor::from<int64_t>({1}, {static_cast<int64_t>(step)}), step_);
}

RecordedSteps::Recorded RecordedSteps::record(const Pass& pass) {
  Allocator& allocator = Allocator::of(model_.device);
  const Allocator::Using own(allocator, memory_);
  Recorded out;
  cuda::begin_recording();
  try {
    out.loss = pass(batch_, reinterpret_cast<const uint64_t*>(step_.data<int64_t>()));
  } catch (...) {
    cuda::end_recording(false);
    throw;
  }
  out.work = cuda::end_recording();
  for (const Param& p : model_.params.params()) out.written.push_back(p.grad_written);
  return out;
}

}  // namespace mesa
