// Batches in an order that depends on the seed alone, decoded and augmented ahead of time by helper threads.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mesa/data/dataset.h"
#include "mesa/data/mix.h"
#include "mesa/data/stages.h"
#include "mesa/data/transform.h"
#include "mesa/tensor/tensor.h"

namespace mesa {

/// What to do about a picture that cannot be decoded: stop, or put the next good one (index + 1, ...) in its place.
enum class OnBadSample : uint8_t { error, skip };
/// "error" or "skip"; anything else throws Error naming `key`.
OnBadSample parse_on_bad_sample(const std::string& text, const std::string& key);

struct LoaderOptions {
  int64_t batch_size = 64;  ///< pictures of this rank in a batch
  int64_t workers = 0;      ///< helper threads; 0 takes one for every four processors, at least one
  int64_t prefetch = 4;     ///< batches in preparation or waiting
  uint64_t seed = 0;
  bool train = true;  ///< random augmentation; false is the fixed evaluation transform
  bool shuffle = true;
  bool drop_last = true;  ///< leave out the last batch where it is not full
  /// Repeated augmentation (Hoffer et al., "Augment Your Batch", CVPR 2020; as in DeiT): each picture comes this many times, close
  /// together and each time augmented anew, and an epoch, of as many pictures as ever, goes through the first 1 / repeats of the order.
  int64_t repeats = 1;
  OnBadSample on_bad_sample = OnBadSample::error;
  bool pinned = false;  ///< batches in memory that a GPU reads directly
  MixOptions mix{};     ///< of training batches, which must then be even
  /// A global batch has batch_size * world_size pictures; rank r takes the r-th batch_size of it. Without drop_last the last one may be
  /// smaller on some ranks, or empty.
  int64_t rank = 0, world_size = 1;

  /// For evaluation: in order, every picture once.
  static LoaderOptions evaluation(int64_t batch_size) {
    LoaderOptions options;
    options.batch_size = batch_size;
    options.train = options.shuffle = options.drop_last = false;
    return options;
  }
};

struct Batch {
  Tensor images;    ///< u8 [B, H, W, C]
  Tensor labels;    ///< i64 [B]
  Tensor mirrored;  ///< u8 [B]: not 0 for pictures that whoever reads them is to read from right to left; undefined if none is
  Tensor mixing;    ///< f32 [B, 6], rows of Mixing, for whoever reads the pictures to follow; undefined without mixup and CutMix
  int64_t epoch = 0, index = 0;
  std::vector<int64_t> sample_indices;  ///< of the pictures that are there, replacements included
  std::vector<int64_t> replaced;        ///< positions in the batch that hold another picture because theirs is damaged
};

/// Used from one thread. Order, augmentation and replacements depend on (data set, options.seed, epoch) and not on `workers` or `prefetch`.
/// All memory is taken at construction; a batch's tensors are filled anew once the caller has let go of them.
class Loader {
 public:
  /// Throws Error for options out of range and for a batch larger than the data set.
  Loader(std::shared_ptr<const Dataset> dataset, const TransformOptions& transform, const LoaderOptions& options);
  /// Ends the threads after the pictures in their hands, also in mid-epoch.
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Begins an epoch at batch `first_batch`; the batches before it cost nothing (a resumed run continues in mid-epoch).
  void start_epoch(int64_t epoch, int64_t first_batch = 0);
  /// The next batch, or nothing at the epoch's end. Rethrows what went wrong in a helper thread: Error naming the file; with
  /// OnBadSample::skip only after 20 bad samples in a row.
  std::optional<Batch> next();

  const Dataset& dataset() const;
  int64_t batches_per_epoch() const;
  /// How long next() has waited for data so far.
  double wait_seconds() const;
  /// What the helper threads have spent so far, all together.
  StageTimes stage_times() const;
  int64_t workers() const;
  /// How many samples of the delivered batches were replaced, and, once each and in order of first appearance, which and why.
  int64_t skipped() const;
  const std::vector<std::string>& skipped_samples() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mesa
