// Parameters: one ordered, named store that checkpoint, optimizer, weight-decay groups and broadcast all walk.
#pragma once
#include <deque>
#include <vector>

#include "mesa/autograd/var.h"

namespace mesa {

/// Owns the parameters of a model in the order they were made. Addresses are stable.
class ParamStore {
 public:
  Param& add(Param param);
  std::deque<Param>& params() { return params_; }
  const std::deque<Param>& params() const { return params_; }
  /// Throws Error naming the nearest name.
  Param& at(const std::string& name);
  int64_t count() const;  ///< elements of all parameters
  /// One flat gradient arena, last parameter first: gradients become ready from its front as backward goes on.
  void allocate_gradients();
  /// The next gradients overwrite.
  void clear_gradients();
  /// Freezes parameters whose name matches the glob; throws Error if none does.
  void freeze(const std::string& glob);
  /// Takes parameters whose name matches the glob out of weight decay; throws Error if none does.
  void spare_decay(const std::string& glob);

 private:
  /// Throws Error if there are none.
  std::vector<Param*> matching(const std::string& glob, const char* consequence);
  std::deque<Param> params_;
  Tensor arena_;
};

/// How a new parameter gets its first values.
struct Init {
  enum class Kind { constant, truncated_normal, normal, uniform } kind = Kind::constant;
  double value = 0;  ///< the constant, the standard deviation, or the bound of a symmetric uniform
  static Init zeros() { return {}; }
  static Init constant(double value) { return {Kind::constant, value}; }
  static Init ones() { return {Kind::constant, 1}; }
  /// Normal of this standard deviation, cut at +-2 as timm's trunc_normal_ does.
  static Init truncated_normal(double std) { return {Kind::truncated_normal, std}; }
  static Init normal(double std) { return {Kind::normal, std}; }
  static Init uniform(double bound) { return {Kind::uniform, bound}; }
};

/// Hands out parameters named by the scope path. Values depend on (seed, name) alone, not on the order.
class Builder {
 public:
  Builder(ParamStore& store, uint64_t seed, DType compute = DType::f32, DType master = DType::f32, Device device = kCpu)
      : store_(store), seed_(seed), compute_(compute), master_(master), device_(device) {}

  Param& param(const std::string& name, const Shape& shape, Init init, bool decay) const;
  /// The dtype that matrix products run in (bf16 in mixed precision); f32 masters and residuals stay as they are.
  DType compute() const { return compute_; }
  DType residual() const { return master_; }

 private:
  ParamStore& store_;
  uint64_t seed_;
  DType compute_, master_;
  Device device_;
};

}  // namespace mesa
