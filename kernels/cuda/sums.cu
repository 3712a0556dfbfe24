// db[n] = sum_m dy[m, n];  sum_i x[i]^2 over a list;  how many x[i] are not finite, and the first of them.
// Sums are made in chunks of fixed size and the chunks' sums added in order: the result depends neither on the GPU nor on the run.
#include <limits>

#include "chunks.h"
#include "column_sums.h"
#include "mesa/kernels/elementwise.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

// --- sums of columns -----------------------------------------------------------------------------------------------------------------

constexpr int64_t kSumRows = 64;                            // rows a chunk: fp32 sums this short keep their relative error near 1e-7
constexpr int64_t kFewRows = 1024, kFewElements = 1 << 21;  // of sums that are added up without chunks

/// partial[c, n] = the sum over the rows of chunk c; one block for each tile of columns of each chunk.
template <int N, class T>
__global__ void sum_chunks_kernel(int64_t rows, int64_t width, const T* x, Acc<T>* partial) {
  using Tile = ColumnTile<N>;
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t chunk = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns, first = chunk * kSumRows;
  const Acc<T> sum = sum_columns<N>(x + first * width, rows - first < kSumRows ? rows - first : kSumRows, width, begin);
  if (threadIdx.x < Tile::kColumns && begin + threadIdx.x < width) partial[chunk * width + begin + threadIdx.x] = sum;
}

/// out[n] <- (accumulate ? out[n] : 0) + sum_c partial[c, n] in double.
template <class A, class Out>
__global__ void add_partials_kernel(int64_t chunks, int64_t width, const A* partial, Out* out, bool accumulate) {
  const int64_t n = FewColumns::column();
  double sum = 0;
  if (n < width)
#pragma unroll 4
    for (int64_t c = FewColumns::lane(); c < chunks; c += FewColumns::kLanes) sum += partial[c * width + n];
  const double total = FewColumns::sum<1>({{sum}}).of[0];
  if (FewColumns::lane() == 0 && n < width) out[n] = static_cast<Out>((accumulate ? static_cast<double>(out[n]) : 0.0) + total);
}

/// The same at once of no more rows than a chunk has: a thread for N columns.
template <int N, class T, class Out>
__global__ void sum_few_rows_kernel(int64_t rows, int64_t width, const T* x, Out* out, bool accumulate) {
  for (int64_t c = global_index() * N; c < width; c += global_stride() * N) {
    Acc<T> sum[N] = {};
#pragma unroll 4
    for (int64_t row = 0; row < rows; ++row) {
      const auto v = elements_at<N>(x + row * width + c);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += v.v[k];
    }
    Out total[N];
#pragma unroll
    for (int k = 0; k < N; ++k) total[k] = static_cast<Out>((accumulate ? static_cast<double>(out[c + k]) : 0.0) + sum[k]);
    store_pack(out + c, total);
  }
}

template <class T, class Out>
void sum_few_rows(const T* x, int64_t rows, int64_t width, Out* out, bool accumulate) {
  constexpr int N = kLaneElements<T, Out>;
  const bool packed = width % N == 0 && aligned(x, N * sizeof(T)) && aligned(out, N * sizeof(Out));
  launch("sum_rows", packed ? &sum_few_rows_kernel<N, T, Out> : &sum_few_rows_kernel<1, T, Out>,
         grid_for(width, (packed ? N : 1) * kMapThreads, kMapBlocks), kMapThreads, 0, rows, width, x, out, accumulate);
}

template <class T>
void sum_chunks(const T* x, int64_t rows, int64_t width, int64_t chunks, Acc<T>* partial) {
  constexpr int N = kLaneElements<T>;
  const bool packed = width % N == 0 && aligned(x, N * sizeof(T));
  const int64_t blocks = chunks * ceil_div(width, packed ? ColumnTile<N>::kColumns : ColumnTile<1>::kColumns);
  launch("sum_rows", packed ? &sum_chunks_kernel<N, T> : &sum_chunks_kernel<1, T>, static_cast<unsigned>(blocks), kColumnThreads, 0, rows,
         width, x, partial);
}

// --- sums of squares -----------------------------------------------------------------------------------------------------------------

constexpr int64_t kSumElements = 8192;
constexpr int kSumThreads = 256, kFinishThreads = 1024;

/// Elements of one tensor, of any floating dtype.
struct Run {
  const void* x;
  int64_t count;
  DType dtype;
  bool packed;

  bool operator==(const Run&) const = default;
  Run slice(int64_t begin, int64_t n) const { return {static_cast<const char*>(x) + begin * size_of(dtype), n, dtype, packed}; }
};

template <int N, class T>
__device__ inline double add_squares(const T* x, int64_t count) {
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i + N <= count; i += kSumThreads * N) {
    const auto v = elements_at<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += static_cast<double>(v.v[k]) * static_cast<double>(v.v[k]);
  }
  if (const int64_t last = count / N * N + threadIdx.x; N > 1 && last < count) {
    const double value = load(x + last);
    sum += value * value;
  }
  return sum;
}
template <class T>
__device__ inline double add_squares(const Run& run) {
  const T* x = static_cast<const T*>(run.x);
  return run.packed ? add_squares<kLaneElements<T>>(x, run.count) : add_squares<1>(x, run.count);
}

/// partial[c] = the sum of squares of chunk c: one block each.
__global__ void sum_squares_kernel(const Run* chunks, double* partial) {
  const Run run = chunks[blockIdx.x];
  double sum = 0;
  if (run.dtype == DType::f32)
    sum = add_squares<float>(run);
  else if (run.dtype == DType::bf16)
    sum = add_squares<bf16>(run);
  else
    sum = add_squares<double>(run);
  sum = block_reduce(sum, Sum{}, 0.0);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// One block adds them all.
__global__ void finish_sum_kernel(int64_t count, const double* partial, double* result) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += partial[i];
  sum = block_reduce(sum, Sum{}, 0.0);
  if (threadIdx.x == 0) *result = sum;
}

// --- NaN and infinity ----------------------------------------------------------------------------------------------------------------

template <class A>
__device__ inline bool is_finite(A x) {
  return x - x == A(0);
}  // otherwise NaN

/// One atomic addition for each warp that found something: the sum of integers has no order.
template <int N, class T>
__global__ void count_nonfinite_kernel(int64_t n, const T* x, unsigned long long* count) {
  int found = 0;
  for (int64_t i = global_index() * N; i + N <= n; i += global_stride() * N) {
    const auto v = elements_at<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) found += !is_finite(v.v[k]);
  }
  if (const int64_t last = n / N * N + global_index(); N > 1 && last < n) found += !is_finite(load(x + last));
  found = warp_reduce(found, Sum{});
  if (threadIdx.x % kWarp == 0 && found != 0) atomicAdd(count, static_cast<unsigned long long>(found));
}

template <class T>
__global__ void first_nonfinite_kernel(int64_t n, const T* x, long long* first) {
  for (int64_t i = global_index(); i < n; i += global_stride()) {
    if (is_finite(load(x + i))) continue;
    atomicMin(first, static_cast<long long>(i));
    return;  // what follows in this thread comes later
  }
}

}  // namespace

void sum_rows(const Tensor& dy, const Tensor& db, bool accumulate) {
  check_flat(dy, "sum_rows: dy");
  check_flat(db, "sum_rows: db");
  const int64_t width = db.numel();
  if (width == 0) return;
  check(dy.numel() % width == 0, "sum_rows: ", width, " elements do not divide a tensor of shape ", dy.shape());
  const int64_t rows = dy.numel() / width, chunks = ceil_div(rows, kSumRows);
  dispatch_float(dy.dtype(), [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    dispatch_wide(db.dtype(), [&](auto out) {
      using Out = decltype(out);
      if (chunks <= 1) return sum_few_rows(dy.data<T>(), rows, width, db.data<Out>(), accumulate);
      const auto finish = [&](const char* name, int64_t parts, const A* partial) {
        launch(name, &add_partials_kernel<A, Out>, FewColumns::blocks(width), FewColumns::kThreads, 0, parts, width, partial,
               db.data<Out>(), accumulate);
      };
      if constexpr (std::is_same_v<T, A>)
        if (rows <= kFewRows && rows * width <= kFewElements) return finish("sum_rows", rows, dy.data<T>());
      const Tensor partial = Tensor::empty({chunks, width}, dtype_of<A>, dy.device());
      sum_chunks(dy.data<T>(), rows, width, chunks, partial.data<A>());
      finish("sum_rows (finish)", chunks, partial.data<A>());
    });
  });
}

void sum_squares(const std::vector<Tensor>& xs, const Tensor& result) {
  check(result.numel() == 1, "sum_squares: a result of shape ", result.shape());
  std::vector<Run> runs;
  for (const Tensor& x : xs) {
    check_flat(x, "sum_squares: x");
    check(is_floating(x.dtype()), "sum_squares: a tensor of ", to_string(x.dtype()), " where a floating one is needed");
    runs.push_back({x.raw(), x.numel(), x.dtype(), aligned(x.raw(), 16)});
  }
  const ChunkTable<Run> table = chunk_table(runs, kSumElements, result.device());
  const Tensor partial = Tensor::empty({table.count}, DType::f64, result.device());
  if (table.count > 0)
    launch("sum_squares", &sum_squares_kernel, static_cast<unsigned>(table.count), kSumThreads, 0, table.chunks, partial.data<double>());
  launch("sum_squares (finish)", &finish_sum_kernel, 1, kFinishThreads, 0, table.count, partial.data<double>(), result.data<double>());
}

void count_nonfinite(const Tensor& x, const Tensor& counts) {
  check_flat(x, "count_nonfinite: x");
  check(counts.numel() == 2, "count_nonfinite: counts of shape ", counts.shape());
  if (x.numel() == 0) return;
  auto* count = reinterpret_cast<unsigned long long*>(counts.data<int64_t>() + 1);
  dispatch_float(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    constexpr int N = kLaneElements<T>;
    const T* px = x.data<T>();
    const bool packed = aligned(px, N * sizeof(T));
    launch("count_nonfinite", packed ? &count_nonfinite_kernel<N, T> : &count_nonfinite_kernel<1, T>,
           grid_for(x.numel(), 2 * (packed ? N : 1) * kMapThreads), kMapThreads, 0, x.numel(), px, count);
  });
}

void first_nonfinite(const Tensor& x, int64_t* result) {
  check_flat(x, "first_nonfinite: x");
  *result = -1;
  if (x.numel() == 0) return;
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t first = kNone;
  const Tensor found = Tensor::empty({1}, DType::i64, x.device());
  mesa::cuda::copy_to_device(found.raw(), &first, sizeof first);
  dispatch_float(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    launch("first_nonfinite", &first_nonfinite_kernel<T>, grid_for(x.numel(), kMapThreads), kMapThreads, 0, x.numel(), x.data<T>(),
           reinterpret_cast<long long*>(found.data<int64_t>()));
  });
  mesa::cuda::copy_to_host(&first, found.raw(), sizeof first);
  if (first != kNone) *result = first;
}

}  // namespace mesa::kernels::cuda
