// loss = lse(x) - sum_k t_k x_k for targets t that sum to 1;  dx = dloss / B (softmax(x) - t);  the mean over a batch.
#include <cmath>

#include "mesa/kernels/loss.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

/// What a row's softmax needs: probabilities are e[k] / sum, log sum exp is top + log(sum).
struct RowSum {
  double top, sum;
  double log_sum_exp() const { return top + std::log(sum); }
};
template <class T>
RowSum exponentiate(const T* x, int64_t classes, T* e) {
  const T top = max_of(x, classes);
  return {static_cast<double>(top), static_cast<double>(exponentials(x, classes, T(1), top, e))};
}

/// sum_k (lse - x[k]) and sum_k t[k] (lse - x[k]).
template <class T>
double sum_of_gaps(const T* x, int64_t classes, double lse) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < classes; ++k) sum += lse - x[k];
  return sum;
}
template <class T>
double sum_of_gaps(const T* x, const T* t, int64_t classes, double lse) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < classes; ++k) sum += t[k] * (lse - x[k]);
  return sum;
}

template <class T>
double sum_of(const T* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

/// f(b, x, e) for each row x of logits with room e for its exponentials.
template <class T, class F>
void for_logits(const Tensor& logits, const F& f) {
  const int64_t classes = logits.dim(1);
  const Rows<T> rows = rows_of<T>(logits);
  parallel_rows(logits.dim(0), classes, [&](int64_t begin, int64_t end) {
    std::vector<T> spare(classes);
    for (int64_t b = begin; b < end; ++b) f(b, static_cast<const T*>(rows[b]), spare.data());
  });
}

}  // namespace

void cross_entropy(const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& loss) {
  check_logits(logits, "cross_entropy");
  check_labels(labels, logits.dim(0));
  check(loss.is_contiguous() && loss.numel() == logits.dim(0), "cross_entropy: loss has ", loss.numel(), " elements");
  const int64_t classes = logits.dim(1);
  const int64_t* label = labels.data<int64_t>();
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T* out = loss.data<T>();
    for_logits<T>(logits, [=](int64_t b, const T* x, T* e) {
      const double lse = exponentiate(x, classes, e).log_sum_exp();
      // Without smoothing a class of probability 0 costs nothing, though its gap is infinite.
      const double spread = smoothing > 0 ? smoothing / static_cast<double>(classes) * sum_of_gaps(x, classes, lse) : 0.0;
      out[b] = static_cast<T>((1 - smoothing) * (lse - x[label[b]]) + spread);
    });
  });
}

void cross_entropy_soft(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "cross_entropy_soft");
  const int64_t classes = logits.dim(1);
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> target = rows_of<T>(targets);
    T* out = loss.data<T>();
    for_logits<T>(logits, [=](int64_t b, const T* x, T* e) {
      const double lse = exponentiate(x, classes, e).log_sum_exp();
      out[b] = static_cast<T>(sum_of_gaps(x, target[b], classes, lse));
    });
  });
}

void cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& dlogits) {
  check_logits(logits, "cross_entropy_grad");
  check_labels(labels, logits.dim(0));
  check(dlogits.shape() == logits.shape(), "cross_entropy_grad: tensors of shapes ", logits.shape(), " and ", dlogits.shape());
  const int64_t classes = logits.dim(1);
  const int64_t* label = labels.data<int64_t>();
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> out = rows_of<T>(dlogits);
    const T upstream = static_cast<T>(static_cast<double>(*dloss.data<T>()) / static_cast<double>(logits.dim(0)));
    const T spread = static_cast<T>(smoothing / static_cast<double>(classes)), hit = static_cast<T>(1 - smoothing);
    for_logits<T>(logits, [=](int64_t b, const T* x, T* e) {
      const int64_t at = label[b];
      const T inverse = static_cast<T>(1 / exponentiate(x, classes, e).sum);
      T* dx = out[b];
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) dx[k] = upstream * (e[k] * inverse - spread);
      dx[at] = upstream * ((e[at] * inverse - spread) - hit);
    });
  });
}

void cross_entropy_soft_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "cross_entropy_soft_grad");
  const int64_t classes = logits.dim(1);
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> target = rows_of<T>(targets), out = rows_of<T>(dlogits);
    const T upstream = static_cast<T>(static_cast<double>(*dloss.data<T>()) / static_cast<double>(logits.dim(0)));
    for_logits<T>(logits, [=](int64_t b, const T* x, T* e) {
      const T inverse = static_cast<T>(1 / exponentiate(x, classes, e).sum);
      const T* t = target[b];
      T* dx = out[b];
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) dx[k] = upstream * (e[k] * inverse - t[k]);
    });
  });
}

void mean_all(const Tensor& x, const Tensor& y) {
  check_flat(x, "mean_all: x");
  check(x.numel() > 0 && y.numel() == 1, "mean_all: tensors of shapes ", x.shape(), " and ", y.shape());
  constexpr int64_t kChunk = 8192;
  std::vector<double> partial((x.numel() + kChunk - 1) / kChunk);
  dispatch_wide(x.dtype(), [&](auto tag) {
    const auto* px = x.data<decltype(tag)>();
    double* sums = partial.data();
    parallel_chunks(x.numel(), kChunk, 1, [=](int64_t c, int64_t begin, int64_t end) { sums[c] = sum_of(px + begin, end - begin); });
  });
  double total = 0;
  for (double sum : partial) total += sum;
  dispatch_wide(y.dtype(), [&](auto tag) {
    *y.data<decltype(tag)>() = static_cast<decltype(tag)>(total / static_cast<double>(x.numel()));
  });
}

}  // namespace mesa::kernels::MESA_ISA
