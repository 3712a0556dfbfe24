#include "mesa/dist/gradient_sync.h"

#include <algorithm>
#include <chrono>
#include <exception>

#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {

Tensor stretch_of(const Tensor& any_of_arena, const ArenaRange& range) {
  return any_of_arena.as_strided({range.count()}, {1}, range.begin);
}

}  // namespace

std::vector<ArenaRange> gradient_buckets(const std::deque<Param>& params, int64_t bucket_bytes, int64_t parts) {
  std::vector<const Tensor*> gradients;  // in the arena's order
  for (auto param = params.rbegin(); param != params.rend(); ++param)
    if (param->trainable) gradients.push_back(&param->grad);
  int64_t remaining = 0, filled = 0;  // bytes
  for (const Tensor* grad : gradients) remaining += grad->bytes();
  std::vector<ArenaRange> buckets;
  bool tail = false;
  const int64_t unit = parts > 1 ? 4 * parts : 1;  // a part begins on 16 bytes
  const int64_t least = std::min(kLeastBucketBytes, bucket_bytes / 2);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& grad = *gradients[i];
    check(grad.buffer() == gradients[0]->buffer() && (i == 0 || grad.offset() > gradients[i - 1]->offset()),
          "gradients do not lie in one arena");
    const bool last_begins = !tail && remaining <= std::min(kLastBucketBytes, bucket_bytes);
    tail = tail || last_begins;
    if (filled == 0 || (filled >= least && filled + grad.bytes() > bucket_bytes) || last_begins) {
      buckets.push_back({grad.offset(), 0});
      filled = 0;
    }
    const int64_t count = grad.offset() + grad.numel() - buckets.back().begin;
    buckets.back().end = buckets.back().begin + (count + unit - 1) / unit * unit;
    filled += grad.bytes(), remaining -= grad.bytes();
  }
  return buckets;
}

std::vector<ArenaRange> parts_of(const std::vector<ArenaRange>& buckets, int64_t rank, int64_t ranks) {
  std::vector<ArenaRange> parts;
  for (const ArenaRange& bucket : buckets) {
    const int64_t count = bucket.count() / ranks;
    parts.push_back({bucket.begin + rank * count, bucket.begin + (rank + 1) * count});
  }
  return parts;
}

GradientSync::GradientSync(Communicator& communicator, std::deque<Param>& params, const GradientSyncOptions& options)
    : communicator_(communicator), params_(params), options_(options), bucket_of_(params.size()) {
  const auto any = std::find_if(params.begin(), params.end(), [](const Param& param) { return param.trainable; });
  if (any == params.end()) return;
  for (const ArenaRange& range : gradient_buckets(params, options.bucket_bytes, options.sharded ? communicator.size() : 1)) {
    const Tensor gradients = stretch_of(any->grad, range);
    const bool same = gradients.dtype() == options.dtype || options.dtype == DType::f32;
    buckets_.push_back(
        {range, gradients, same ? gradients : Tensor::empty(gradients.shape(), options.dtype, gradients.device(), MemoryKind::gradients)});
  }
  for (size_t i = params.size(); i-- > 0;) {
    if (!params[i].trainable) continue;
    const auto after = std::upper_bound(buckets_.begin(), buckets_.end(), params[i].grad.offset(),
                                        [](int64_t at, const Bucket& bucket) { return at < bucket.range.begin; });
    bucket_of_[i] = static_cast<size_t>(after - buckets_.begin()) - 1;
    buckets_[bucket_of_[i]].params.push_back(&params[i]);
  }
  announce(*any);
}

void GradientSync::announce(const Param& any) {
  const ArenaRange all{0, buckets_.back().range.end};
  if (buckets_.front().sent.dtype() == any.grad.dtype())
    communicator_.will_use(stretch_of(any.grad, all));
  else
    for (const Bucket& bucket : buckets_) communicator_.will_use(bucket.sent);
  if (sharded()) communicator_.will_use(stretch_of(any.value, all));
}

std::vector<ArenaRange> GradientSync::own() const {
  std::vector<ArenaRange> ranges;
  for (const Bucket& bucket : buckets_) ranges.push_back(bucket.range);
  return parts_of(ranges, communicator_.rank(), communicator_.size());
}

Tensor GradientSync::own_part(const Tensor& stretch) const {
  const int64_t count = stretch.numel() / communicator_.size();
  return stretch.narrow(0, communicator_.rank() * count, count);
}

void GradientSync::begin() {
  for (Bucket& bucket : buckets_) bucket.missing = bucket.params.size(), bucket.left = false;
}

void GradientSync::ready(const Param& param) {
  const auto at = std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return &p == &param; });
  Bucket& bucket = buckets_[bucket_of_[static_cast<size_t>(at - params_.begin())]];
  if (--bucket.missing == 0) leave(bucket);
}

void GradientSync::leave(Bucket& bucket) {
  // Collectives must begin in one order on all ranks: a bucket waits for those before it.
  if (&bucket != buckets_.data() && !(&bucket)[-1].left) return;
  if (bucket.sent.dtype() != bucket.gradients.dtype()) kernels::copy(bucket.gradients, bucket.sent);
  if (options_.sharded)
    communicator_.reduce_scatter(bucket.sent, own_part(bucket.sent));
  else
    communicator_.all_reduce(bucket.sent);
  bucket.left = true;
  if (&bucket != &buckets_.back() && (&bucket)[1].missing == 0) leave((&bucket)[1]);
}

void GradientSync::take_back(const Bucket& bucket) {
  if (bucket.sent.dtype() == bucket.gradients.dtype()) return;
  if (options_.sharded)
    kernels::copy(own_part(bucket.sent), own_part(bucket.gradients));
  else
    kernels::copy(bucket.sent, bucket.gradients);
}

void GradientSync::finish() {
  for (Bucket& bucket : buckets_)
    if (!bucket.left) leave(bucket);
  const auto start = std::chrono::steady_clock::now();
  communicator_.finish();
  wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const Bucket& bucket : buckets_) take_back(bucket);
}

void GradientSync::share_values() {
  for (const Bucket& bucket : buckets_) {
    const Tensor values = stretch_of(bucket.params.front()->value, bucket.range);
    communicator_.all_gather(own_part(values), values);
  }
  const auto start = std::chrono::steady_clock::now();
  communicator_.finish();
  wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void GradientSync::gather(const std::vector<Tensor>& parts, const std::function<void(const Param&, const Tensor&)>& f) {
  std::exception_ptr error;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Bucket& bucket = buckets_[i];
    const Tensor& whole = bucket.gradients;  // which nobody needs between two updates
    communicator_.all_gather(parts[i], whole);
    communicator_.finish();
    if (!error) try {
        for (const Param* param : bucket.params) {
          const Tensor& grad = param->grad;
          f(*param, whole.narrow(0, grad.offset() - bucket.range.begin, grad.numel()).reshape(grad.shape()));
        }
      } catch (...) {  // such as too little memory on this rank: the others must not be left waiting
        error = std::current_exception();
      }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace mesa
