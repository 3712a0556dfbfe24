#include "mesa/train/plan.h"

#include <cstdio>
#include <regex>

namespace mesa {
namespace {

struct MetaStep {
  std::vector<SiteRecord> sites;
  int64_t parameters = 0, activation_bytes = 0;
  MemoryUse peak;
};

/// One step of the real code on meta tensors.
MetaStep meta_step(const RunConfig& config, const VitConfig& model, StoragePolicy& policy) {
  Allocator& memory = Allocator::of(kMeta);
  const MemoryUse before = memory.use();
  memory.reset_peak();
  MetaStep out;
  BuiltModel built(config, model, kMeta);
  built.params.allocate_gradients();
  AdamW optimizer(built.params.params(), {});
  const int64_t B = config.train.batch_size;
  const Tensor labels = Tensor::empty({B}, DType::i64, kMeta, MemoryKind::inputs);
  {
    // The batch's pixels and the loader's ring of batches.
    const int64_t ring = config.data.prefetch + 1;
    const Tensor pixels = Tensor::empty({ring, B, model.image_size, model.image_size, model.channels}, DType::u8, kMeta, MemoryKind::inputs);
    const Tensor images = Tensor::empty({B, model.channels, model.image_size, model.image_size}, DType::f32, kMeta, MemoryKind::inputs);
    Tape tape(policy);
    const Var loss = cross_entropy(built.net(images), labels, config.train.label_smoothing);
    out.activation_bytes = memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations);
    tape.backward(loss);
  }
  optimizer.step(config.optimizer.lr);
  out.parameters = built.params.count();
  out.peak = memory.use();
  out.sites = policy.sites();
  return out;
}

}  // namespace

Plan plan_run(const RunConfig& config, const VitConfig& model) {
  StoragePolicy policy = make_policy(config.storage);
  const MetaStep step = meta_step(config, model, policy);
  policy.check_rules_matched();
  Plan plan;
  plan.parameters = step.parameters;
  plan.sites = step.sites;
  plan.activation_bytes = step.activation_bytes;
  plan.peak = step.peak;
  StoragePolicy exact = make_policy(load_storage("exact"));
  plan.exact_activation_bytes = meta_step(config, model, exact).activation_bytes;
  return plan;
}

namespace {

/// "blocks.3.attn.qkv:x" -> "blocks.*.attn.qkv:x"
std::string fold(const std::string& site) {
  static const std::regex number("(^|\\.)[0-9]+(?=\\.)");
  return std::regex_replace(site, number, "$1*");
}

struct Line {
  std::string site, shape, codec;
  int64_t exact, kept, count;
};

std::vector<Line> lines_of(const Plan& plan, bool all) {
  std::vector<Line> lines;
  for (const SiteRecord& record : plan.sites) {
    Line line{record.site.name(), to_string(record.shape), record.codec, record.exact_bytes, record.kept_bytes, 1};
    if (!all) line.site = fold(line.site);
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

std::string format_plan(const Plan& plan, int64_t batch_size, bool all) {
  std::string out = concat("parameters        ", plan.parameters, "\n");
  const double kept = static_cast<double>(plan.activation_bytes), exact = static_cast<double>(plan.exact_activation_bytes);
  char text[256];
  std::snprintf(text, sizeof text, "kept activations  %s a batch of %lld, %s an image; exact storage keeps %s (%.1f times as much)\n",
                format_bytes(plan.activation_bytes).c_str(), static_cast<long long>(batch_size),
                format_bytes(plan.activation_bytes / batch_size).c_str(), format_bytes(plan.exact_activation_bytes).c_str(),
                kept > 0 ? exact / kept : 0.0);
  out += text;
  MemoryUse at_peak;
  at_peak.live = plan.peak.peak_kind;
  out += concat("predicted peak    ", plan.peak.peak, " bytes (", format_bytes(plan.peak.peak), "): ", describe(at_peak), "\n\n");
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
