// m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + decay w;
// w <- w - lr |w| / |u| u. Three kernels: moments and the squares of each chunk, the squares of each parameter, the weights.
#include "parameters.h"

namespace mesa::kernels::cuda {

namespace {

struct Squares {
  double w, u;
};

/// The chunks of one parameter: a part of its own, never cut.
struct Chunks {
  int64_t first, chunks;
  int64_t parameter;  ///< its place in the list
  int64_t count = 1;

  bool operator==(const Chunks&) const = default;
  Chunks slice(int64_t, int64_t) const { return *this; }
};

template <class T>
struct TakeIn {
  LambRule<T> rule;
  Part<T> part;
  Squares* sum;

  template <int N>
  __device__ void operator()(int64_t i) const {
    T w[N], g[N], m[N], v[N];
    load_pack(part.w + i, w);
    load_pack(part.g + i, g);
    load_pack(part.m + i, m);
    load_pack(part.v + i, v);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      rule.moments.take_in(g[k], m[k], v[k]);
      const double value = w[k], update = rule.update(w[k], m[k], v[k]);
      sum->w += value * value;
      sum->u += update * update;
    }
    store_pack(part.m + i, m);
    store_pack(part.v + i, v);
  }
};

template <class T>
__global__ void moments_kernel(const Part<T>* parts, LambRule<T> rule, Squares* partial) {
  const Part<T> part = parts[blockIdx.x];
  Squares sum{0, 0};
  for_each_run(part, TakeIn<T>{rule.of(part.weight_decay), part, &sum});
  const double w = block_reduce(sum.w, Sum{}, 0.0), u = block_reduce(sum.u, Sum{}, 0.0);
  if (threadIdx.x == 0) partial[blockIdx.x] = {w, u};
}

/// One block for each parameter.
__global__ void squares_kernel(const Chunks* parameters, const Squares* partial, Squares* all) {
  const Chunks mine = parameters[blockIdx.x];
  double w = 0, u = 0;
  for (int64_t c = threadIdx.x; c < mine.chunks; c += kUpdateThreads) {
    w += partial[mine.first + c].w;
    u += partial[mine.first + c].u;
  }
  w = block_reduce(w, Sum{}, 0.0);
  u = block_reduce(u, Sum{}, 0.0);
  if (threadIdx.x == 0) all[mine.parameter] = {w, u};
}

template <class T>
struct Apply {
  LambRule<T> rule;
  Part<T> part;
  T rate;

  template <int N>
  __device__ void operator()(int64_t i) const {
    T w[N], m[N], v[N];
    load_pack(part.w + i, w);
    load_pack(part.m + i, m);
    load_pack(part.v + i, v);
#pragma unroll
    for (int k = 0; k < N; ++k) w[k] -= rate * rule.update(w[k], m[k], v[k]);
    store_pack(part.w + i, w);
    if (part.copy) store_pack(part.copy + i, w);
  }
};

template <class T>
__global__ void apply_kernel(const Part<T>* parts, LambRule<T> rule, bool trust_clip, const Squares* all) {
  const Part<T> part = parts[blockIdx.x];
  const Squares sum = all[part.parameter];
  const double ratio = part.weight_decay != 0 ? trust_ratio(sum.w, sum.u, trust_clip) : 1.0;
  const T rate = static_cast<T>(rule.lr * part.lr_scale * ratio);
  for_each_run(part, Apply<T>{rule.of(part.weight_decay), part, rate});
}

/// The sums of squares of a slot, by its place in the list.
Squares* squares_of(const Tensor& squares) { return reinterpret_cast<Squares*>(squares.data<double>()); }

template <class T>
void moments_of_all(const std::vector<Part<T>>& parts, const LambStep& step, const Tensor& squares) {
  std::vector<Chunks> parameters;
  int64_t first = 0;
  for (const Part<T>& part : parts) {
    parameters.push_back({first, ceil_div(part.count, kUpdateChunk), part.parameter});
    first += parameters.back().chunks;
  }
  const ChunkTable<Part<T>> table = chunk_table(parts, kUpdateChunk, squares.device());
  const ChunkTable<Chunks> list = chunk_table(parameters, 1, squares.device());
  const Tensor partial = Tensor::empty(Shape{table.count, 2}, DType::f64, squares.device());
  if (table.count > 0)
    launch("lamb (moments)", &moments_kernel<T>, static_cast<unsigned>(table.count), kUpdateThreads, 0, table.chunks, LambRule<T>(step),
           squares_of(partial));
  launch("lamb (squares)", &squares_kernel, static_cast<unsigned>(list.count), kUpdateThreads, 0, list.chunks, squares_of(partial),
         squares_of(squares));
}

template <class T>
void apply_to_all(const std::vector<Part<T>>& parts, const LambStep& step, const Tensor& squares) {
  const ChunkTable<Part<T>> table = chunk_table(parts, kUpdateChunk, squares.device());
  if (table.count > 0)
    launch("lamb", &apply_kernel<T>, static_cast<unsigned>(table.count), kUpdateThreads, 0, table.chunks, LambRule<T>(step),
           step.trust_clip, squares_of(squares));
}

void check_all(const std::vector<UpdateSlot>& slots, const LambStep& step, const Tensor& squares) {
  check_step(step.step, "lamb");
  check_slots(slots, 2, "lamb");
  check_squares(slots, squares);
}

}  // namespace

void lamb_moments(const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares) {
  check_all(slots, step, squares);
  for_each_dtype(slots, [&](const auto& parts) { moments_of_all(parts, step, squares); });
}

void lamb(const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares) {
  check_all(slots, step, squares);
  for_each_dtype(slots, [&](const auto& parts) { apply_to_all(parts, step, squares); });
}

}  // namespace mesa::kernels::cuda
