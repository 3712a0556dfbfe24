#include "gradients.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var add(const Var& a, const Var& b) {
  const Op op("add", {a, b});
  check(a.shape() == b.shape(), "cannot add ", a.shape(), " and ", b.shape());
  const Tensor y = empty_like(a.value());
  kernels::add(a.value(), b.value(), y);
  const auto formula = [to_a = op.wants(a), to_b = op.wants(b)](const Tensor& dy, const Extras& extras) -> Grads {
    return {to_a ? dy : Tensor(), to_b ? extras.dy : Tensor()};
  };
  return op.record(y, formula, {.products = op.wants(b) ? std::optional(b.dtype()) : std::nullopt});
}

Var mul(const Var& a, const Var& b) {
  const Op op("mul", {a, b});
  check(a.shape() == b.shape(), "cannot multiply ", a.shape(), " and ", b.shape(), " elementwise");
  const Tensor y = empty_like(a.value());
  kernels::mul(a.value(), b.value(), y);
  const Saved sa = op.wants(b) ? op.save("a", a) : Saved(), sb = op.wants(a) ? op.save("b", b) : Saved();
  return op.record(y, [sa, sb, da = op.gradient(a), db = op.gradient(b)](const Tensor& dy) -> Grads {
    const auto product = [&dy](const Saved& other) {
      return [&dy, other](const Tensor& out, bool accumulate) {
        const Tensor term = accumulate ? empty_like(out) : out;
        kernels::mul(dy, other.get(), term);
        if (accumulate) kernels::add(out, term, out);
      };
    };
    return {da.into(product(sb)), db.into(product(sa))};
  });
}

Var scale(const Var& x, double s) {
  const Op op("scale", {x});
  const Tensor y = empty_like(x.value());
  kernels::scale(x.value(), s, y);
  return op.record(y, [s](const Tensor& dy) -> Grads {
    const Tensor dx = empty_like(dy);
    kernels::scale(dy, s, dx);
    return {dx};
  });
}

Var bias(const Var& x, const Var& b) {
  const Op op("bias", {x, b});
  const int64_t n = b.value().numel();
  bool fits = n > 0 && b.value().rank() > 0 && b.value().rank() <= x.value().rank();
  bool leading = true;  // extents of 1 in front of those that must equal x's last ones
  for (int i = 0; fits && i < b.value().rank(); ++i) {
    leading = leading && b.dim(i) == 1;
    fits = leading || b.dim(i) == x.dim(i - b.value().rank());
  }
  check(fits, "cannot add ", b.shape(), " to the rows of ", x.shape());
  const Tensor y = empty_like(x.value());
  kernels::add_rows(x.value(), b.value(), y);
  return op.record(y, [n, to_x = op.wants(x), db = op.gradient(b)](const Tensor& dy) -> Grads {
    return {to_x ? dy : Tensor(),
            db.into([&](const Tensor& out, bool accumulate) { kernels::sum_rows(dy, out.reshape({n}), accumulate); })};
  });
}

}  // namespace mesa
