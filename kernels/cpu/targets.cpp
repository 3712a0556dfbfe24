// t = s / K + (1 - s) (share [k = label] + (1 - share) [k = partner's label]);  loss = 1/K sum_k log(1 + exp x_k) - t_k x_k;  argmax.
#include "cpu.h"
#include "mesa/kernels/loss.h"

namespace mesa::kernels::MESA_ISA {

void mixed_targets(const Tensor& labels, const Tensor& mixing, double smoothing, double threshold, const Tensor& targets) {
  check_targets(labels, mixing, targets);
  const int64_t batch = targets.dim(0), classes = targets.dim(1);
  const int64_t* label = labels.data<int64_t>();
  const auto* mixed = mixing.defined() ? reinterpret_cast<const Mixing*>(mixing.data<float>()) : nullptr;
  dispatch_wide(targets.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T* t = targets.data<T>();
    for (int64_t b = 0; b < batch; ++b, t += classes) {
      std::fill(t, t + classes, static_cast<T>(smoothing / static_cast<double>(classes)));
      const double share = mixed != nullptr ? mixed[b].share : 1;
      t[label[b]] += static_cast<T>((1 - smoothing) * share);
      if (mixed != nullptr) t[label[Mixing::partner(b)]] += static_cast<T>((1 - smoothing) * (1 - share));
      if (threshold >= 0)
        for (int64_t k = 0; k < classes; ++k) t[k] = t[k] > static_cast<T>(threshold) ? T(1) : T(0);
    }
  });
}

void binary_cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "binary_cross_entropy");
  const int64_t classes = logits.dim(1);
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> x = rows_of<T>(logits), t = rows_of<T>(targets);
    T* out = loss.data<T>();
    parallel_rows(logits.dim(0), classes * 8, [=](int64_t begin, int64_t end) {  // a logarithm is the work of several elements
      for (int64_t b = begin; b < end; ++b) {
        double sum = 0;
        for (int64_t k = 0; k < classes; ++k) sum += scalar::binary_cross_entropy(x[b][k], t[b][k]);
        out[b] = static_cast<T>(sum / static_cast<double>(classes));
      }
    });
  });
}

void binary_cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "binary_cross_entropy_grad");
  const int64_t classes = logits.dim(1);
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> x = rows_of<T>(logits), t = rows_of<T>(targets), dx = rows_of<T>(dlogits);
    const T upstream = static_cast<T>(static_cast<double>(*dloss.data<T>()) / static_cast<double>(logits.numel()));
    parallel_rows(logits.dim(0), classes, [=](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T *from = x[b], *target = t[b];
        T* to = dx[b];
#pragma omp simd
        for (int64_t k = 0; k < classes; ++k) to[k] = upstream * scalar::binary_cross_entropy_slope(from[k], target[k]);
      }
    });
  });
}

void argmax(const Tensor& x, const Tensor& labels) {
  check_argmax(x, labels);
  dispatch_wide(x.dtype(), [&](auto tag) {
    const auto rows = rows_of<decltype(tag)>(x);
    for (int64_t b = 0; b < x.dim(0); ++b) {
      const auto *row = rows[b], *end = row + x.dim(1), *nan = std::find_if(row, end, [](auto v) { return v != v; });
      labels.data<int64_t>()[b] = (nan != end ? nan : std::max_element(row, end)) - row;
    }
  });
}

}  // namespace mesa::kernels::MESA_ISA
