// (x / 255 - mean[c]) / std[c], of pixels that may be mixed before; an image as rows of patches and back; a token before the others; the
// mean of tokens.
#include "column_sums.h"
#include "divider.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

// --- pixels --------------------------------------------------------------------------------------------------------------------------

constexpr int kMaxChannels = 8;

/// y = factor[c] x - shift[c].
template <class A>
struct Normalization {
  A factor[kMaxChannels], shift[kMaxChannels];
};

/// Where the pixels of a batch lie.
struct Pixels {
  const uint8_t* x;
  int64_t batch, plane, width;
  const uint8_t* mirrored;  ///< null: none
  const Mixing* mixing;     ///< null: none
  Divider by_width;

  __device__ int64_t row(int64_t at) const { return by_width.quotient(static_cast<uint32_t>(at)); }
  __device__ bool is_mirrored(int64_t image) const { return mirrored != nullptr && mirrored[image] != 0; }
  /// Where the pixels are that are read as those from `at` on, n within a row.
  __device__ int64_t source(int64_t image, int64_t at, int n) const {
    return image * plane + (is_mirrored(image) ? at + width - n - 2 * (at - row(at) * width) : at);
  }
};

/// N pixels of C bytes.
template <int C, int N>
struct PixelPack {
  static constexpr int kWords = N * C / 4;
  uint32_t word[kWords];
  bool reversed;

  __device__ PixelPack(const Pixels& from, int64_t image, int64_t at) : reversed(from.is_mirrored(image)) {
    const auto* const words = reinterpret_cast<const uint32_t*>(from.x + from.source(image, at, N) * C);
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = words[k];
  }
  __device__ uint32_t byte(int i) const { return word[i / 4] >> i % 4 * 8 & 0xff; }
  /// Channel c of the kth pixel as they are read.
  __device__ uint32_t at(int k, int c) const { return reversed ? byte((N - 1 - k) * C + c) : byte(k * C + c); }
};

// blockIdx.y goes over images.

/// C interleaved planes: N pixels a thread are N C bytes, read as 32-bit words, and C packs. If kMixed, all N lie in one row.
template <bool kMixed, int C, int N, class T>
__global__ void normalize_packs_kernel(Pixels pixels, Normalization<Acc<T>> by, T* y) {
  static_assert(N * C % 4 == 0);
  using A = Acc<T>;
  const int64_t plane = pixels.plane, at = global_index() * N;
  if (at >= plane) return;
  for (int64_t image = blockIdx.y; image < pixels.batch; image += gridDim.y) {
    const PixelPack<C, N> own(pixels, image, at), other(pixels, kMixed ? Mixing::partner(image) : image, at);
    A weight[N];
    if constexpr (kMixed) {
      const Mixing mixing = pixels.mixing[image];
      const int64_t row = pixels.row(at), column = at - row * pixels.width;
#pragma unroll
      for (int k = 0; k < N; ++k) weight[k] = mixing.weight(row, column + k);
    }
    T* const to = y + image * plane * C + at;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      A v[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        A x = static_cast<A>(own.at(k, c));
        if constexpr (kMixed) x = scalar::mixed(x, static_cast<A>(other.at(k, c)), weight[k]);
        v[k] = x * by.factor[c] - by.shift[c];
      }
      store_pack(to + c * plane, v);
    }
  }
}

/// Any number of channels, one pixel a thread.
template <class T>
__global__ void normalize_kernel(Pixels pixels, int channels, Normalization<Acc<T>> by, T* y) {
  using A = Acc<T>;
  const int64_t plane = pixels.plane, at = global_index();
  if (at >= plane) return;
  const int64_t row = pixels.row(at), column = at - row * pixels.width;
  for (int64_t image = blockIdx.y; image < pixels.batch; image += gridDim.y) {
    const A weight = pixels.mixing == nullptr ? 1 : pixels.mixing[image].weight(row, column);
    T* const to = y + image * plane * channels + at;
#pragma unroll
    for (int c = 0; c < kMaxChannels; ++c) {
      if (c >= channels) continue;
      A x = static_cast<A>(pixels.x[pixels.source(image, at, 1) * channels + c]);
      if (weight != A(1))
        x = scalar::mixed(x, static_cast<A>(pixels.x[pixels.source(Mixing::partner(image), at, 1) * channels + c]), weight);
      store(to + c * plane, x * by.factor[c] - by.shift[c]);
    }
  }
}

// --- patches -------------------------------------------------------------------------------------------------------------------------

/// The pixels of contiguous images [B, C, H, W] as [B, H/p, W/p, C, p, p]: the order of `tokens`, which becomes its shape.
Tensor patch_view(const Tensor& images, int64_t p, const Tensor& tokens, const char* name) {
  check(images.rank() == 4, name, ": images of shape ", images.shape());
  const int64_t B = images.dim(0), C = images.dim(1), H = images.dim(2), W = images.dim(3);
  check(p > 0 && H % p == 0 && W % p == 0, name, ": patches of ", p, " do not tile images of ", images.shape());
  check_alike(images, tokens, name);
  check(tokens.rank() == 3 && tokens.dim(0) == B && tokens.dim(2) == C * p * p, name, ": patches of shape ", tokens.shape(),
        " for images of shape ", images.shape());
  return images.as_strided({B, H / p, W / p, C, p, p}, {C * H * W, p * W, p, H * W, W, 1}, images.offset());
}

// --- tokens --------------------------------------------------------------------------------------------------------------------------

/// One block for each tile of columns of each image.
template <int N, class X, class Y>
__global__ void mean_tokens_kernel(int64_t tokens, int64_t from, int64_t width, Acc<X> share, const X* x, Y* y) {
  using Tile = ColumnTile<N>;
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t b = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns;
  const Acc<X> sum = sum_columns<N>(x + (b * tokens + from) * width, tokens - from, width, begin);
  if (threadIdx.x < Tile::kColumns && begin + threadIdx.x < width) store(y + b * width + begin + threadIdx.x, sum * share);
}

/// Packs of N elements, `across` in each row of dx. A block writes kGradTokens tokens of an image, a thread the same columns of each.
constexpr int kGradTokens = 16;
template <int N, class Y, class X>
__global__ void mean_tokens_grad_kernel(int64_t across, int64_t tokens, int64_t from, Acc<Y> share, const Y* dy, X* dx) {
  const int64_t parts = (tokens + kGradTokens - 1) / kGradTokens, b = blockIdx.x / parts, first = blockIdx.x % parts * kGradTokens;
  const int64_t end = first + kGradTokens < tokens ? first + kGradTokens : tokens;
  for (int64_t c = threadIdx.x; c < across; c += blockDim.x) {
    auto v = elements_at<N>(dy + (b * across + c) * N);
#pragma unroll
    for (int k = 0; k < N; ++k) v.v[k] *= share;
    for (int64_t token = first; token < end; ++token)
      store_pack(dx + ((b * tokens + token) * across + c) * N, (token < from ? Elements<Acc<Y>, N>{} : v).v);
  }
}

void check_mean(const Tensor& x, int64_t from, const Tensor& y, const char* name) {
  check(x.rank() == 3 && y.rank() == 2 && y.dim(0) == x.dim(0) && y.dim(1) == x.dim(2) && x.is_contiguous() && y.is_contiguous(), name,
        ": tensors of shapes ", x.shape(), " and ", y.shape());
  check(from >= 0 && from < x.dim(1), name, ": from token ", from, " of ", x.dim(1));
}

}  // namespace

void normalize_images(const Tensor& pixels, const std::vector<float>& mean, const std::vector<float>& std, const Tensor& mirrored,
                      const Tensor& mixing, const Tensor& y) {
  check(pixels.rank() == 4 && y.rank() == 4 && pixels.is_contiguous() && y.is_contiguous(), "normalize_images: tensors of shapes ",
        pixels.shape(), " and ", y.shape());
  const int64_t height = pixels.dim(1), width = pixels.dim(2), channels = pixels.dim(3), plane = height * width;
  check(y.shape() == Shape({pixels.dim(0), channels, height, width}), "normalize_images: ", pixels.shape(), " cannot become ", y.shape());
  check(static_cast<int64_t>(mean.size()) == channels && static_cast<int64_t>(std.size()) == channels, "normalize_images: ", mean.size(),
        " means and ", std.size(), " deviations for ", channels, " channels");
  check(channels <= kMaxChannels, "normalize_images: ", channels, " channels; on a GPU there may be ", kMaxChannels);
  check_mixing(mixing, pixels);
  if (y.numel() == 0) return;
  const auto* mixed = mixing.defined() ? reinterpret_cast<const Mixing*>(mixing.data<float>()) : nullptr;
  check(plane < int64_t{1} << 31, "normalize_images: images of ", height, " x ", width, "; on a GPU there may be 2^31 pixels");
  const Pixels from{pixels.data<uint8_t>(), pixels.dim(0), plane, width, mirror_flags(mirrored, pixels), mixed, Divider(width)};
  // One thread for so many pixels of each image.
  const auto grid = [&](int64_t n) {
    return dim3(static_cast<unsigned>(ceil_div(plane, n * kMapThreads)), static_cast<unsigned>(std::min<int64_t>(from.batch, 65535)));
  };
  dispatch_float(y.dtype(), [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    constexpr int N = std::max(4, kLaneElements<T>);
    T* py = y.data<T>();
    Normalization<A> by{};
    for (int64_t c = 0; c < channels; ++c) {
      by.factor[c] = static_cast<A>(1 / (255.0 * static_cast<double>(std[c])));
      by.shift[c] = static_cast<A>(static_cast<double>(mean[c]) / static_cast<double>(std[c]));
    }
    if (channels == 3 && (mirrored.defined() || mixed != nullptr ? width : plane) % N == 0 && aligned(from.x, 4) &&
        aligned(py, N * sizeof(T)))
      launch("normalize_images", mixed != nullptr ? &normalize_packs_kernel<true, 3, N, T> : &normalize_packs_kernel<false, 3, N, T>,
             grid(N), kMapThreads, 0, from, by, py);
    else
      launch("normalize_images", &normalize_kernel<T>, grid(1), kMapThreads, 0, from, static_cast<int>(channels), by, py);
  });
}

void extract_patches(const Tensor& x, int64_t patch, const Tensor& y) {
  const Tensor view = patch_view(x, patch, y, "extract_patches");
  copy(view, y.reshape(view.shape()));
}

void scatter_patches(const Tensor& dy, int64_t patch, const Tensor& dx) {
  const Tensor view = patch_view(dx, patch, dy, "scatter_patches");
  copy(dy.reshape(view.shape()), view);
}

void prepend_tokens(const Tensor& front, const Tensor& x, const Tensor& y) {
  check(front.rank() == 2 && x.rank() == 3 && front.dim(1) == x.dim(2) && y.shape() == x.shape().with(1, x.dim(1) + front.dim(0)) &&
            front.is_contiguous() && x.is_contiguous() && y.is_contiguous(),
        "prepend_tokens: tokens ", front.shape(), " before ", x.shape(), " into ", y.shape());
  const int64_t B = x.dim(0), N = x.dim(1), C = x.dim(2), T = front.dim(0);
  copy(front.as_strided({B, T, C}, {0, C, 1}, front.offset()), y.narrow(1, 0, T));
  copy(x, y.narrow(1, T, N));
}

void mean_tokens(const Tensor& x, int64_t from, const Tensor& y) {
  check_mean(x, from, y, "mean_tokens");
  if (y.numel() == 0) return;
  const int64_t tokens = x.dim(1), width = x.dim(2);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    constexpr int N = kLaneElements<X>;
    const X* px = x.data<X>();
    const bool packed = width % N == 0 && aligned(px, N * sizeof(X));
    const int64_t tiles = ceil_div(width, packed ? ColumnTile<N>::kColumns : ColumnTile<1>::kColumns);
    launch("mean_tokens", packed ? &mean_tokens_kernel<N, X, Y> : &mean_tokens_kernel<1, X, Y>, static_cast<unsigned>(x.dim(0) * tiles),
           kColumnThreads, 0, tokens, from, width, Acc<X>(1) / static_cast<Acc<X>>(tokens - from), px, y.data<Y>());
  });
}

void mean_tokens_grad(const Tensor& dy, int64_t from, const Tensor& dx) {
  check_mean(dx, from, dy, "mean_tokens_grad");
  if (dx.numel() == 0) return;
  const int64_t tokens = dx.dim(1), width = dx.dim(2);
  dispatch(dy.dtype(), dx.dtype(), [&](auto ty, auto tx) {
    using Y = decltype(ty);
    using X = decltype(tx);
    constexpr int N = kLaneElements<Y, X>;
    const Y* py = dy.data<Y>();
    X* px = dx.data<X>();
    const bool packed = width % N == 0 && aligned(py, N * sizeof(Y)) && aligned(px, N * sizeof(X));
    const int64_t across = width / (packed ? N : 1), blocks = dx.dim(0) * ceil_div(tokens, kGradTokens);
    const int64_t threads = std::clamp<int64_t>(ceil_div(across, kWarp) * kWarp, kWarp, kMapThreads);
    launch("mean_tokens_grad", packed ? &mean_tokens_grad_kernel<N, Y, X> : &mean_tokens_grad_kernel<1, Y, X>,
           static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, across, tokens, from,
           Acc<Y>(1) / static_cast<Acc<Y>>(tokens - from), py, px);
  });
}

}  // namespace mesa::kernels::cuda
