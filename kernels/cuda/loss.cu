// loss = lse(x) - sum_k t_k x_k for targets t that sum to 1;  dx = dloss / B (softmax(x) - t);  the mean over a batch.
// A block for each row of logits: there are few rows, and up to tens of thousands of classes.
#include "mesa/kernels/loss.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

using Block = Team<1, 0>;
constexpr int kMostThreads = 1024;

/// What a row's softmax needs: probabilities are exp(x[k] - top) / sum, log sum exp is top + log(sum).
template <class T>
struct RowSum {
  T top, sum;
  __device__ T exponential(T x) const { return scalar::exp_nonpositive(x - top); }
  __device__ double log_sum_exp() const { return static_cast<double>(top) + std::log(static_cast<double>(sum)); }
};
template <class T>
__device__ RowSum<T> exponentiate(const T* x, int64_t classes) {
  RowSum<T> row{static_cast<T>(-INFINITY), 0};
  Block::each(classes, [&](int, int64_t k) { row.top = Max{}(x[k], row.top); });  // passes over a NaN, which comes back in the sum
  row.top = Block::reduce(row.top, Max{}, static_cast<T>(-INFINITY));
  Block::each(classes, [&](int, int64_t k) { row.sum += row.exponential(x[k]); });
  row.sum = Block::sum(row.sum);
  return row;
}

template <class T>
struct LabelLoss {
  Rows<T> logits;
  const int64_t* labels;
  T* loss;
  int64_t classes;
  double smoothing;

  __device__ void operator()(Block block, int64_t b) const {
    const T* x = row_at(logits, b);
    const double lse = exponentiate(x, classes).log_sum_exp();
    double spread = 0;
    if (smoothing > 0) {  // without, a class of probability 0 costs nothing, though its gap is infinite
      block.each(classes, [&](int, int64_t k) { spread += lse - x[k]; });
      spread = smoothing / static_cast<double>(classes) * block.sum(spread);
    }
    if (block.leads()) loss[b] = static_cast<T>((1 - smoothing) * (lse - x[labels[b]]) + spread);
  }
};

template <class T>
struct TargetLoss {
  Rows<T> logits, targets;
  T* loss;
  int64_t classes;

  __device__ void operator()(Block block, int64_t b) const {
    const T *x = row_at(logits, b), *t = row_at(targets, b);
    const double lse = exponentiate(x, classes).log_sum_exp();
    double sum = 0;
    block.each(classes, [&](int, int64_t k) { sum += t[k] * (lse - x[k]); });
    sum = block.sum(sum);
    if (block.leads()) loss[b] = static_cast<T>(sum);
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

  __device__ void operator()(Block block, int64_t b) const {
    const T* x = row_at(logits, b);
    T* dx = row_at(dlogits, b);
    const int64_t label = labels[b];
    const RowSum<T> row = exponentiate(x, classes);
    const T inverse = static_cast<T>(1 / static_cast<double>(row.sum)), factor = upstream();
    block.each(classes, [&](int, int64_t k) {
      const T rest = row.exponential(x[k]) * inverse - spread;
      dx[k] = factor * (k == label ? rest - hit : rest);
    });
  }
};

template <class T>
struct TargetGrad {
  Upstream<T> upstream;
  Rows<T> logits, targets, dlogits;
  int64_t classes;

  __device__ void operator()(Block block, int64_t b) const {
    const T *x = row_at(logits, b), *t = row_at(targets, b);
    T* dx = row_at(dlogits, b);
    const RowSum<T> row = exponentiate(x, classes);
    const T inverse = static_cast<T>(1 / static_cast<double>(row.sum)), factor = upstream();
    block.each(classes, [&](int, int64_t k) { dx[k] = factor * (row.exponential(x[k]) * inverse - t[k]); });
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

template <class Kernel>
void run(const char* name, const Tensor& logits, const Kernel& kernel) {
  launch_teams<Block>(name, logits.dim(0), logits.dim(1), kernel, kMostThreads);
}

}  // namespace

void cross_entropy(const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& loss) {
  check_logits(logits, "cross_entropy");
  check_labels(labels, logits.dim(0));
  check(loss.is_contiguous() && loss.numel() == logits.dim(0), "cross_entropy: loss has ", loss.numel(), " elements");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("cross_entropy", logits, LabelLoss<T>{rows_of<T>(logits), labels.data<int64_t>(), loss.data<T>(), logits.dim(1), smoothing});
  });
}

void cross_entropy_soft(const Tensor& logits, const Tensor& targets, const Tensor& loss) {
  check_loss(logits, targets, loss, "cross_entropy_soft");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("cross_entropy_soft", logits, TargetLoss<T>{rows_of<T>(logits), rows_of<T>(targets), loss.data<T>(), logits.dim(1)});
  });
}

void cross_entropy_grad(const Tensor& dloss, const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& dlogits) {
  check_logits(logits, "cross_entropy_grad");
  check_labels(labels, logits.dim(0));
  check(dlogits.shape() == logits.shape(), "cross_entropy_grad: tensors of shapes ", logits.shape(), " and ", dlogits.shape());
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const int64_t classes = logits.dim(1);
    run("cross_entropy_grad", logits,
        LabelGrad<T>{{dloss.data<T>(), logits.dim(0)},
                     rows_of<T>(logits),
                     rows_of<T>(dlogits),
                     labels.data<int64_t>(),
                     classes,
                     static_cast<T>(smoothing / static_cast<double>(classes)),
                     static_cast<T>(1 - smoothing)});
  });
}

void cross_entropy_soft_grad(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits) {
  check_loss_grad(logits, targets, dlogits, "cross_entropy_soft_grad");
  dispatch_wide(logits.dtype(), [&](auto tag) {
    using T = decltype(tag);
    run("cross_entropy_soft_grad", logits,
        TargetGrad<T>{{dloss.data<T>(), logits.dim(0)}, rows_of<T>(logits), rows_of<T>(targets), rows_of<T>(dlogits), logits.dim(1)});
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
