// Parameters: one ordered, named store that checkpoint, optimizer, weight-decay groups and broadcast all walk.
#pragma once
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "mesa/nn/lora.h"

namespace mesa {

/// What belongs to a model beside its parameters and follows the data instead of a gradient: a batch norm's running statistics.
struct ModelBuffer {
  std::string name;  ///< timm's name: "layer1.0.bn1.running_mean"
  Tensor value;
};

/// Owns the parameters and buffers of a model in the order they were made. Addresses are stable.
class ParamStore {
 public:
  Param& add(Param param);
  ModelBuffer& add(ModelBuffer buffer);
  std::deque<Param>& params() { return params_; }
  const std::deque<Param>& params() const { return params_; }
  std::deque<ModelBuffer>& buffers() { return buffers_; }
  const std::deque<ModelBuffer>& buffers() const { return buffers_; }
  /// Throws Error naming the nearest name.
  Param& at(const std::string& name);
  int64_t count() const;  ///< elements of all parameters
  /// One flat gradient arena, last parameter first: gradients become ready from its front as backward goes on. Any run of neighbours can be
  /// cut into `parts` equal ones, each on a boundary of 16 bytes.
  void allocate_gradients(int64_t parts = 1);
  /// Moves the values of what is trained into one arena, in which each lies where its gradient will lie in theirs.
  void gather_values(int64_t parts);
  /// The next gradients overwrite.
  void clear_gradients();
  /// The buffers' values of now are what restore_buffers() returns to: an update that does not count leaves no trace in them.
  void remember_buffers();
  void restore_buffers();
  /// All of them, in one; undefined before they are remembered, or if there are none.
  const Tensor& buffer_arena() const { return buffer_arena_; }
  /// Freezes parameters whose name matches the glob; throws Error if none does.
  void freeze(const std::string& glob);
  /// Lets parameters whose name matches the glob learn; throws Error if none does.
  void thaw(const std::string& glob);
  /// Paths of the linears, in the order they were made.
  const std::vector<std::string>& linears() const { return linears_; }
  void add_linear(std::string path) { linears_.push_back(std::move(path)); }
  /// Takes parameters whose name matches the glob out of weight decay; throws Error if none does.
  void spare_decay(const std::string& glob);

 private:
  /// Throws Error if there are none.
  std::vector<Param*> matching(const std::string& glob, const char* consequence);
  void gather_buffers();
  /// Calls place(parameter, its offset) for all that are trained, in the arena's order; returns the arena's size in elements.
  int64_t lay_out(int64_t parts, const std::function<void(Param&, int64_t)>& place);

  std::deque<Param> params_;
  std::deque<ModelBuffer> buffers_;
  std::vector<std::string> linears_;
  Tensor buffer_arena_, remembered_;  // all buffers as one, so that remembering them is one copy
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
  Builder(ParamStore& store, uint64_t seed, DType compute = DType::f32, DType master = DType::f32, Device device = kCpu,
          LoraOptions lora = {})
      : store_(store), seed_(seed), compute_(compute), master_(master), device_(device), lora_(std::move(lora)) {}

  Param& param(const std::string& name, const Shape& shape, Init init, bool decay) const;
  /// The factors of the linear [out, in] whose scope this is, if LoRA targets it.
  std::optional<Lora> lora(int64_t in, int64_t out) const;
  /// Of the master dtype.
  ModelBuffer& buffer(const std::string& name, const Shape& shape, double value) const;
  /// The dtype that matrix products run in (bf16 in mixed precision); f32 masters and residuals stay as they are.
  DType compute() const { return compute_; }
  DType residual() const { return master_; }

 private:
  ParamStore& store_;
  uint64_t seed_;
  DType compute_, master_;
  Device device_;
  LoraOptions lora_;
};

}  // namespace mesa
