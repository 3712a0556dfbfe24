// The step time of data-parallel training on 8 to 4,096 GPUs, computed from the engine's own buckets and from rates of links: the tables of
// docs/distributed.md, where the sources of the figures stand. A model on paper; nothing here was measured on so many GPUs.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "mesa/dist/gradient_sync.h"
#include "mesa/train/setup.h"

namespace {

using namespace mesa;

constexpr int kGpusOfNode = 8;
constexpr double kReferenceStep = 9.38e-3;  // s: forward and backward of DeiT-S, 128 images, bf16, one H200
constexpr double kBackward = 2.0 / 3;       // of a pass: two products for each of forward's
constexpr double kMemoryRate = 4.3e12;      // bytes/s that kernels reach on an H200
constexpr double kAdamWBytes = 30;          // that AdamW moves for a parameter
constexpr double kStateBytes = 8;           // two moments in f32
constexpr double kNvlinkRate = 270e9;       // bytes/s of an all-reduce over the 8 GPUs of a node, counted by its tensor
constexpr double kRailRate = 45e9;          // bytes/s that a network card of 400 Gb/s carries
constexpr double kTreeShare = 0.7;          // of the links' rate that NCCL expects of its trees at 8 MB
constexpr double kStartLatency = 4.4e-6, kNvlinkHop = 1.25e-6, kNetworkHop = 8.5e-6;  // s: NCCL's figures for trees in LL128
constexpr double kTakenShare = 8.0 / 132;  // multiprocessors that a running collective takes from the backward pass

struct Cluster {
  int gpus, rails;
  int nodes() const { return gpus / kGpusOfNode; }
  /// Before the first byte is there: up the tree and down again, over the GPUs of a node and between nodes.
  double latency() const { return kStartLatency + 2 * ((kGpusOfNode - 1) * kNvlinkHop + std::log2(nodes()) * kNetworkHop); }
  /// Seconds a byte of an all-reduce: each byte crosses NVLink and, cut into as many streams as there are cards, the network twice.
  double seconds_per_byte() const {
    const double network = nodes() == 1 ? 0 : 2.0 * (nodes() - 1) / nodes() / (rails * kRailRate * kTreeShare);
    return std::max(1 / kNvlinkRate, network);
  }
};

struct Model {
  std::string name;
  double images, passes, forward;  // of a GPU; seconds
  int64_t parameters = 0;
  std::vector<int64_t> buckets;  // bytes, in the order in which they become ready
};

Model load(const std::string& name, double images, int64_t bucket_bytes) {
  static const double reference = net_config("deit_small_patch16_224").forward_flops() * 128;
  const NetConfig config = net_config(name);
  Model model{name, images, kReferenceStep * config.forward_flops() * images / reference, 0, 0, {}};
  model.forward = (1 - kBackward) * model.passes;
  BuiltModel built(RunConfig{}, config, kMeta);
  built.params.allocate_gradients();
  model.parameters = built.params.count();
  for (const ArenaRange& bucket : gradient_buckets(built.params.params(), bucket_bytes))
    model.buckets.push_back(bucket.count() * size_of(DType::f32));
  return model;
}

struct Step {
  double reduction = 0, exposed = 0, total = 0;  // seconds: all collectives of gradients; what backward did not hide; the step
};

/// A bucket is ready when backward has done its share of the parameters, and collectives follow one another. `sharded`: ZeRO-1, where a
/// reduce-scatter does half of an all-reduce's work, and for each bucket an all-gather of parameters the other half after the optimizer;
/// the gradient's norm is then a collective of its own.
Step step_of(const Model& model, const Cluster& cluster, double element_bytes, bool sharded = false) {
  const double part = sharded ? 0.5 : 1, backward = model.passes - model.forward;
  double bytes = 0, seen = 0, now = 0, done = 0, network_free = 0;
  for (const int64_t bucket : model.buckets) bytes += static_cast<double>(bucket);
  const auto compute_to = [&](double share) {  // slower while a collective runs
    const double work = backward * (share - done), slow = std::clamp((network_free - now) * (1 - kTakenShare), 0.0, work);
    now += slow / (1 - kTakenShare) + (work - slow);
    done = share;
  };
  Step step;
  for (const int64_t bucket : model.buckets) {
    seen += static_cast<double>(bucket);
    compute_to(seen / bytes);
    const double seconds = part * (cluster.latency() + static_cast<double>(bucket) * element_bytes / 4 * cluster.seconds_per_byte());
    network_free = std::max(now, network_free) + seconds;
    step.reduction += seconds;
  }
  step.exposed = std::max(0.0, network_free - now);
  const double adam = static_cast<double>(model.parameters) * kAdamWBytes / kMemoryRate;
  const double gathers = 0.5 * (static_cast<double>(model.buckets.size()) * cluster.latency() + bytes * cluster.seconds_per_byte());
  // Loss and decisions are agreed on in a collective of a few bytes, which nothing hides.
  step.total = model.forward + now + step.exposed + cluster.latency();
  step.total += sharded ? cluster.latency() + adam / cluster.gpus + gathers : adam;
  return step;
}

double alone(const Model& model) { return model.passes + static_cast<double>(model.parameters) * kAdamWBytes / kMemoryRate; }

void print_steps(const std::vector<Model>& models, double element_bytes) {
  std::printf("| model, gradients | network of a node | GPUs | all-reduce, ms | not hidden, ms | step, ms | efficiency | images/s |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  for (const Model& model : models)
    for (const int rails : {8, 1})
      for (const int gpus : {8, 64, 512, 4096}) {
        const Step step = step_of(model, {gpus, rails}, element_bytes);
        std::printf("| %s, %.0f MB | %d x 400 Gb/s | %d | %.2f | %.2f | %.2f | %.0f %% | %.2f M |\n", model.name.c_str(),
                    static_cast<double>(model.parameters) * element_bytes / 1e6, rails, gpus, 1e3 * step.reduction, 1e3 * step.exposed,
                    1e3 * step.total, 100 * alone(model) / step.total, model.images * gpus / step.total / 1e6);
      }
}

/// The other question: not more images a step, but the same ones sooner.
void print_fixed(const std::string& name, int64_t bucket_bytes, double element_bytes) {
  constexpr int kBatch = 4096;
  std::printf("| GPUs | images a GPU | not hidden, ms | step, ms | efficiency |\n|---|---|---|---|---|\n");
  for (const int gpus : {8, 64, 512, 4096}) {
    const Model model = load(name, static_cast<double>(kBatch) / gpus, bucket_bytes);
    const Step step = step_of(model, {gpus, 8}, element_bytes);
    std::printf("| %d | %.0f | %.2f | %.2f | %.0f %% |\n", gpus, model.images, 1e3 * step.exposed, 1e3 * step.total,
                100 * alone(model) / step.total);
  }
}

void print_shards(const std::vector<Model>& models, double element_bytes) {
  std::printf("| model | GPUs | optimizer's state a GPU, MB | with ZeRO-1, MB | step, ms | with ZeRO-1, ms |\n|---|---|---|---|---|---|\n");
  for (const Model& model : models)
    for (const int gpus : {8, 512}) {
      const double state = kStateBytes * static_cast<double>(model.parameters) / 1e6;
      std::printf("| %s | %d | %.0f | %.1f | %.2f | %.2f |\n", model.name.c_str(), gpus, state, state / gpus,
                  1e3 * step_of(model, {gpus, 8}, element_bytes).total, 1e3 * step_of(model, {gpus, 8}, element_bytes, true).total);
    }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Computes the step time of data-parallel training on many GPUs: the tables of docs/distributed.md.", "scale-model");
  double images = 128, bucket_mib = static_cast<double>(kBucketBytes >> 20);
  bool bf16 = false;
  std::vector<std::string> names{"deit_small", "deit_base"}, large{"deit_small", "deit_base", "vit_large", "vit_huge"};
  app.add_option("--images", images, "of a GPU in a step")->check(CLI::Range(1.0, 1e5));
  app.add_option("--bucket", bucket_mib, "MiB of a bucket of gradients")->check(CLI::Range(1.0, 1024.0));
  app.add_option("--models", names, "names of models (mesa-train --list-models)")->delimiter(',');
  app.add_flag("--bf16", bf16, "reduce gradients in 16 bits");
  CLI11_PARSE(app, argc, argv);
  if (app.count("--models") > 0) large = names;
  try {
    const auto bucket_bytes = static_cast<int64_t>(bucket_mib * (1 << 20));
    const auto load_all = [&](const std::vector<std::string>& list) {
      std::vector<Model> models;
      for (const std::string& name : list) models.push_back(load(name, images, bucket_bytes));
      return models;
    };
    const double element_bytes = bf16 ? 2 : 4;
    print_steps(load_all(names), element_bytes);
    std::printf("\n");
    print_fixed(names.front(), bucket_bytes, element_bytes);
    std::printf("\n");
    print_shards(load_all(large), element_bytes);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "scale-model: %s\n", e.what());
    return 1;
  }
}
