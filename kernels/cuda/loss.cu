// loss = lse(x) - sum_k t_k x_k for targets t that sum to 1;  dx = dloss / B (softmax(x) - t);  the mean over a batch.
#include "mesa/kernels/loss.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

/// What a row's softmax needs: probabilities are exp(x[k] - top) / sum, log sum exp is top + log(sum).
template <class T>
struct RowSum {
  T top, sum;
  __device__ T exponential(T x) const { return scalar::exp_nonpositive(x - top); }
  __device__ double log_sum_exp() const { return static_cast<double>(top) + std::log(static_cast<double>(sum)); }
};
template <class Team, class T>
__device__ RowSum<T> exponentiate(Team team, Values<Team, T>& x, int64_t classes) {
  constexpr int V = Team::kVector;
  RowSum<T> row{static_cast<T>(-INFINITY), 0};
  team.each(classes, [&](int p, auto k) {
    const T(&v)[V] = x.at(p, k);
#pragma unroll
    for (int i = 0; i < V; ++i) row.top = Max{}(v[i], row.top);  // passes over a NaN, which comes back in the sum
  });
  row.top = team.reduce(row.top, Max{}, static_cast<T>(-INFINITY));
  team.each(classes, [&](int p, auto k) {
    const T(&v)[V] = x.at(p, k);
#pragma unroll
    for (int i = 0; i < V; ++i) row.sum += row.exponential(v[i]);
  });
  row.sum = team.sum(row.sum);
  return row;
}

template <class T>
struct LabelLoss {
  Rows<T> logits;
  const int64_t* labels;
  T* loss;
  int64_t classes;
  double smoothing;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes);
    const double lse = exponentiate(team, x, classes).log_sum_exp();
    double spread = 0;
    if (smoothing > 0) {  // without, a class of probability 0 costs nothing, though its gap is infinite
      team.each(classes, [&](int p, auto k) {
        const T(&v)[V] = x.at(p, k);
#pragma unroll
        for (int i = 0; i < V; ++i) spread += lse - v[i];
      });
      spread = smoothing / static_cast<double>(classes) * team.sum(spread);
    }
    if (team.leads()) loss[b] = static_cast<T>((1 - smoothing) * (lse - row_at(logits, b)[labels[b]]) + spread);
  }
};

template <class T>
struct TargetLoss {
  Rows<T> logits, targets;
  T* loss;
  int64_t classes;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes), t(row_at(targets, b), classes);
    const double lse = exponentiate(team, x, classes).log_sum_exp();
    double sum = 0;
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = x.at(p, k), (&share)[V] = t.at(p, k);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += share[i] * (lse - v[i]);
    });
    sum = team.sum(sum);
    if (team.leads()) loss[b] = static_cast<T>(sum);
  }
};

/// dloss[0] / B, read where it lies.
template <class T>
struct Upstream {
  const T* dloss;
  int64_t batch;
  __device__ T operator()() const { return static_cast<T>(static_cast<double>(*dloss) / static_cast<double>(batch)); }
};

template <class T>
struct LabelGrad {
  Upstream<T> upstream;
  Rows<T> logits, dlogits;
  const int64_t* labels;
  int64_t classes;
  T spread, hit;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes);
    const int64_t label = labels[b];
    const RowSum<T> row = exponentiate(team, x, classes);
    const T inverse = static_cast<T>(1 / static_cast<double>(row.sum)), factor = upstream();
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = x.at(p, k);
      T dx[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const T rest = row.exponential(v[i]) * inverse - spread;
        dx[i] = factor * (k + i == label ? rest - hit : rest);
      }
      store_pack(row_at(dlogits, b) + k, dx);
    });
  }
};

template <class T>
struct TargetGrad {
  Upstream<T> upstream;
  Rows<T> logits, targets, dlogits;
  int64_t classes;

  template <class Team>
  __device__ void operator()(Team team, int64_t b) const {
    constexpr int V = Team::kVector;
    Values<Team, T> x(row_at(logits, b), classes), t(row_at(targets, b), classes);
    const RowSum<T> row = exponentiate(team, x, classes);
    const T inverse = static_cast<T>(1 / static_cast<double>(row.sum)), factor = upstream();
    team.each(classes, [&](int p, auto k) {
      const T(&v)[V] = x.at(p, k), (&share)[V] = t.at(p, k);
      T dx[V];
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] = factor * (row.exponential(v[i]) * inverse - share[i]);
      store_pack(row_at(dlogits, b) + k, dx);
    });
  }
};

/// sums[block] <- the sum over the block's part of x, `size` elements; divided by `count`.
template <class In, class Out>
__global__ void add_part(const In* x, int64_t n, int64_t size, double count, Out* sums) {
  const int64_t begin = blockIdx.x * size, end = begin + size < n ? begin + size : n;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += x[i];
  sum = block_reduce(sum, Sum{}, 0.0);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<Out>(sum / count);
}

}  // namespace

void cross_entropy(const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& loss) {
  check_logits(logits, "cross_entropy");
  check_labels(labels, logits.dim(0));
  check(loss.is_contiguous() && loss.numel() == logits.dim(0), "cross_entropy: loss has ", loss.numel(), " elements");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const LabelLoss<T> kernel{rows_of<T>(logits), labels.data<int64_t>(), loss.data<T>(), logits.dim(1), smoothing};
    launch_few_rows("cross_entropy", kernel, logits.dim(0), logits.dim(1), kernel.logits);
  });
}

void cross_entropy_soft(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "cross_entropy_soft");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const TargetLoss<T> kernel{rows_of<T>(logits), rows_of<T>(targets), loss.data<T>(), logits.dim(1)};
    launch_few_rows("cross_entropy_soft", kernel, logits.dim(0), logits.dim(1), kernel.logits, kernel.targets);
  });
}

void cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& dlogits) {
  check_logits(logits, "cross_entropy_grad");
  check_labels(labels, logits.dim(0));
  check(dlogits.shape() == logits.shape(), "cross_entropy_grad: tensors of shapes ", logits.shape(), " and ", dlogits.shape());
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const int64_t classes = logits.dim(1);
    const LabelGrad<T> kernel{{dloss.data<T>(), logits.dim(0)},
                              rows_of<T>(logits),
                              rows_of<T>(dlogits),
                              labels.data<int64_t>(),
                              classes,
                              static_cast<T>(smoothing / static_cast<double>(classes)),
                              static_cast<T>(1 - smoothing)};
    launch_few_rows("cross_entropy_grad", kernel, logits.dim(0), logits.dim(1), kernel.logits, kernel.dlogits);
  });
}

void cross_entropy_soft_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "cross_entropy_soft_grad");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const TargetGrad<T> kernel{
        {dloss.data<T>(), logits.dim(0)}, rows_of<T>(logits), rows_of<T>(targets), rows_of<T>(dlogits), logits.dim(1)};
    launch_few_rows("cross_entropy_soft_grad", kernel, logits.dim(0), logits.dim(1), kernel.logits, kernel.targets, kernel.dlogits);
  });
}

void mean_all(const Tensor& x, const Tensor& y) {
  check_flat(x, "mean_all: x");
  check(x.numel() > 0 && y.numel() == 1, "mean_all: tensors of shapes ", x.shape(), " and ", y.shape());
  constexpr int64_t kPart = 8192;
  constexpr unsigned kThreads = 512;
  const int64_t n = x.numel(), parts = ceil_div(n, kPart);
  dispatch_wide(x.dtype(), [&](auto tx) {
    dispatch_wide(y.dtype(), [&](auto ty) {
      using X = decltype(tx);
      using Y = decltype(ty);
      if (parts == 1) return launch("mean_all", &add_part<X, Y>, 1, kThreads, 0, x.data<X>(), n, n, n, y.data<Y>());
      const Tensor sums = Tensor::empty({parts}, DType::f64, x.device());
      launch("mean_all", &add_part<X, double>, static_cast<unsigned>(parts), kThreads, 0, x.data<X>(), n, kPart, 1, sums.data<double>());
      launch("mean_all", &add_part<double, Y>, 1, kThreads, 0, sums.data<double>(), parts, parts, n, y.data<Y>());
    });
  });
}

}  // namespace mesa::kernels::cuda
