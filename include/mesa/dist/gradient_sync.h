// The gradients of all ranks become one, bucket by bucket, while the backward pass goes on.
#pragma once
#include <deque>
#include <vector>

#include "mesa/autograd/var.h"
#include "mesa/dist/communicator.h"

namespace mesa {

/// Sums gradients over ranks in place: a bucket is a stretch of the arena in which they lie in the order in which they become ready, so
/// nothing is copied. All ranks must train the same parameters.
class GradientSync {
 public:
  /// The last bucket, which nothing hides any more, stays small: a ViT's embedding, up to the base size.
  static constexpr int64_t kBucketBytes = int64_t{8} << 20, kLastBucketBytes = int64_t{3} << 20;

  /// After the gradients were allocated.
  GradientSync(Communicator& communicator, std::deque<Param>& params, int64_t bucket_bytes = kBucketBytes);
  /// Before a backward pass after which gradients are final.
  void begin();
  /// Nothing more will be added to this parameter's gradient: its bucket leaves once it is full.
  void ready(const Param& param);
  /// What has not left yet leaves; returns when all gradients are sums.
  void finish();
  /// Seconds that finish() has waited so far.
  double wait_seconds() const { return wait_seconds_; }
  int64_t buckets() const { return static_cast<int64_t>(buckets_.size()); }
  /// Their sizes, in the order in which they become ready.
  std::vector<int64_t> bucket_bytes() const;

 private:
  struct Bucket {
    Tensor stretch;
    int64_t params = 0, missing = 0;
    bool left = false;
  };
  void leave(Bucket& bucket);

  Communicator& communicator_;
  std::vector<Bucket> buckets_;  // in the order in which they become ready
  std::deque<Param>& params_;
  std::vector<size_t> bucket_of_;  // by place in `params_`
  double wait_seconds_ = 0;
};

}  // namespace mesa
