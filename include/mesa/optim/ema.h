// A moving average of the weights.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"

namespace mesa {

struct EmaConfig {
  double decay = 0.9999;
  bool warmup = false;  ///< begin with smaller decays
};

/// timm's ModelEmaV3: average <- d average + (1 - d) value after each update of the weights. Update t (from 1) has d = 0 for t = 1, so that
/// the average begins with the first weights that were trained, then `decay`, or with warm-up min(decay, 1 - t^(-2/3)).
/// What is not trained (frozen parameters, running statistics) is not averaged: its present value stands for it and takes no memory. timm
/// averages running statistics, too.
class Ema {
 public:
  /// Begins with the present values of the parameters, which must outlive it. The averages are memory of the kind `optimizer`.
  Ema(std::deque<Param>& params, const EmaConfig& config);
  /// After each update of the weights.
  void update();
  int64_t updates() const { return updates_; }
  double decay_of(int64_t update) const;

  /// The averages by the names of their parameters, those of what is not trained too.
  std::map<std::string, Tensor> state() const;
  /// Throws Error naming the first tensor that is missing or has another shape.
  void load_state(const std::map<std::string, Tensor>& state, int64_t updates);
  /// Begins anew from the present values.
  void restart();

  /// While it lives, the parameters hold the averages, and the bf16 copies are made of them. Only for reading: no update may happen.
  class Use {
   public:
    explicit Use(Ema& ema) : ema_(ema) { ema_.exchange(); }
    ~Use() { ema_.exchange(); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Ema& ema_;
  };

 private:
  /// Only handles change places, which cannot fail.
  void exchange() noexcept;

  struct Slot {
    Param* param;
    Tensor average;  // undefined for what is not trained
  };
  EmaConfig config_;
  std::vector<Slot> slots_;
  int64_t updates_ = 0;
};

}  // namespace mesa
