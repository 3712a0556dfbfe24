// Accuracy by reassessed labels: Beyer et al., "Are we done with ImageNet?", 2020 (arXiv:2006.07159).
#pragma once
#include <string>
#include <vector>

#include "mesa/train/evaluate.h"

namespace mesa {

struct RealResult {
  double top1 = 0, top5 = 0;  ///< percent of `images` whose best logit, or one of the best min(5, K), is one of their labels
  int64_t images = 0;
  int64_t unlabelled = 0;  ///< pictures with an empty list, which are left out
};

/// For each picture of a test set the classes that are right: none, one or several.
class RealLabels {
 public:
  /// `path`: JSON, either a list (real.json of google-research/reassessed-imagenet), whose entry i is for the picture with the name
  /// ILSVRC2012_val_<i + 1, eight digits>, as timm's RealLabelsImagenet has it; or an object from names to lists. A picture's name is what
  /// stands behind the last '/' or ": " of Dataset::describe; it is looked for with its folder ("n01440764/x.JPEG"), then alone, each with
  /// and without its ending. Throws Error naming the file, and the entry or the picture: for anything that is no list of classes below
  /// `classes`, for a picture without an entry, and for an entry that two pictures would share.
  RealLabels(const std::string& path, const Dataset& test, int64_t classes);

  /// logits: f32 [B, K] on the CPU. A row's order of classes is that of is_among_best.
  void take(const Batch& batch, const Tensor& logits);
  /// Of all ranks (a collective where `add_up` is one); counting begins anew.
  RealResult finish(const AddUp& add_up = {});

 private:
  std::vector<std::vector<int32_t>> labels_;  // by number of the picture
  double hits_ = 0, hits5_ = 0, images_ = 0, unlabelled_ = 0;
};

}  // namespace mesa
