#include "mesa/train/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "mesa/data/pixels.h"

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
  Batch out{Tensor::empty(shape, DType::u8), Tensor::empty({kept}, DType::i64), {}, batch.epoch, batch.index, {}, {}};
  const int64_t bytes = batch.images.numel() / n;
  for (int64_t from = 0, to = 0; from < n; ++from) {
    if (std::find(batch.replaced.begin(), batch.replaced.end(), from) != batch.replaced.end()) continue;
    out.sample_indices.push_back(batch.sample_indices[static_cast<size_t>(from)]);
    std::copy_n(batch.images.data<uint8_t>() + from * bytes, bytes, out.images.data<uint8_t>() + to * bytes);
    out.labels.data<int64_t>()[to++] = batch.labels.data<int64_t>()[from];
  }
  return out;
}

/// The batch with left and right exchanged.
Batch mirrored(const Batch& batch) {
  Batch out{Tensor::empty(batch.images.shape(), DType::u8), batch.labels, {}, batch.epoch, batch.index, batch.sample_indices, {}};
  const Shape& shape = batch.images.shape();
  std::copy_n(batch.images.data<uint8_t>(), batch.images.numel(), out.images.data<uint8_t>());
  for (int64_t b = 0; b < shape[0]; ++b)
    pixels::mirror({out.images.data<uint8_t>() + b * shape[1] * shape[2] * shape[3], shape[1], shape[2], shape[3]});
  return out;
}

/// f32 [B, K] on the CPU.
Tensor logits_of(const BuiltModel& model, const SentBatch& batch, const TransformOptions& transform) {
  const Tensor logits = to(model.net(prepare(batch, transform).images).value(), kCpu);
  if (!transform.eval_flip) return logits;
  const SentBatch mirror = send(mirrored(batch.host), model.net.input().classes, model.device);
  const Tensor other = to(model.net(prepare(mirror, transform).images).value(), kCpu), mean = Tensor::empty(logits.shape(), DType::f32);
  for (int64_t i = 0; i < mean.numel(); ++i) mean.data<float>()[i] = 0.5f * (logits.data<float>()[i] + other.data<float>()[i]);
  return mean;
}

}  // namespace

EvalResult evaluate(const BuiltModel& model, Loader& loader, const TransformOptions& transform, const std::function<bool()>& stop,
                    const std::function<void(int64_t done)>& progress, const Look& look, const AddUp& add_up) {
  const auto start = std::chrono::steady_clock::now();
  EvalResult result;
  double loss = 0, top1 = 0, top5 = 0;
  loader.start_epoch(0);
  while (true) {
    if (stop && stop()) {
      result.complete = false;
      break;
    }
    auto batch = loader.next();
    if (!batch) break;
    result.left_out += static_cast<int64_t>(batch->replaced.size());
    if (!batch->replaced.empty()) batch = without_replacements(*batch);
    if (batch->labels.numel() == 0) continue;
    const SentBatch sent = send(std::move(*batch), model.net.input().classes, model.device);
    const Tensor logits = logits_of(model, sent, transform), labels = sent.host.labels;
    const int64_t n = labels.numel();
    loss += static_cast<double>(*cross_entropy(logits, labels).value().data<float>()) * static_cast<double>(n);
    top1 += static_cast<double>(count_top(logits, labels, 1));
    top5 += static_cast<double>(count_top(logits, labels, std::min<int64_t>(5, logits.dim(1))));
    result.images += n;
    if (progress) progress(result.images);
    if (look) look(sent.host, logits);
  }
  if (add_up) {
    std::vector<double> sums{
        loss, top1, top5, static_cast<double>(result.images), static_cast<double>(result.left_out), static_cast<double>(!result.complete)};
    add_up(sums);
    loss = sums[0], top1 = sums[1], top5 = sums[2];
    result.images = std::llround(sums[3]), result.left_out = std::llround(sums[4]), result.complete = sums[5] == 0;
  }
  const double n = static_cast<double>(std::max<int64_t>(result.images, 1));
  result.loss = loss / n;
  result.top1 = 100.0 * top1 / n;
  result.top5 = 100.0 * top5 / n;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

Evaluations evaluate_all(const BuiltModel& model, Ema* ema, Loader& loader, const TransformOptions& transform,
                         const std::function<bool()>& stop, const Look& look, const AddUp& add_up) {
  Evaluations out{evaluate(model, loader, transform, stop, {}, ema == nullptr ? look : Look{}, add_up), {}};
  if (ema == nullptr || !out.raw.complete) return out;
  const Ema::Use averages(*ema);
  out.ema = evaluate(model, loader, transform, stop, {}, look, add_up);
  return out;
}

}  // namespace mesa
