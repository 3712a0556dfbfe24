// Reverse-mode differentiation: ops record how to go back, backward() walks the record and destroys it step by step.
#pragma once
#include <functional>
#include <optional>
#include <unordered_map>

#include "mesa/autograd/var.h"
#include "mesa/storage/policy.h"

namespace mesa {

/// One gradient for each input of an op, in order; undefined where none is needed or where Target wrote it in place.
using Grads = std::vector<Tensor>;
using Backward = std::function<Grads(const std::vector<Tensor>& dy)>;

/// How a formula wants a gradient: in this dtype, and each sample (axis 0) times its factor where there are any, [dim 0] f32 (f64 for f64).
struct GradientForm {
  GradientForm(DType of, Tensor times = {}) : dtype(of), factors(std::move(times)) {}
  DType dtype;
  Tensor factors;
};

/// What the tape hands to a formula besides dy, where the op's Abilities offer to make use of it.
struct Extras {
  Tensor dy;            ///< dy in the form Abilities::products
  Tensor sum;           ///< what dx, the first input's gradient, is to be added to, in place, and returned; undefined: there is nothing yet
  Tensor dx_copy;       ///< where dx, or that sum, in f32, is wanted in bf16, too; undefined: nowhere
  Tensor copy_factors;  ///< what the samples (axis 0) of that copy are multiplied by, at least two axes of them; undefined: nothing
  Tensor* y = nullptr;  ///< receives the op's result, where that is wanted again
  Tensor dy_sums;       ///< [any number, dy's last axis] f32: rows that add up to the sum of those of Extras::dy, if whoever made that has
                        ///< them
  Tensor* dx_sums = nullptr;  ///< receives such rows of dx, or of dx_copy where that is wanted, if the op can make them beside it; null:
                              ///< nobody wants them
};

/// What an op can do on its way back to spare passes over memory.
struct Abilities {
  /// Its formula wants dy in this form. Whoever makes dy may write both.
  std::optional<GradientForm> products = {};
  /// Its formulas make use of Extras::dy_sums, for the gradient of a bias.
  bool sums = false;
  /// It adds to the first input's gradient, as behind a residual connection, where that of the other branch is there already; and writes
  /// it once more where Extras::dx_copy asks for that, times Extras::copy_factors.
  bool adds = false;
  /// It can rebuild its result beside its gradient. This rebuilds the result alone; it holds Saved handles and parameters only.
  std::function<void(const Tensor& y)> rebuild = {};
  /// The gradients that need `value`, the first input's, in a formula of their own: where the op that made it rebuilds it in that way, they
  /// wait for this. They are of parameters, or written through a Target: what an op made may have gone back by then. Without `value` they
  /// do not wait.
  Saved value = {};
  std::function<Grads(const Extras& extras)> of_value = {};
};

/// RAII: the current tape of this thread. It holds gradient slots and Saved, never a Var: a tape of Vars would pin every exact activation.
class Tape {
 public:
  /// Random numbers of dropout, drop path and stochastic rounding come from (seed, step) and the site.
  /// `live_step`: see RandomKey. `part`: which of several ranks' equal parts of a batch this pass takes; dropout and drop path draw what
  /// one rank with the whole batch would.
  explicit Tape(StoragePolicy& policy, uint64_t seed = 0, uint64_t step = 0, const uint64_t* live_step = nullptr, uint64_t part = 0);
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  static Tape* current();

  /// Gradients of `loss` (one element) into every trainable parameter. `ready` is called once for each parameter, as soon as nothing more
  /// will be added to its gradient. Once only: the tape is consumed. `scale` multiplies the loss (1 / accumulated steps).
  void backward(const Var& loss, const std::function<void(Param&)>& ready = {}, double scale = 1.0);
  /// The same from given gradients of several outputs (Jacobian-vector product).
  void backward(const std::vector<Var>& outputs, const std::vector<Tensor>& gradients, const std::function<void(Param&)>& ready = {});

  StoragePolicy& policy() { return policy_; }
  /// For `elements` numbers, those of one sample behind those of the other. `at_once`: how many the kernel draws together; where parts do
  /// not begin at a multiple of it, each part has numbers of its own.
  RandomKey random(const std::string& stream, int64_t elements, int64_t at_once) const;
  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }

  /// Called with every op's result and each gradient that a backward formula made, with its name ("blocks.3.mlp.fc1.linear", "gradient of
  /// ..."). Slow: for finding a culprit. It may change an op's result in place, as storing it with fewer bits would, and, where nothing is
  /// rebuilt, a gradient.
  using Inspection = std::function<void(const Tensor& value, const std::string& name)>;
  void inspect(Inspection inspection) { inspection_ = std::move(inspection); }
  /// Checks all these for NaN and infinity; the first bad one is named by first_bad().
  void check_finite();
  const std::string& first_bad() const { return first_bad_; }

 private:
  friend class Op;
  struct Step {
    std::string path;  // scope and op, for errors
    std::vector<int> outputs;
    std::vector<int> inputs;     // -1: no gradient wanted
    std::vector<Param*> params;  // same length; null where the input is no parameter
    Backward backward;
    std::shared_ptr<Extras> extras;  // where the formula finds them; null: it takes none
    std::optional<GradientForm> products;
    bool adds = false;
    DType dtype_x = DType::f32;     // of the first input
    std::shared_ptr<Tensor> again;  // the result, once the formula has rebuilt it
    Tensor sums;                    // where the formula leaves those of the first input's gradient
    std::vector<Step> waiting;      // for that
  };
  /// The gradient of one value.
  struct Slot {
    Tensor gradient, copy, sums;           // copy: in the form `products`, where whoever made it wrote both; sums: of its rows
    std::optional<GradientForm> products;  // that its op wants
    bool wants_sums = false;               // its op
  };

  void run(const std::function<void(Param&)>& ready);
  void run_step(Step step, const std::function<void(Param&)>& ready);
  /// The gradients of a step, put where they belong.
  void go_back(Step& step, std::vector<Tensor> dy, Tensor copy, Tensor sums);
  /// Fills in what the formula takes besides dy; `copy`: dy in the form that it wants, or undefined.
  void offer(Step& step, const Tensor& dy, const Tensor& copy);
  /// dy in that form, by a pass of its own where it has another.
  Tensor in_form(const GradientForm& form, const Tensor& dy);
  /// For a gradient in another dtype: the room of the one before, if that is free again. It lives from block to block, and would
  /// lie somewhere among the tensors of one block if each block took its own.
  Tensor room_for_copy(const Tensor& dy, DType dtype);
  void accumulate(int slot, Tensor gradient);

  StoragePolicy& policy_;
  uint64_t id_, seed_, step_, part_;
  const uint64_t* live_step_;
  std::vector<Step> steps_;
  std::vector<Slot> slots_;
  Tensor room_;  // see room_for_copy
  std::unordered_map<Param*, int> uses_;
  bool run_ = false;
  Inspection inspection_;
  std::string first_bad_;
  Tape* previous_;
};

/// True if nobody else holds the memory of a contiguous gradient: a formula may then write its result there.
bool may_overwrite(const Tensor& gradient);

/// Where the gradient of one input goes: straight into a parameter's gradient, or into a fresh tensor.
class Target {
 public:
  Target() = default;
  /// Calls write(destination, accumulate) and returns what belongs in Grads. Does nothing if the input wants no gradient.
  Tensor into(const std::function<void(const Tensor& out, bool accumulate)>& write) const;
  bool wanted() const { return wanted_; }

 private:
  friend class Op;
  bool wanted_ = false;
  Param* param_ = nullptr;
  Shape shape_;
  DType dtype_ = DType::f32;
  Device device_;
};

/// One differentiable operation while it is being recorded.
class Op {
 public:
  Op(const char* name, std::vector<Var> inputs);

  /// False in evaluation, or if no input wants a gradient: then nothing is kept.
  bool recording() const { return tape_ != nullptr; }
  /// Keeps a value for the backward pass as the storage policy says; the site is the scope path, or the path and `owner` when the op is no
  /// layer of its own. Undefined when not recording.
  Saved save(const char* slot, const Var& x) const;
  Saved save(const char* slot, const Tensor& x) const;
  /// What `save` would keep, for a kernel that packs the value as it computes or reads it; undefined where the policy wants it otherwise.
  SavedAhead open(const char* slot, const Shape& shape, DType dtype, Device device) const;
  SavedAhead open(const char* slot, const Tensor& x) const;
  /// True if the policy would keep the tensor's own buffer at this slot: then a view pins all of it.
  bool shares_input(const char* slot, DType dtype) const;
  /// Keeps a small exact statistic (rstd, log-sum-exp); returns it.
  Tensor keep(const char* slot, const Tensor& statistic) const;
  Target gradient(const Var& input) const;
  bool wants(const Var& x) const { return recording() && x.requires_grad(); }
  /// True if the op that made x makes use of the sums of its gradient's rows (Abilities::sums).
  bool wants_sums(const Var& x) const;

  Var record(const Tensor& y, std::function<Grads(const Tensor& dy)> backward) const;
  Var record(const Tensor& y, std::function<Grads(const Tensor& dy, const Extras& extras)> backward, Abilities abilities) const;
  std::vector<Var> record(const std::vector<Tensor>& ys, Backward backward) const;

 private:
  Site site(const char* slot) const;

  const char* name_;
  std::vector<Var> inputs_;
  Tape* tape_;
};

}  // namespace mesa
