// What a model takes each picture of a test set for.
#pragma once
#include <string>
#include <vector>

#include "mesa/train/evaluate.h"

namespace mesa {

/// Notes during an evaluation the best classes of each picture and their probabilities (softmax of the logits), by its number in the test
/// set, so that ranks that evaluate parts add their notes up.
class BestClasses {
 public:
  static constexpr int64_t kMost = 5;
  BestClasses(int64_t pictures, int64_t classes);
  /// logits: f32 [B, K] on the CPU. Of equal logits the one of the lower class is better; NaN is never among the best.
  void take(const Batch& batch, const Tensor& logits);
  /// Of all ranks (a collective where `add_up` is one).
  void finish(const AddUp& add_up = {});
  /// A row for each picture that was not left out: picture,truth,truth_name, then top1,top1_name,top1_probability and so on up to
  /// min(5, K); empty where all other logits are NaN. `names`: of the classes; those beyond them are called by their numbers.
  std::string csv(const Dataset& test, const std::vector<std::string>& names) const;

 private:
  int64_t classes_, best_;
  std::vector<double> notes_;  // of each picture: 1 + label, then pairs of 1 + class and probability; 0: left out, or another rank's
};

}  // namespace mesa
