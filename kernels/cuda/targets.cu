// t = s / K + (1 - s) (share [k = label] + (1 - share) [k = partner's label]);  loss = 1/K sum_k log(1 + exp x_k) - t_k x_k;  argmax.
// A block for each row, as for the other losses.
#include "mesa/kernels/loss.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

using Block = Team<1, 0>;
constexpr int kMostThreads = 1024;

template <class T>
struct MixedTargets {
  const int64_t* labels;
  const Mixing* mixing;
  T* targets;
  int64_t classes;
  double smoothing, threshold;

  __device__ void operator()(Block block, int64_t b) const {
    const int64_t own = labels[b], other = mixing != nullptr ? labels[Mixing::partner(b)] : own;
    const double share = mixing != nullptr ? mixing[b].share : 1;
    const T spread = static_cast<T>(smoothing / static_cast<double>(classes));
    const T mine = static_cast<T>((1 - smoothing) * share), theirs = static_cast<T>((1 - smoothing) * (1 - share));
    block.each(classes, [&](int, int64_t k) {
      T t = spread;
      if (k == own) t += mine;
      if (mixing != nullptr && k == other) t += theirs;
      targets[b * classes + k] = threshold < 0 ? t : t > static_cast<T>(threshold) ? T(1) : T(0);
    });
  }
};

template <class T>
struct BinaryLoss {
  Rows<T> logits, targets;
  T* loss;
  int64_t classes;

  __device__ void operator()(Block block, int64_t b) const {
    const T *x = row_at(logits, b), *t = row_at(targets, b);
    double sum = 0;
    block.each(classes, [&](int, int64_t k) { sum += scalar::binary_cross_entropy(x[k], t[k]); });
    sum = block.sum(sum);
    if (block.leads()) loss[b] = static_cast<T>(sum / static_cast<double>(classes));
  }
};

template <class T>
struct BinaryGrad {
  const T* dloss;
  Rows<T> logits, targets, dlogits;
  int64_t batch, classes;

  __device__ void operator()(Block block, int64_t b) const {
    const T *x = row_at(logits, b), *t = row_at(targets, b);
    T* dx = row_at(dlogits, b);
    const T upstream = static_cast<T>(static_cast<double>(*dloss) / static_cast<double>(batch * classes));
    block.each(classes, [&](int, int64_t k) { dx[k] = upstream * scalar::binary_cross_entropy_slope(x[k], t[k]); });
  }
};

template <class T>
struct Argmax {
  Rows<T> x;
  int64_t* labels;
  int64_t classes;

  __device__ void operator()(Block block, int64_t b) const {
    const T* row = row_at(x, b);
    T top = static_cast<T>(-INFINITY);
    int64_t nan = classes;
    block.each(classes, [&](int, int64_t k) {
      top = Max{}(row[k], top);  // passes over a NaN
      if (row[k] != row[k] && k < nan) nan = k;
    });
    top = block.reduce(top, Max{}, static_cast<T>(-INFINITY));
    nan = block.reduce(nan, Min{}, classes);
    int64_t first = classes;
    block.each(classes, [&](int, int64_t k) {
      if (row[k] == top && k < first) first = k;
    });
    first = block.reduce(first, Min{}, classes);
    if (block.leads()) labels[b] = nan < classes ? nan : first;
  }
};

template <class Kernel>
void run(const char* name, const Tensor& rows, const Kernel& kernel) {
  launch_teams<Block>(name, rows.dim(0), rows.dim(1), kernel, kMostThreads);
}

}  // namespace

void mixed_targets(const Tensor& labels, const Tensor& mixing, double smoothing, double threshold, const Tensor& targets) {
  check_targets(labels, mixing, targets);
  const auto* mixed = mixing.defined() ? reinterpret_cast<const Mixing*>(mixing.data<float>()) : nullptr;
  dispatch_wide(targets.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("mixed_targets", targets,
        MixedTargets<T>{labels.data<int64_t>(), mixed, targets.data<T>(), targets.dim(1), smoothing, threshold});
  });
}

void binary_cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "binary_cross_entropy");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("binary_cross_entropy", logits, BinaryLoss<T>{rows_of<T>(logits), rows_of<T>(targets), loss.data<T>(), logits.dim(1)});
  });
}

void binary_cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "binary_cross_entropy_grad");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("binary_cross_entropy_grad", logits,
        BinaryGrad<T>{dloss.data<T>(), rows_of<T>(logits), rows_of<T>(targets), rows_of<T>(dlogits), logits.dim(0), logits.dim(1)});
  });
}

void argmax(const Tensor& x, const Tensor& labels) {
  check_argmax(x, labels);
  dispatch_wide(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("argmax", x, Argmax<T>{rows_of<T>(x), labels.data<int64_t>(), x.dim(1)});
  });
}

}  // namespace mesa::kernels::cuda
