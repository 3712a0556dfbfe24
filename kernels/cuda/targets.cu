// t = s / K + (1 - s) (share [k = label] + (1 - share) [k = partner's label]);  loss = 1/K sum_k log(1 + exp x_k) - t_k x_k;  argmax.
#include "mesa/kernels/loss.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

template <class T>
struct MixedTargets {
  const int64_t* labels;
  const Mixing* mixing;
  Rows<T> targets;
  int64_t classes;
  double smoothing, threshold;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    const int64_t own = labels[b], other = mixing != nullptr ? labels[Mixing::partner(b)] : own;
    const double share = mixing != nullptr ? mixing[b].share : 1;
    const T spread = static_cast<T>(smoothing / static_cast<double>(classes));
    const T mine = static_cast<T>((1 - smoothing) * share), theirs = static_cast<T>((1 - smoothing) * (1 - share));
    team.each(classes, [&](int, auto k) {
      T t[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        t[i] = spread;
        if (k + i == own) t[i] += mine;
        if (mixing != nullptr && k + i == other) t[i] += theirs;
        if (threshold >= 0) t[i] = t[i] > static_cast<T>(threshold) ? T(1) : T(0);
      }
      store_pack(row_at(targets, b) + k, t);
    });
  }
};

template <class T>
struct BinaryLoss {
  Rows<T> logits, targets;
  T* loss;
  int64_t classes;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes), t(row_at(targets, b), classes);
    double sum = 0;
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = x.at(p, k), (&target)[V] = t.at(p, k);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += scalar::binary_cross_entropy(v[i], target[i]);
    });
    sum = team.sum(sum);
    if (team.leads()) loss[b] = static_cast<T>(sum / static_cast<double>(classes));
  }
};

template <class T>
struct BinaryGrad {
  const T* dloss;
  Rows<T> logits, targets, dlogits;
  int64_t batch, classes;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes), t(row_at(targets, b), classes);
    const T upstream = static_cast<T>(static_cast<double>(*dloss) / static_cast<double>(batch * classes));
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = x.at(p, k), (&target)[V] = t.at(p, k);
      T dx[V];
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] = upstream * scalar::binary_cross_entropy_slope(v[i], target[i]);
      store_pack(row_at(dlogits, b) + k, dx);
    });
  }
};

template <class T>
struct Argmax {
  Rows<T> x;
  int64_t* labels;
  int64_t classes;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> values(row_at(x, b), classes);
    T top = static_cast<T>(-INFINITY);
    int64_t nan = classes, first = classes;
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = values.at(p, k);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        top = Max{}(v[i], top);  // passes over a NaN
        if (v[i] != v[i] && k + i < nan) nan = k + i;
      }
    });
    top = team.reduce(top, Max{}, static_cast<T>(-INFINITY));
    nan = team.reduce(nan, Min{}, classes);
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = values.at(p, k);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (v[i] == top && k + i < first) first = k + i;
    });
    first = team.reduce(first, Min{}, classes);
    if (team.leads()) labels[b] = nan < classes ? nan : first;
  }
};

}  // namespace

void mixed_targets(const Tensor& labels, const Tensor& mixing, double smoothing, double threshold, const Tensor& targets) {
  check_targets(labels, mixing, targets);
  const auto* mixed = mixing.defined() ? reinterpret_cast<const Mixing*>(mixing.data<float>()) : nullptr;
  dispatch_wide(targets.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const MixedTargets<T> kernel{labels.data<int64_t>(), mixed, rows_of<T>(targets), targets.dim(1), smoothing, threshold};
    launch_few_rows("mixed_targets", kernel, targets.dim(0), targets.dim(1), kernel.targets);
  });
}

void binary_cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "binary_cross_entropy");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const BinaryLoss<T> kernel{rows_of<T>(logits), rows_of<T>(targets), loss.data<T>(), logits.dim(1)};
    launch_few_rows("binary_cross_entropy", kernel, logits.dim(0), logits.dim(1), kernel.logits, kernel.targets);
  });
}

void binary_cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "binary_cross_entropy_grad");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const BinaryGrad<T> kernel{dloss.data<T>(), rows_of<T>(logits), rows_of<T>(targets), rows_of<T>(dlogits), logits.dim(0), logits.dim(1)};
    launch_few_rows("binary_cross_entropy_grad", kernel, logits.dim(0), logits.dim(1), kernel.logits, kernel.targets, kernel.dlogits);
  });
}

void argmax(const Tensor& x, const Tensor& labels) {
  check_argmax(x, labels);
  dispatch_wide(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Argmax<T> kernel{rows_of<T>(x), labels.data<int64_t>(), x.dim(1)};
    launch_few_rows("argmax", kernel, x.dim(0), x.dim(1), kernel.x);
  });
}

}  // namespace mesa::kernels::cuda
