// train.autotune: the algorithms of products that a run chose, which it finds again when it is resumed.
#pragma once
#include <functional>
#include <map>
#include <string>

#include "mesa/train/config.h"

namespace mesa {

class ProductTuning {
 public:
  /// Turns tuning on, with the choices in `folder`, or else in that of the run that `checkpoint` is of ("": a fresh run), where they are of
  /// the same library and GPU. Each rank has its own; one that has none takes the leader's.
  ProductTuning(const std::string& folder, const std::string& checkpoint, int64_t rank, std::function<void(const std::string&)> warn);
  ~ProductTuning();
  ProductTuning(const ProductTuning&) = delete;
  ProductTuning& operator=(const ProductTuning&) = delete;

  /// Writes what was chosen since: before a checkpoint, which would go on with other last bits if its choices were missing.
  void keep();

 private:
  std::string path_;
  std::function<void(const std::string&)> warn_;
  std::map<std::string, std::string> kept_;  // that the file has
  bool warned_ = false;
};

}  // namespace mesa
