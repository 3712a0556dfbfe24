// A matrix row by row, each row the work of one team of threads: a warp that keeps the row in registers or, where it is too long for them,
// a block that reads it again in every pass. A kernel is a struct whose operator()(team, row) does one row; launch_rows chooses the team.
#pragma once
#include "cuda.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kRowWarps = 8;  // warps of a block, when each has its own row

/// The columns of a row are dealt in pieces of V neighbours, one to each thread in turn. With P > 0 the team is a warp and a thread has at
/// most P pieces, exactly P if `full`: the loads then stand in a row without a branch. With P = 0 the team is a block and a thread has any
/// number of pieces.
template <int V, int P, bool full = false>
struct Team {
  static constexpr int kVector = V;
  static constexpr bool kKeeps = P > 0, kFull = full;
  static constexpr int kPieces = P > 0 ? P : 1;  ///< that a thread holds at a time

  __device__ static int64_t row() {
    return kKeeps ? static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp : static_cast<int64_t>(blockIdx.x);
  }
  /// True in one thread of the team.
  __device__ static bool leads() { return (kKeeps ? threadIdx.x % kWarp : threadIdx.x) == 0; }

  /// f(p, c) for each piece of this thread: the p-th that it keeps (0 where none is kept), columns c to c + V - 1.
  template <class F>
  __device__ static void each(int64_t width, F&& f) {
    if constexpr (kKeeps) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const int c = (p * kWarp + static_cast<int>(threadIdx.x % kWarp)) * V;
        if (full || c < static_cast<int>(width)) f(p, c);
      }
    } else {
      for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < width; c += static_cast<int64_t>(blockDim.x) * V) f(0, c);
    }
  }

  /// The reduction over the team, in every thread.
  template <class T, class F>
  __device__ static T reduce(T value, F f, T identity) {
    if constexpr (kKeeps)
      return warp_reduce(value, f);
    else
      return block_reduce(value, f, identity);
  }
  template <class T>
  __device__ static T sum(T value) {
    return reduce(value, Sum{}, T(0));
  }
};

/// A thread's elements of one row. All are read before any is used, if the team keeps them: then the row may be overwritten.
template <class Team, class T>
class Values {
 public:
  static constexpr int V = Team::kVector;
  __device__ Values(const T* row, int64_t width) : row_(row) {
    if constexpr (Team::kKeeps) Team::each(width, [&](int p, auto c) { load_pack(row_ + c, kept_[p]); });
  }
  /// The piece that Team::each calls (p, c). What is written to it is still there in the next pass only if the team keeps it.
  template <class Column>
  __device__ Acc<T> (&at(int p, Column c))[V] {
    if constexpr (!Team::kKeeps) load_pack(row_ + c, kept_[p]);
    return kept_[p];
  }

 private:
  const T* row_;
  Acc<T> kept_[Team::kPieces][V];
};

/// V parameters of the columns: the same in each row, so they come from the read-only cache; 16-byte aligned if V > 1.
template <int V, class A>
__device__ inline void load_parameters(const A* p, A (&x)[V]) {
  if constexpr (V % 4 == 0 && std::is_same_v<A, float>) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(p + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else if constexpr (V == 2 && std::is_same_v<A, float>) {
    const float2 two = __ldg(reinterpret_cast<const float2*>(p));
    x[0] = two.x, x[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __ldg(p + i);
  }
}

template <class T>
__device__ inline T* row_at(const Rows<T>& rows, int64_t row) {
  return rows.base + row * rows.stride;
}

// --- launching -------------------------------------------------------------------------------------------------------------------

/// Elements of a vector access to tensors of these types together: 16 bytes of the widest. f64 only has to be right.
template <class... T>
inline constexpr int kVectorOf = (std::is_same_v<T, double> || ...) ? 1 : 16 / static_cast<int>(std::max({sizeof(T)...}));

/// True if rows of `width` elements at `base`, `stride` apart, consist of aligned pieces of V.
template <int V, class T>
bool in_vectors(const T* base, int64_t stride, int64_t width) {
  return width % V == 0 && stride % V == 0 && aligned(base, V * sizeof(T));
}
template <int V, class... T>
bool in_vectors(int64_t width, const Rows<T>&... rows) {
  return (in_vectors<V>(rows.base, rows.stride, width) && ...);
}

template <class Team, class Kernel>
__global__ void each_row(Kernel kernel, int64_t rows) {
  const int64_t row = Team::row();
  if (row < rows) kernel(Team{}, row);
}

/// Calls f with the first of the `sizes` that is at least n, as a constant; false if there is none.
template <int... sizes, class F>
bool first_fitting(int64_t n, F&& f) {
  return ((n <= sizes && (f(std::integral_constant<int, sizes>{}), true)) || ...);
}

/// f(Team) for rows of `width` elements in pieces of V: a warp if `may_keep` and the row fits its registers, else a block.
template <int V, bool may_keep, class F>
void with_team(int64_t width, F&& f) {
  if constexpr (V > 2) {  // narrower pieces where they keep all lanes busy: 384 is 3 x 32 x 4, and 192 is 3 x 32 x 2
    const bool idle = width % (kWarp * V) != 0, fits = width % (kWarp * V / 2) == 0 && (V == 8 || width <= kWarp * V / 2 * 3);
    if (idle && fits) return with_team<V / 2, may_keep>(width, f);
  }
  bool kept = false;
  if constexpr (may_keep) {
    const int64_t pieces = ceil_div(width, kWarp * V);
    const auto by_warp = [&](auto most) {
      constexpr int P = most.value;
      if constexpr (V == 2)  // comes from wider pieces alone, which leave it full rows
        f(Team<V, P, true>{});
      else if (V > 1 && width == kWarp * V * P)
        f(Team<V, P, (V > 1)>{});
      else
        f(Team<V, P>{});
    };
    if constexpr (V == 1)  // odd widths: up to 256, as the keys of a window or of 197 tokens
      kept = first_fitting<8>(pieces, by_warp);
    else if constexpr (V == 2)
      kept = first_fitting<1, 3>(pieces, by_warp);
    else if constexpr (V == 4)
      kept = first_fitting<1, 2, 3, 6, 8>(pieces, by_warp);
    else
      kept = first_fitting<1, 2, 3, 4>(pieces, by_warp);
  }
  if constexpr (V != 2 || !may_keep)
    if (!kept) f(Team<V, 0>{});
}

/// Runs kernel(team, row) for all rows.
template <class Team, class Kernel>
void launch_teams(const char* name, int64_t rows, int64_t width, const Kernel& kernel, int64_t most_threads = 256) {
  const int64_t blocks = Team::kKeeps ? ceil_div(rows, kRowWarps) : rows;
  const int64_t warps = Team::kKeeps ? kRowWarps : std::clamp<int64_t>(ceil_div(width, kWarp * Team::kVector), 1, most_threads / kWarp);
  if (rows > 0) launch(name, &each_row<Team, Kernel>, static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp), 0, kernel, rows);
}
/// The same by teams that suit the rows; in pieces of V elements if `vectors`. Kernel::kOften: layers make rows of these types, which are
/// worth a kernel for each width; other types only have to be right.
template <int V, class Kernel>
void launch_rows(const char* name, int64_t rows, int64_t width, bool vectors, const Kernel& kernel) {
  constexpr bool may_keep = Kernel::kOften && !std::is_same_v<typename Kernel::A, double>;
  const auto run = [&](auto team) { launch_teams<decltype(team)>(name, rows, width, kernel); };
  if (vectors)
    with_team<V, may_keep>(width, run);
  else
    with_team<1, may_keep>(width, run);
}

/// The same for logits and the like, of which a batch has few rows: warps keep those of up to 1,024 columns, blocks go over longer ones.
template <class Kernel, class T, class... Others>
void launch_few_rows(const char* name, const Kernel& kernel, int64_t rows, int64_t width, const Rows<T>& operand, const Others&... others) {
  constexpr int V = 4, P = 8, kMostThreads = 1024;
  if constexpr (std::is_same_v<T, float>)
    if (in_vectors<V>(width, operand, others...) && width <= V * P * kWarp) return launch_teams<Team<V, P>>(name, rows, width, kernel);
  launch_teams<Team<1, 0>>(name, rows, width, kernel, kMostThreads);
}

// --- contracts -------------------------------------------------------------------------------------------------------------------

inline void check_rows(const Tensor& s, const Tensor& p, const char* name) {
  check(s.numel() == p.numel() && width_of(s) == width_of(p), name, ": tensors of shapes ", s.shape(), " and ", p.shape());
}
inline void check_row_values(const Tensor& values, int64_t rows, const char* name) {
  check(values.is_contiguous() && values.numel() == rows, name, " has ", values.numel(), " elements for ", rows, " rows");
}

}  // namespace
}  // namespace mesa::kernels::cuda
