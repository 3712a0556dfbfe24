// m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + decay w;
// w <- w - lr |w| / |u| u. Three kernels: moments and the squares of each chunk, the ratio of each parameter, the weights.
#include "parameters.h"

namespace mesa::kernels::cuda {

namespace {

struct Squares {
  double w, u;
};

/// The chunks of one parameter: a part of its own, never cut.
struct Chunks {
  int64_t first, chunks;
  bool adapts;  ///< false: its ratio is 1
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
__global__ void ratio_kernel(const Chunks* parameters, const Squares* partial, bool trust_clip, double* ratio) {
  const Chunks mine = parameters[blockIdx.x];
  double w = 0, u = 0;
  for (int64_t c = threadIdx.x; c < mine.chunks; c += kUpdateThreads) {
    w += partial[mine.first + c].w;
    u += partial[mine.first + c].u;
  }
  w = block_reduce(w, Sum{}, 0.0);
  u = block_reduce(u, Sum{}, 0.0);
  if (threadIdx.x == 0) ratio[blockIdx.x] = mine.adapts ? trust_ratio(w, u, trust_clip) : 1.0;
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
__global__ void apply_kernel(const Part<T>* parts, LambRule<T> rule, const double* ratio) {
  const Part<T> part = parts[blockIdx.x];
  const T rate = static_cast<T>(rule.lr * part.lr_scale * ratio[part.parameter]);
  for_each_run(part, Apply<T>{rule.of(part.weight_decay), part, rate});
}

template <class T>
void update_all(const std::vector<Part<T>>& parts, const LambStep& step, Device device) {
  std::vector<Chunks> parameters;
  int64_t first = 0;
  for (const Part<T>& part : parts) {
    parameters.push_back({first, ceil_div(part.count, kUpdateChunk), part.weight_decay != 0});
    first += parameters.back().chunks;
  }
  const ChunkTable<Part<T>> table = chunk_table(parts, kUpdateChunk, device);
  const ChunkTable<Chunks> all = chunk_table(parameters, 1, device);
  if (table.count == 0) return;
  const Tensor partial = Tensor::empty(Shape{2 * table.count}, DType::f64, device);
  const Tensor ratio = Tensor::empty(Shape{all.count}, DType::f64, device);
  auto* squares = reinterpret_cast<Squares*>(partial.data<double>());
  const LambRule<T> rule(step);
  const auto blocks = static_cast<unsigned>(table.count);
  launch("lamb (moments)", &moments_kernel<T>, blocks, kUpdateThreads, 0, table.chunks, rule, squares);
  launch("lamb (ratios)", &ratio_kernel, static_cast<unsigned>(all.count), kUpdateThreads, 0, all.chunks, squares, step.trust_clip,
         ratio.data<double>());
  launch("lamb", &apply_kernel<T>, blocks, kUpdateThreads, 0, table.chunks, rule, ratio.data<double>());
}

}  // namespace

void lamb(const std::vector<UpdateSlot>& slots, LambStep step) {
  check_step(step.step, "lamb");
  check_slots(slots, 2, "lamb");
  for_each_dtype(slots, [&](const auto& parts) { update_all(parts, step, slots.front().w.device()); });
}

}  // namespace mesa::kernels::cuda
