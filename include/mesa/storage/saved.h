// A handle on one kept activation: what a backward closure holds instead of the tensor.
#pragma once
#include "mesa/storage/codec.h"

namespace mesa {

/// How to compute a value again from what is saved already (gelu's output from its saved input).
struct Recipe {
  std::function<Tensor()> rebuild;
  /// The step of the tape in whose backward pass `rebuild` costs least, since its op makes the value beside its own gradient; -1: none.
  int beside = -1;

  Tensor operator()() const { return rebuild(); }
  /// That of f(value).
  Recipe then(std::function<Tensor(const Tensor&)> f) const {
    return {[rebuild = rebuild, f = std::move(f)] { return f(rebuild()); }, beside};
  }
};

class Saved {
 public:
  Saved() = default;
  bool defined() const { return entry_ != nullptr; }
  /// Decodes or rebuilds the activation: a fresh tensor, or the kept one itself for exact storage.
  Tensor get() const;
  /// What get() would decode, for a kernel that does so itself; empty for values kept in another form, or rebuilt.
  std::optional<kernels::Coded> coded() const;
  /// The same on a GPU only, whose kernels decode as they read where the CPU's caches make a decoded copy cheaper.
  std::optional<kernels::Coded> coded_on_gpu() const;
  /// The recipe of a rebuilt value; null for what is kept.
  std::shared_ptr<const Recipe> recipe() const { return entry_ ? entry_->recipe : nullptr; }
  /// How far get() may be from what was saved, as a share of the range of a group: 0 for exact and rebuilt values, 1/255 for 8 bits.
  double error() const;

 private:
  friend class StoragePolicy;
  struct Entry {
    std::shared_ptr<Codec> codec;  // null: rebuilt by the recipe
    Packed packed;
    std::shared_ptr<const Recipe> recipe;
  };
  explicit Saved(std::shared_ptr<const Entry> entry) : entry_(std::move(entry)) {}
  std::shared_ptr<const Entry> entry_;
};

}  // namespace mesa
