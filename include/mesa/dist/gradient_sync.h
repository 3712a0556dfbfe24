// The gradients of all ranks become one, bucket by bucket, while the backward pass goes on.
#pragma once
#include <deque>
#include <functional>
#include <vector>

#include "mesa/autograd/var.h"
#include "mesa/dist/communicator.h"

namespace mesa {

/// A bucket has about so many bytes, more where one parameter has, and not so few that it costs a collective for nothing. The last bucket,
/// which nothing hides any more, stays small: a ViT's embedding, up to the base size.
inline constexpr int64_t kBucketBytes = int64_t{8} << 20, kLeastBucketBytes = int64_t{4} << 20, kLastBucketBytes = int64_t{3} << 20;

/// Buckets are stretches of the arena in which gradients lie in the reverse order of the layers, about that in which they become ready.
/// Gradients must have been allocated for a number of parts that `parts` divides; so much does the length of each bucket, too.
std::vector<ArenaRange> gradient_buckets(const std::deque<Param>& params, int64_t bucket_bytes = kBucketBytes, int64_t parts = 1);
/// The part of a rank of each of them.
std::vector<ArenaRange> parts_of(const std::vector<ArenaRange>& buckets, int64_t rank, int64_t ranks);

struct GradientSyncOptions {
  int64_t bucket_bytes = kBucketBytes;
  DType dtype = DType::f32;  ///< that gradients are added up in: bf16 moves half the bytes and keeps 8 bits of each rank's
  bool sharded = false;      ///< each rank needs its own part of the sums only, and the values lie in an arena as the gradients do
};

/// Sums gradients over ranks in place: buckets leave as they lie, so nothing is copied unless they leave in bf16. All ranks must train the
/// same parameters.
class GradientSync {
 public:
  /// After the gradients were allocated, and of a sharded one the values gathered.
  GradientSync(Communicator& communicator, std::deque<Param>& params, const GradientSyncOptions& options = {});
  /// Before a backward pass after which gradients are final.
  void begin();
  /// Nothing more will be added to this parameter's gradient: its bucket leaves once it is full.
  void ready(const Param& param);
  /// What has not left yet leaves; returns when all gradients are sums; of a sharded one, when own() of them are.
  void finish();
  /// Seconds that finish() has waited so far.
  double wait_seconds() const { return wait_seconds_; }
  int64_t buckets() const { return static_cast<int64_t>(buckets_.size()); }
  bool sharded() const { return options_.sharded; }
  /// This rank's parts, one of each bucket.
  std::vector<ArenaRange> own() const;

  /// Of a sharded one, after each rank has changed the values of its parts: all get the values of all.
  void share_values();
  /// Between two updates: the gradients' memory is what it works in. Puts parts, one of each bucket, of all ranks together, bucket by
  /// bucket: f(parameter, tensor of its shape, for the call only) for all parameters. What f throws comes out after the last bucket, so
  /// that ranks stay together.
  void gather(const std::vector<Tensor>& parts, const std::function<void(const Param&, const Tensor&)>& f);

 private:
  struct Bucket {
    ArenaRange range;
    Tensor gradients;  // the stretch of the arena
    Tensor sent;       // what the collective works on: the same, or its copy in bf16
    std::vector<const Param*> params = {};
    size_t missing = 0;
    bool left = false;
  };
  void announce(const Param& any);
  void leave(Bucket& bucket);
  void take_back(const Bucket& bucket);
  /// This rank's part of a stretch.
  Tensor own_part(const Tensor& stretch) const;

  Communicator& communicator_;
  std::deque<Param>& params_;
  GradientSyncOptions options_;
  std::vector<Bucket> buckets_;    // about in the order in which they become ready
  std::vector<size_t> bucket_of_;  // by place in `params_`
  double wait_seconds_ = 0;
};

}  // namespace mesa
