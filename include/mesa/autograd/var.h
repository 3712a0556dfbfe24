// Values that a tape can differentiate: parameters (leaves) and the results of ops.
#pragma once
#include <memory>
#include <string>

#include "mesa/storage/saved.h"

namespace mesa {

/// A trainable tensor with its gradient. Master values are f32 (f64 in gradient checks).
struct Param {
  std::string name;  ///< timm's name, the scope path it was made under: "blocks.0.attn.qkv.weight"
  Tensor value;
  Tensor grad;  ///< same shape and dtype; allocated by the store or on first use
  bool trainable = true;
  bool decay = true;          ///< false for biases, norms, tokens and position embeddings
  double lr_scale = 1;        ///< share of the learning rate (layer-wise decay)
  bool grad_written = false;  ///< false: the next gradient overwrites instead of adding (saves a clearing pass)
  /// Rows of the last axis that belong to the places of a grid, behind `prefix` others: position embeddings and tables of biases, which
  /// another size of picture or window asks for resized. A height of 0: nothing of the kind.
  struct Grid {
    int64_t prefix = 0, height = 0, width = 0;
  } grid;

  /// The value in the dtype that matrix products run in: itself, or a bf16 copy that is refreshed when stale.
  Tensor as(DType dtype);
  /// Call after `value` changed; `copy_is_fresh` if the writer also wrote the bf16 copy.
  void touch(bool copy_is_fresh = false) { copy_stale_ = !copy_is_fresh; }
  /// The bf16 copy if one exists (the optimizer writes it in its own pass), else undefined.
  const Tensor& bf16_copy() const { return copy_; }

 private:
  Tensor copy_;
  bool copy_stale_ = true;
};

/// Elements [begin, end) of the arena in which the gradients of a model lie.
struct ArenaRange {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

/// A tensor and its place on the current tape. Holding a Var keeps its exact value alive; the tape itself never does.
class Var {
 public:
  Var() = default;
  Var(const Tensor& constant) : value_(constant) {}
  Var(Param& param);

  const Tensor& value() const { return value_; }
  const Shape& shape() const { return value_.shape(); }
  int64_t dim(int i) const { return value_.dim(i); }
  DType dtype() const { return value_.dtype(); }
  bool defined() const { return value_.defined(); }
  bool requires_grad() const { return slot_ >= 0 || (param_ != nullptr && param_->trainable); }
  Param* param() const { return param_; }
  const std::shared_ptr<const Recipe>& recipe() const { return recipe_; }
  /// The same value with a way to rebuild it in the backward pass, which must hold Saved handles and parameters only.
  Var with_recipe(Recipe recipe) const;
  /// The same value from an op that keeps nothing: where a storage rule rebuilds it, whoever needs it keeps it by the rule before that one.
  Var without_trace() const;
  bool leaves_trace() const { return leaves_trace_; }

 private:
  friend class Op;
  friend class Tape;
  Tensor value_;
  int slot_ = -1;      // gradient slot on the tape that recorded it
  uint64_t tape_ = 0;  // that tape's number
  Param* param_ = nullptr;
  std::shared_ptr<const Recipe> recipe_;
  bool leaves_trace_ = true;
};

}  // namespace mesa
