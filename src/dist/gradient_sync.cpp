#include "mesa/dist/gradient_sync.h"

#include <algorithm>
#include <chrono>

namespace mesa {

GradientSync::GradientSync(Communicator& communicator, std::deque<Param>& params, int64_t bucket_bytes)
    : communicator_(communicator), params_(params), bucket_of_(params.size()) {
  int64_t remaining = 0, filled = 0;
  for (const Param& param : params)
    if (param.trainable) remaining += param.grad.bytes();
  int64_t begin = 0, end = 0;  // of the open bucket, in elements of the arena
  const auto close = [&](const Tensor& grad) {
    buckets_.back().stretch = grad.as_strided({end - begin}, {1}, begin);
    filled = 0;
  };
  Tensor last;
  bool tail = false;
  for (size_t i = params.size(); i-- > 0;) {  // the arena's order
    const Param& param = params[i];
    if (!param.trainable) continue;
    const int64_t bytes = param.grad.bytes();
    const bool last_begins = !tail && remaining <= std::min(kLastBucketBytes, bucket_bytes);
    tail = tail || last_begins;
    if (filled > 0 && (filled + bytes > bucket_bytes || last_begins)) close(last);
    if (filled == 0) {
      buckets_.emplace_back();
      begin = param.grad.offset();
    }
    check(param.grad.offset() >= begin && (!last.defined() || last.buffer() == param.grad.buffer()), "gradients do not lie in one arena");
    end = param.grad.offset() + param.grad.numel();
    ++buckets_.back().params;
    bucket_of_[i] = buckets_.size() - 1;
    filled += bytes, remaining -= bytes;
    last = param.grad;
  }
  if (filled > 0) close(last);
}

std::vector<int64_t> GradientSync::bucket_bytes() const {
  std::vector<int64_t> bytes;
  for (const Bucket& bucket : buckets_) bytes.push_back(bucket.stretch.bytes());
  return bytes;
}

void GradientSync::begin() {
  for (Bucket& bucket : buckets_) bucket.missing = bucket.params, bucket.left = false;
}

void GradientSync::ready(const Param& param) {
  const auto at = std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return &p == &param; });
  Bucket& bucket = buckets_[bucket_of_[static_cast<size_t>(at - params_.begin())]];
  if (--bucket.missing == 0) leave(bucket);
}

void GradientSync::leave(Bucket& bucket) {
  // Collectives must begin in one order on all ranks: a bucket waits for those before it.
  if (&bucket != buckets_.data() && !(&bucket)[-1].left) return;
  communicator_.all_reduce(bucket.stretch);
  bucket.left = true;
  if (&bucket != &buckets_.back() && (&bucket)[1].missing == 0) leave((&bucket)[1]);
}

void GradientSync::finish() {
  for (Bucket& bucket : buckets_)
    if (!bucket.left) leave(bucket);
  const auto start = std::chrono::steady_clock::now();
  communicator_.finish();
  wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace mesa
