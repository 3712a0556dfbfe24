// The path of names from the model down to the op at work: names sites, parameters and error messages.
#pragma once
#include <cstdint>
#include <string>

namespace mesa {

/// RAII: appends one component ("blocks.3", "attn") to this thread's scope path. An empty name adds nothing. `heads` > 0 also tells the
/// ops inside how many attention heads the layer has: head-wise storage groups follow it.
class Scope {
 public:
  explicit Scope(const std::string& name, int64_t heads = 0);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  /// "blocks.3.attn", or "" outside every scope.
  static const std::string& path();
  /// The path with one more component, joined by a dot.
  static std::string join(const std::string& name);
  /// Attention heads of the innermost scope that names them; 1 outside.
  static int64_t heads();

 private:
  size_t restore_;
  int64_t restore_heads_;
};

}  // namespace mesa
