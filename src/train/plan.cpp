#include "mesa/train/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <optional>

#include "mesa/base/cuda.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/objective.h"
#include "mesa/train/optimizer_setup.h"

namespace mesa {
namespace {

/// What kernels and matrix products take beside a plan, and where it lies between its blocks: 32 MiB for cuBLASLt, sums of blocks.
constexpr int64_t kScratch = 128 << 20;

/// What a GPU's libraries take of so many free bytes when they are first called: modules of kernels, cuBLASLt, cuDNN, NCCL.
int64_t of_libraries(int64_t free) { return std::min<int64_t>(free / 32, 512 << 20); }

struct MetaStep {
  std::vector<SiteRecord> sites;
  int64_t parameters = 0, trained = 0, activation_bytes = 0, checkpoint_bytes = 0;
  int64_t lasting = 0, passing = 0, recorded = 0;  // what the allocator takes from the system, rounded up as it rounds
  int64_t reserved() const { return lasting + passing + recorded; }
  BlockEnd cut_from = BlockEnd::high;
  MemoryUse peak;
};

/// Where a plan for this config's device lives. A plan for a GPU needs none.
Device plan_device(const RunConfig& config) { return config.device == "cuda" || is_gpu(choose_device(config.device)) ? kMetaCuda : kMeta; }

bool mixes(const RunConfig& config) { return config.data.mixup > 0 || config.data.cutmix > 0; }

/// So many batches as they come from a loader.
struct Batches {
  Batches(const RunConfig& config, const ImageConfig& model, int64_t count, int64_t batch)
      : pixels(room({count, batch, model.image_size, model.image_size, model.channels}, DType::u8, config)),
        labels(room({count, batch}, DType::i64, config)),
        mixing(mixes(config) ? room({count, batch, Mixing::kNumbers}, DType::f32, config) : Tensor()) {}
  static Tensor room(const Shape& shape, DType dtype, const RunConfig& config) {
    return Tensor::empty(shape, dtype, plan_device(config), MemoryKind::inputs);
  }
  /// The labels and the mixing of a batch.
  Prepared first(const Tensor& images) const { return {images, labels.select(0, 0), mixing.defined() ? mixing.select(0, 0) : Tensor()}; }
  Tensor pixels, labels, mixing;
};

Tensor meta_images(const BuiltModel& built, const ImageConfig& model, int64_t batch) {
  return Tensor::empty({batch, model.channels, model.image_size, model.image_size}, built.images, built.device, MemoryKind::inputs);
}

/// One step and one evaluation of the real code on meta tensors, with batches that come and go as they do in a run: a loader on the CPU
/// holds those made ahead, one in the trainer's hands and one about to be; a GPU's memory the one that it works on, the one that comes next
/// and, for recorded passes, the copy that they read.
MetaStep meta_step(const RunConfig& config, const NetConfig& model, StoragePolicy& policy) {
  const Device device = plan_device(config);
  const bool gpu = is_gpu(device), recording = config.train.cuda_graph;
  Allocator& memory = Allocator::of(device);
  memory.release_cached();
  const MemoryUse before = memory.use();
  const Objective objective(config, model.input(), device);
  memory.reset_peak();
  MetaStep out;
  BuiltModel built(config, model, device);
  const auto communicator = single_communicator({config.rank, config.ranks, 0, ""});
  const std::unique_ptr<GradientSync> sync = share_gradients(config, built.params, *communicator);
  built.params.remember_buffers();
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(config, built.params, shard_of(sync.get(), *communicator));
  const std::unique_ptr<Ema> ema = make_ema(config, built.params);
  const int64_t B = config.train.batch_size, eval_batch = config.train.eval_batch_size > 0 ? config.train.eval_batch_size : B;
  const auto batches = [&](int64_t count, int64_t batch) { return std::make_unique<Batches>(config, model.input(), count, batch); };
  const int64_t made = config.data.prefetch + 2;
  auto training = batches(gpu ? 1 : made, B), evaluation = gpu ? nullptr : batches(made, eval_batch);
  const auto of_records = gpu && recording ? batches(1, B) : nullptr;
  std::unique_ptr<Batches> ahead;
  const auto recorded = memory.new_cache();  // recorded passes share no memory with anything else
  const auto passing = [&] { return memory.use().reserved - memory.use().lasting; };
  const int64_t passing_before = passing();
  {
    std::optional<Allocator::Using> own;
    if (recording) own.emplace(memory, recorded);
    const Tensor images = meta_images(built, model.input(), B);
    const Targets targets = objective.targets(training->first(images));
    Tape tape(policy);
    const Var loss = objective(built.net, images, targets);
    out.activation_bytes = memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations);
    if (gpu && !recording) ahead = batches(1, B);
    tape.backward(loss);
  }
  if (recording) out.recorded = passing() - passing_before, ahead = batches(1, B);
  optimizer->step(config.optimizer.lr);
  if (ema) ema->update();
  if (gpu) {
    training.reset(), ahead.reset();
    evaluation = batches(1, eval_batch);
  }
  for (int pass = 0; pass < 2; ++pass) {
    if (gpu) ahead = batches(1, eval_batch);  // on its way while the model has the one before
    built.net(meta_images(built, model.input(), eval_batch));
    if (gpu) evaluation = std::move(ahead);
  }
  out.parameters = built.params.count();
  for (const Param& param : built.params.params()) out.trained += param.trainable ? param.value.numel() : 0;
  out.peak = memory.use();
  const CheckpointData copy = snapshot_checkpoint({config, {}, built.params, *optimizer, optimizer->state(), policy, ema.get()}, {});
  if (!gpu) {  // it stays from the first update on; that of a GPU's tensors is on the host
    out.peak.peak += copy.bytes();
    out.peak.peak_kind[static_cast<int>(MemoryKind::workspace)] += copy.bytes();
    out.checkpoint_bytes = copy.bytes();
    out.peak.reserved += copy.bytes();
  }
  out.lasting = gpu ? out.peak.lasting - before.lasting : 0;
  out.passing = out.peak.reserved - before.reserved - out.lasting - out.recorded;
  out.sites = policy.sites();
  return out;
}

/// The same, where blocks are cut (on a GPU) from that end by which less is taken.
MetaStep tightest_step(const RunConfig& config, const NetConfig& model) {
  const auto by = [&](BlockEnd end) {  // nothing of one step, its policy's ranges say, may lie in the way of the next
    Allocator::of(plan_device(config)).cut_from(end);
    StoragePolicy policy = make_policy(config.storage);
    MetaStep step = meta_step(config, model, policy);
    step.cut_from = end;
    return step;
  };
  const MetaStep high = by(BlockEnd::high);
  if (!is_gpu(plan_device(config))) return high;
  const MetaStep low = by(BlockEnd::low);
  return low.reserved() < high.reserved() ? low : high;
}

/// Every rule must match a site of the model or, where parameters are frozen and so keep nothing, of the model that trains all.
void check_rules(const RunConfig& config, const NetConfig& model) {
  RunConfig thawed = config;
  thawed.train.frozen.clear(), thawed.lora.train = {"*"};
  StoragePolicy all = make_policy(config.storage);
  meta_step(thawed, model, all);
  all.check_rules_matched();
}

}  // namespace

std::string fold_site(const std::string& site) {
  std::string out;
  for (size_t from = 0; from < site.size();) {
    const size_t end = std::min(site.find('.', from), site.size());
    const bool number = end > from && end < site.size() && site.find_first_not_of("0123456789", from) == end;
    out += number ? "*" : site.substr(from, end - from);
    if (end < site.size()) out += '.';
    from = end + 1;
  }
  return out;
}

Plan plan_run(const RunConfig& config, const NetConfig& model) try {
  const MetaStep step = tightest_step(config, model);
  check_rules(config, model);
  Plan plan;
  plan.parameters = step.parameters;
  plan.trained = step.trained;
  plan.sites = step.sites;
  plan.activation_bytes = step.activation_bytes;
  plan.peak = step.peak;
  plan.reserved = step.reserved(), plan.lasting = step.lasting, plan.passing = step.passing, plan.recorded = step.recorded;
  plan.cut_from = step.cut_from;
  plan.checkpoint_bytes = step.checkpoint_bytes;
  StoragePolicy exact = make_policy(reference_storage());
  plan.exact_activation_bytes = meta_step(config, model, exact).activation_bytes;
  return plan;
} catch (const UsageError&) {
  throw;
} catch (const Error& e) {
  throw UsageError(e.what());  // no data and no memory were involved, so it is the config: a rule `rebuild` where nothing can be rebuilt
}

namespace {

struct Line {
  std::string site, shape, codec;
  int64_t exact, kept, count;
};

std::vector<Line> lines_of(const Plan& plan, bool all) {
  std::vector<Line> lines;
  for (const SiteRecord& record : plan.sites) {
    Line line{record.site.name(), to_string(record.shape), record.codec, record.exact_bytes, record.kept_bytes, 1};
    if (!all) line.site = fold_site(line.site);
    bool merged = false;
    for (Line& have : lines)
      if (have.site == line.site && have.shape == line.shape && have.codec == line.codec && have.kept == line.kept) {
        ++have.count;
        merged = true;
      }
    if (!merged) lines.push_back(line);
  }
  return lines;
}

}  // namespace

int64_t largest_batch(const RunConfig& config, const NetConfig& model, int64_t bytes) {
  const int64_t room = bytes - std::min(bytes / 32, config.train.cuda_graph ? 2 * kScratch : kScratch);
  const auto fits = [&](int64_t batch) {
    RunConfig other = config;
    other.train.batch_size = batch;
    other.train.eval_batch_size = std::min(config.train.eval_batch_size > 0 ? config.train.eval_batch_size : batch, batch);
    return tightest_step(other, model).reserved() <= room;
  };
  const int64_t unit = mixes(config) ? 2 : 1;  // samples are mixed in pairs
  if (!fits(unit)) return 0;
  int64_t low = 1, high = 2;  // in units
  while (high < (int64_t{1} << 24) && fits(high * unit)) low = high, high *= 2;
  while (high - low > std::max<int64_t>(1, low / 64)) {  // to the next percent or two
    const int64_t middle = (low + high) / 2;
    (fits(middle * unit) ? low : high) = middle;
  }
  return low * unit;
}

int64_t available_memory(Device device) {
  const MemoryUse use = Allocator::of(device).use();
  const int64_t cached = use.reserved - use.total;
  if (device.kind == DeviceKind::cuda) return cuda::device_memory().free + cached;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string name, rest; meminfo >> name; std::getline(meminfo, rest))
    if (name == "MemAvailable:") {
      int64_t kilobytes = 0;
      meminfo >> kilobytes;
      return kilobytes * 1024 + cached;
    }
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

void reserve_memory(const Plan& plan, Device gpu) {
  const int64_t free = available_memory(gpu), room = free - of_libraries(free) - memory_of_records(plan) - plan.lasting - plan.passing;
  const int64_t scratch = std::clamp<int64_t>(room, 0, kScratch);
  Allocator::of(gpu).cut_from(plan.cut_from);
  Allocator::of(gpu).reserve(plan.lasting + scratch / 16, plan.passing + scratch - scratch / 16);
}

int64_t memory_of_records(const Plan& plan) { return plan.recorded > 0 ? plan.recorded + kScratch : 0; }

std::string explain_out_of_memory(const RunConfig& config) try {
  const NetConfig model = model_config(config, known_classes(config));
  const int64_t bytes = available_memory(choose_device(config.device));
  const Plan plan = plan_run(config, model);
  MemoryUse at_peak;
  at_peak.live = plan.peak.peak_kind;
  std::string out = concat("the plan of train.batch_size ", config.train.batch_size, ": ", format_bytes(plan.peak.peak), " (",
                           describe(at_peak), ") of ", format_bytes(bytes), " that there are");
  std::vector<Line> lines = lines_of(plan, false);
  std::stable_sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.kept * a.count > b.kept * b.count; });
  for (size_t i = 0; i < lines.size() && i < 4 && lines[i].kept > 0; ++i)
    out += concat(i ? ", " : "\nkeeping most: ", lines[i].site, " ", format_bytes(lines[i].kept * lines[i].count), " as ", lines[i].codec);
  const int64_t batch = largest_batch(config, model, bytes - of_libraries(bytes));
  if (batch > 0 && batch < config.train.batch_size)
    out += concat("\ntrain.batch_size=", batch, " would fit");
  else if (batch == 0)
    out += "\nnot even a batch of 1 would fit";
  return out + "\nfewer bits keep less: storage: int8, int4 or int2";
} catch (const std::exception& e) {
  return concat("(no plan can be made now: ", e.what(), ")");
}

std::string format_plan(const Plan& plan, int64_t batch_size, bool all) {
  const std::string trained = plan.trained < plan.parameters ? concat(", of which ", plan.trained, " are trained") : "";
  std::string out = concat("parameters        ", plan.parameters, trained, "\n");
  const double kept = static_cast<double>(plan.activation_bytes), exact = static_cast<double>(plan.exact_activation_bytes);
  char text[256];
  std::snprintf(text, sizeof text,
                "kept activations  %s a batch of %lld, %lld bytes an image; exact storage keeps %s (%.1f times as much)\n",
                format_bytes(plan.activation_bytes).c_str(), static_cast<long long>(batch_size),
                static_cast<long long>(plan.activation_bytes / batch_size), format_bytes(plan.exact_activation_bytes).c_str(),
                kept > 0 ? exact / kept : 0.0);
  out += text;
  MemoryUse at_peak;
  at_peak.live = plan.peak.peak_kind;
  out += concat("predicted peak    ", plan.peak.peak, " bytes (", format_bytes(plan.peak.peak), "): ", describe(at_peak), "\n");
  out += concat("memory taken      ", format_bytes(plan.reserved), ", with what is lost between blocks\n");
  if (plan.checkpoint_bytes > 0)
    out +=
        concat("checkpoints       ", format_bytes(plan.checkpoint_bytes), " of the workspace: the copy that is written beside training\n");
  out += "\n";
  std::snprintf(text, sizeof text, "%-34s %-20s %-10s %12s %12s\n", "site", "shape", "codec", "exact", "kept");
  out += text;
  for (const Line& line : lines_of(plan, all)) {
    const std::string times = line.count > 1 ? concat("  x ", line.count) : "";
    std::snprintf(text, sizeof text, "%-34s %-20s %-10s %12lld %12lld%s\n", line.site.c_str(), line.shape.c_str(), line.codec.c_str(),
                  static_cast<long long>(line.exact), static_cast<long long>(line.kept), times.c_str());
    out += text;
  }
  return out;
}

}  // namespace mesa
