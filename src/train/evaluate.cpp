#include "mesa/train/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace mesa {

int64_t count_top(const Tensor& logits, const Tensor& labels, int64_t k) {
  const int64_t classes = logits.dim(1);
  const float* rows = logits.data<float>();
  int64_t hits = 0;
  for (int64_t b = 0; b < logits.dim(0); ++b) {
    const float* row = rows + b * classes;
    const int64_t label = labels.data<int64_t>()[b];
    check(label >= 0 && label < classes, "a picture has label ", label, " but the model has ", classes, " classes");
    int64_t better = row[label] == row[label] ? 0 : k;
    for (int64_t c = 0; c < classes; ++c) better += row[c] > row[label] || (c < label && row[c] == row[label]);
    hits += better < k;
  }
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
    const Tensor logits = to(model.net(prepare(sent, transform).images).value(), kCpu), labels = sent.host.labels;
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
