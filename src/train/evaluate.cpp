#include "mesa/train/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "mesa/kernels/elementwise.h"

namespace mesa {

bool is_among_best(const float* logits, int64_t classes, int64_t label, int64_t k) {
  check(label >= 0 && label < classes, "a picture has label ", label, " but the model has ", classes, " classes");
  const float own = logits[label];
  int64_t better = own == own ? 0 : k;
  for (int64_t c = 0; c < classes; ++c) better += logits[c] > own || (c < label && logits[c] == own);
  return better < k;
}

int64_t count_top(const Tensor& logits, const Tensor& labels, int64_t k) {
  const int64_t classes = logits.dim(1);
  int64_t hits = 0;
  for (int64_t b = 0; b < logits.dim(0); ++b)
    hits += is_among_best(logits.data<float>() + b * classes, classes, labels.data<int64_t>()[b], k);
  return hits;
}

namespace {

/// The batch without the pictures that stand in for damaged ones: they would be counted twice.
Batch without_replacements(const Batch& batch) {
  const int64_t n = batch.labels.numel(), kept = n - static_cast<int64_t>(batch.replaced.size());
  Shape shape = batch.images.shape();
  shape[0] = kept;
  const Device memory = batch.images.device();  // which a GPU may copy from
  Batch out{Tensor::empty(shape, DType::u8, memory), Tensor::empty({kept}, DType::i64, memory), {}, {}, batch.epoch, batch.index, {}, {}};
  const int64_t bytes = batch.images.numel() / n;
  for (int64_t from = 0, to = 0; from < n; ++from) {
    if (std::find(batch.replaced.begin(), batch.replaced.end(), from) != batch.replaced.end()) continue;
    out.sample_indices.push_back(batch.sample_indices[static_cast<size_t>(from)]);
    std::copy_n(batch.images.data<uint8_t>() + from * bytes, bytes, out.images.data<uint8_t>() + to * bytes);
    out.labels.data<int64_t>()[to++] = batch.labels.data<int64_t>()[from];
  }
  return out;
}

/// The same pictures, read from right to left.
SentBatch mirrored(SentBatch batch) {
  const std::vector<uint8_t> all(static_cast<size_t>(batch.labels.numel()), 1);
  batch.mirrored = to(Tensor::from<uint8_t>({batch.labels.numel()}, all), batch.pixels.device());
  return batch;
}

/// f32 [B, K] on the device.
Tensor logits_of(const BuiltModel& model, const SentBatch& batch, const TransformOptions& transform) {
  const auto of = [&](const SentBatch& pictures) { return model.net(prepare(pictures, transform, model.images).images).value(); };
  const Tensor logits = of(batch);
  if (!transform.eval_flip) return logits;
  const Tensor sum = empty_like(logits);
  kernels::add(logits, of(mirrored(batch)), sum);
  kernels::scale(sum, 0.5, sum);
  return sum;
}

}  // namespace

EvalResult evaluate(const BuiltModel& model, Loader& loader, const TransformOptions& transform, const std::function<bool()>& stop,
                    const std::function<void(int64_t done)>& progress, const Look& look, const AddUp& add_up) {
  const auto start = std::chrono::steady_clock::now();
  EvalResult result;
  double loss = 0, top1 = 0, top5 = 0;
  loader.start_epoch(0);
  // The next batch that has pictures, on its way.
  const auto next = [&]() -> std::optional<SentBatch> {
    while (auto batch = loader.next()) {
      result.left_out += static_cast<int64_t>(batch->replaced.size());
      if (!batch->replaced.empty()) batch = without_replacements(*batch);
      if (batch->labels.numel() > 0) return send(std::move(*batch), model.net.input().classes, model.device);
    }
    return {};
  };
  std::optional<SentBatch> sent = next();
  while (sent) {
    if (stop && stop()) {
      result.complete = false;
      break;
    }
    std::optional<SentBatch> ahead = next();  // first, since its copy waits for what the GPU has by now
    const Batch batch = sent->host;
    const Tensor logits = to(logits_of(model, *sent, transform), kCpu), labels = batch.labels;
    sent.reset();  // its guard goes before what it guards
    sent = std::move(ahead);
    const int64_t n = labels.numel();
    loss += static_cast<double>(*cross_entropy(logits, labels).value().data<float>()) * static_cast<double>(n);
    top1 += static_cast<double>(count_top(logits, labels, 1));
    top5 += static_cast<double>(count_top(logits, labels, std::min<int64_t>(5, logits.dim(1))));
    result.images += n;
    if (progress) progress(result.images);
    if (look) look(batch, logits);
  }
  if (add_up) {
    std::vector<double> sums{
        loss, top1, top5, static_cast<double>(result.images), static_cast<double>(result.left_out), static_cast<double>(!result.complete)};
    add_up(sums);
    loss = sums[0], top1 = sums[1], top5 = sums[2];
    result.images = std::llround(sums[3]), result.left_out = std::llround(sums[4]), result.complete = sums[5] == 0;
  }
  const double n = static_cast<double>(std::max<int64_t>(result.images, 1));
  result.loss = std::isnan(loss) ? std::numeric_limits<double>::quiet_NaN() : loss / n;  // not the one that prints as "-nan"
  result.top1 = 100.0 * top1 / n;
  result.top5 = 100.0 * top5 / n;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

Evaluations evaluate_all(const BuiltModel& model, Ema* ema, Loader& loader, const TransformOptions& transform,
                         const std::function<bool()>& stop, const std::function<void(int64_t done)>& progress, const Look& look,
                         const AddUp& add_up) {
  Evaluations out{evaluate(model, loader, transform, stop, progress, ema == nullptr ? look : Look{}, add_up), {}};
  if (ema == nullptr || !out.raw.complete) return out;
  const Ema::Use averages(*ema);
  out.ema = evaluate(model, loader, transform, stop, progress, look, add_up);
  return out;
}

}  // namespace mesa
