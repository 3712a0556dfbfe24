// Low-rank adaptation of linears: Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022 (arXiv:2106.09685), section 4.
#pragma once
#include <set>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"

namespace mesa {

class ParamStore;

/// Which linears get factors, and of what kind; as Hugging Face PEFT's LoraConfig.
struct LoraOptions {
  int64_t rank = 0;  ///< 0: no linear has any
  double alpha = 1;
  double dropout = 0;                ///< of what the factors read
  std::vector<std::string> targets;  ///< globs of the paths of linears: "blocks.*.attn.qkv"

  /// What the product of the factors is multiplied by.
  double factor() const { return alpha / static_cast<double>(rank); }
  bool hits(const std::string& path) const;
};

/// The two factors beside a linear, whose weight [out, in] then acts as w + factor b a.
struct Lora {
  Param* a = nullptr;  ///< [rank, in], named <path>.lora_A.weight
  Param* b = nullptr;  ///< [out, rank], named <path>.lora_B.weight; begins as zeros, so that the linear begins as it was
  double factor = 1, dropout = 0;
};

/// y [.., O] + gamma * (factor dropout(x) a^T b^T) with x [.., I], a [r, I], b [O, r], gamma [O] (LayerScale) or undefined, in y's dtype.
/// Sites lora_A:x, which is x itself (and rebuilt as x is) unless dropout changes it, and lora_B:x, [.., r].
Var add_lora(const Var& y, const Var& x, const Var& a, const Var& b, double factor, double drop = 0, const Var& gamma = {});

/// True of "<path>.lora_A.weight" and "<path>.lora_B.weight".
bool is_lora_factor(const std::string& parameter);
/// "blocks.0.attn.qkv" of any of its parameters' names, its factors' too.
std::string linear_of(const std::string& parameter);
/// The paths of the linears that have factors.
std::set<std::string> adapted_linears(const ParamStore& params);

}  // namespace mesa
