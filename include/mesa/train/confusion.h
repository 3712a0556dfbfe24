// Which classes an evaluation takes for which: counts that several ranks add up exactly, a table of classes, and a picture.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "mesa/data/image.h"
#include "mesa/train/evaluate.h"

namespace mesa {

/// One class of a test set. Shares are percent, NaN where there is nothing to divide by.
struct ClassRow {
  int64_t label = 0;
  std::string name;
  int64_t images = 0;
  int64_t hits = 0, hits5 = 0;  ///< of its images: right, and right among the best min(5, K)
  int64_t predicted = 0;        ///< images of any class that are taken for it
  int64_t confused_with = -1;   ///< the other class that its images are most often taken for (the first of equals), or -1
  int64_t confused = 0;         ///< how often
  double top1() const;          ///< also called the recall of the class
  double top5() const;
  double precision() const;  ///< hits of what is predicted
};

/// Images of class `truth` that are taken for class `predicted`; -1: for none, as all their logits are NaN.
struct ConfusionCell {
  int64_t truth = 0, predicted = 0, images = 0;
};

class Confusion {
 public:
  /// `classes`: of the model; classes beyond `names` are called by their numbers.
  explicit Confusion(int64_t classes = 0, std::vector<std::string> names = {});
  /// Throws Error for classes that there are not, and for fewer than 0 images.
  void add(const ConfusionCell& cell);
  void add_hits5(int64_t truth, int64_t images);

  int64_t classes() const { return static_cast<int64_t>(hits5_.size()); }
  int64_t images() const { return images_; }
  std::string name(int64_t label) const;
  /// Those with images, by truth, then by prediction.
  std::vector<ConfusionCell> cells() const;
  /// One row a class, those without images included.
  std::vector<ClassRow> rows() const;
  /// The `most` cells of wrong predictions with the most images.
  std::vector<ConfusionCell> most_confused(size_t most) const;
  /// Mean of top1() over the classes that have images; NaN if none has. It weighs rare classes like frequent ones.
  double mean_top1() const;

 private:
  std::map<std::pair<int64_t, int64_t>, int64_t> cells_;
  std::vector<int64_t> hits5_;
  std::vector<std::string> names_;
  int64_t images_ = 0;
};

/// Notes during an evaluation what is predicted for each picture, by its number in the test set: ranks that evaluate parts add their notes
/// up without an error, whatever the number of classes (8 bytes a picture).
class Predictions {
 public:
  Predictions(int64_t pictures, int64_t classes, std::vector<std::string> names);
  /// logits: f32 [B, K] on the CPU.
  void take(const Batch& batch, const Tensor& logits);
  /// The counts of all ranks (a collective where `add_up` is one); the notes are empty then.
  Confusion finish(const AddUp& add_up = {});

 private:
  int64_t classes_;
  std::vector<std::string> names_;
  std::vector<double> notes_;
};

/// The table of classes: class,name,images,top1,top5,precision,predicted,confused_with,confused_with_name,confused.
std::string classes_csv(const Confusion& confusion);
/// The cells: truth,truth_name,predicted,predicted_name,images.
std::string confusion_csv(const Confusion& confusion);
/// All of it, for read_confusion. `epoch` counts from 1.
std::string confusion_json(const Confusion& confusion, int64_t epoch);
/// Throws Error naming the file where it is damaged.
Confusion read_confusion(const std::string& path);

/// The picture: rows are truths, columns predictions, each row is divided by its images, and a cell is as dark as the root of its share, so
/// that rare confusions can be seen. Axes have the numbers of classes, and up to 20 classes each cell its percentage. Of more than 1,000
/// classes several neighbours share a row and a column. Rows of classes without images are grey.
Image draw_confusion(const Confusion& confusion);

}  // namespace mesa
