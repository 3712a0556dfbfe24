// A model of one's own, trained by a loop of one's own: a compact transformer on pictures of ten shapes. What waits for its backward pass
// is kept in 8 bits, and no line of the model says so.
#include <cstdio>

#include "mesa/base/scope.h"
#include "mesa/nn/conv.h"
#include "mesa/nn/layers.h"
#include "mesa/optim/adamw.h"
#include "mesa/optim/schedule.h"
#include "mesa/train/evaluate.h"

using namespace mesa;

namespace {

constexpr int64_t kSide = 32, kWidth = 64, kHeads = 4, kDepth = 3, kBatch = 64, kEpochs = 10;

/// A convolution finds tokens, attention and MLPs mix them (after Hassani et al. 2021, arXiv 2104.05704).
struct CompactTransformer {
  struct Block {
    LayerNorm norm1, norm2;
    Attention attn;
    Mlp mlp;
  };
  Conv2d conv;
  Param* positions;  // [1, N, C]
  std::vector<Block> blocks;
  LayerNorm norm;
  Linear head;

  CompactTransformer(const Builder& build, int64_t classes) {
    conv = Conv2d::make(build, "conv1", 3, kWidth, {kSide, kSide, 7, 7, /*stride*/ 4, /*padding*/ 3}, /*bias*/ true);
    positions = &build.param("positions", {1, kSide / 4 * kSide / 4, kWidth}, Init::truncated_normal(0.02), /*decay*/ false);
    for (int64_t i = 0; i < kDepth; ++i) {
      const Scope scope(concat("blocks.", i));
      blocks.push_back({LayerNorm::make(build, "norm1", kWidth), LayerNorm::make(build, "norm2", kWidth),
                        Attention::make(build, "attn", kWidth, kHeads, {}), Mlp::make(build, "mlp", kWidth, 2 * kWidth, /*drop*/ 0)});
    }
    norm = LayerNorm::make(build, "norm", kWidth);
    head = Linear::make(build, "head", kWidth, classes);
  }

  Var operator()(const Var& images) const {        // [B, 3, 32, 32]
    Var x = bias(relu(conv(images)), *positions);  // [B, N, C]
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Scope scope(concat("blocks.", i), kHeads);
      x = blocks[i].attn(blocks[i].norm1(x), x);  // x + attn(norm1(x))
      x = blocks[i].mlp(blocks[i].norm2(x), x);
    }
    return head(norm(mean_pool(x, 0)));  // [B, classes]
  }
};

}  // namespace

int main() try {
  const Device device = choose_device("auto");
  const DatasetPair data = open_datasets({.kind = "shapes", .train_size = 5000, .test_size = 1000});
  const int64_t classes = data.train->classes();
  const TransformOptions transform{.image_size = kSide};
  Loader train(data.train, transform, {.batch_size = kBatch}), test(data.test, transform, LoaderOptions::evaluation(kBatch));

  ParamStore params;
  const CompactTransformer model(Builder(params, /*seed*/ 0, DType::f32, DType::f32, device), classes);
  params.allocate_gradients();
  StoragePolicy policy = make_policy(load_storage("int8"));
  AdamW optimizer(params.params(), {.weight_decay = 0.05});
  const int64_t steps = train.batches_per_epoch();
  const Schedule schedule{.lr = 2e-3, .warmup_steps = steps, .total_steps = kEpochs * steps};

  for (int64_t epoch = 0, step = 0; epoch < kEpochs; ++epoch) {
    double loss_sum = 0;
    train.start_epoch(epoch);
    while (std::optional<Batch> batch = train.next()) {
      const auto [images, labels, mixing] = prepare(send(std::move(*batch), classes, device), transform);
      params.clear_gradients();
      Tape tape(policy, /*seed*/ 0, step);
      const Var loss = cross_entropy(model(images), labels);
      tape.backward(loss);
      optimizer.step(schedule.at(step++));
      loss_sum += to(loss.value(), kCpu).data<float>()[0];
    }
    std::printf("epoch %2lld: loss %.4f\n", static_cast<long long>(epoch + 1), loss_sum / static_cast<double>(steps));
  }

  int64_t right = 0, kept = 0, exact = 0;
  test.start_epoch(0);
  while (std::optional<Batch> batch = test.next()) {
    const auto [images, labels, mixing] = prepare(send(std::move(*batch), classes, device), transform);
    right += count_top(to(model(images).value(), kCpu), to(labels, kCpu), 1);  // without a tape nothing is kept
  }
  for (const SiteRecord& site : policy.sites()) kept += site.kept_bytes, exact += site.exact_bytes;
  std::printf("top-1 %.1f %%, %s kept of %s a step\n", 100.0 * static_cast<double>(right) / static_cast<double>(data.test->size()),
              format_bytes(kept).c_str(), format_bytes(exact).c_str());
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
