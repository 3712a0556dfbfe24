// (x / 255 - mean[c]) / std[c], of pixels that may be mixed before; an image as rows of patches and back; a token before the others; the
// mean of tokens.
#include "mesa/kernels/image.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

template <class X, class Y>
void convert_row(const X* x, Y* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(y + i, load(x + i));
}

/// Extents of images in patches, and the places of pixel rows inside them.
struct Patches {
  int64_t batch, channels, height, width, patch;

  Patches(const Tensor& images, int64_t patch, const Tensor& tokens, const char* name)
      : batch(images.dim(0)), channels(images.dim(1)), height(images.dim(2)), width(images.dim(3)), patch(patch) {
    check(patch > 0 && height % patch == 0 && width % patch == 0, name, ": patches of ", patch, " do not tile images of ", images.shape());
    check_alike(images, tokens, name);
    check(tokens.rank() == 3 && tokens.dim(0) == batch && tokens.dim(2) == channels * patch * patch, name, ": patches of shape ",
          tokens.shape(), " for images of shape ", images.shape());
  }

  /// f(image_offset, token_offset) for each run of `patch` pixels that lies together in both.
  template <class F>
  void for_runs(const F& f) const {
    const int64_t across = width / patch, token = channels * patch * patch;
    parallel_rows(batch * channels * height, width, [=, this](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % height, c = row / height % channels, b = row / height / channels;
        const int64_t first = (b * (height / patch) + y / patch) * across;
        const int64_t inside = (c * patch + y % patch) * patch;
        for (int64_t i = 0; i < across; ++i) f(row * width + i * patch, (first + i) * token + inside);
      }
    });
  }
};

/// One channel of a picture, as it is read.
struct Picture {
  const uint8_t* first;
  int64_t channels, width;
  bool mirrored;
  const uint8_t* row(int64_t r) const { return first + (r * width + (mirrored ? width - 1 : 0)) * channels; }
  int64_t step() const { return mirrored ? -channels : channels; }
};

/// y = factor x - shift with x every `step`-th byte.
template <class T>
void normalize_plane(const uint8_t* x, int64_t step, int64_t n, Acc<T> factor, Acc<T> shift, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(y + j, static_cast<Acc<T>>(x[j * step]) * factor - shift);
}

template <class T>
void normalize_picture(const Picture& picture, int64_t height, Acc<T> factor, Acc<T> shift, T* y) {
  const int64_t width = picture.width;
  if (!picture.mirrored) return normalize_plane(picture.first, picture.channels, height * width, factor, shift, y);
  for (int64_t r = 0; r < height; ++r) normalize_plane(picture.row(r), picture.step(), width, factor, shift, y + r * width);
}

/// The same within the box of `mixing`, each pixel mixed with the one at its place in `other`.
template <class T>
void normalize_mixed_box(const Mixing& mixing, const Picture& own, const Picture& other, Acc<T> factor, Acc<T> shift, T* y) {
  using A = Acc<T>;
  const auto x0 = static_cast<int64_t>(mixing.x0), x1 = static_cast<int64_t>(mixing.x1);
  const int64_t step = own.step(), other_step = other.step();
  for (auto r = static_cast<int64_t>(mixing.y0); r < static_cast<int64_t>(mixing.y1); ++r) {
    const uint8_t *const mine = own.row(r), *const theirs = other.row(r);
    T* const to = y + r * own.width;
#pragma omp simd
    for (int64_t j = x0; j < x1; ++j) {
      const A x = scalar::mixed(static_cast<A>(mine[j * step]), static_cast<A>(theirs[j * other_step]), static_cast<A>(mixing.inside));
      store(to + j, x * factor - shift);
    }
  }
}

}  // namespace

void normalize_images(const Tensor& pixels, const std::vector<float>& mean, const std::vector<float>& std, const Tensor& mirrored,
                      const Tensor& mixing, const Tensor& y) {
  check(pixels.rank() == 4 && y.rank() == 4 && pixels.is_contiguous() && y.is_contiguous(), "normalize_images: tensors of shapes ",
        pixels.shape(), " and ", y.shape());
  const int64_t batch = pixels.dim(0), height = pixels.dim(1), width = pixels.dim(2), channels = pixels.dim(3), plane = height * width;
  check(y.shape() == Shape({batch, channels, height, width}), "normalize_images: ", pixels.shape(), " cannot become ", y.shape());
  check(static_cast<int64_t>(mean.size()) == channels && static_cast<int64_t>(std.size()) == channels, "normalize_images: ", mean.size(),
        " means and ", std.size(), " deviations for ", channels, " channels");
  check_mixing(mixing, pixels);
  const auto* mixed = mixing.defined() ? reinterpret_cast<const Mixing*>(mixing.data<float>()) : nullptr;
  const uint8_t* const mirror = mirror_flags(mirrored, pixels);
  const uint8_t* px = pixels.data<uint8_t>();
  dispatch_float(y.dtype(), [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    T* py = y.data<T>();
    parallel_rows(batch * channels, plane, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / channels, c = i % channels;
        const A factor = static_cast<A>(1 / (255.0 * static_cast<double>(std[c])));
        const A shift = static_cast<A>(static_cast<double>(mean[c]) / static_cast<double>(std[c]));
        const auto picture = [&](int64_t of) {
          return Picture{px + of * plane * channels + c, channels, width, mirror != nullptr && mirror[of] != 0};
        };
        normalize_picture(picture(b), height, factor, shift, py + i * plane);
        if (mixed == nullptr || mixed[b].inside == 1) continue;
        normalize_mixed_box(mixed[b], picture(b), picture(Mixing::partner(b)), factor, shift, py + i * plane);
      }
    });
  });
}

void extract_patches(const Tensor& x, int64_t patch, const Tensor& y) {
  check(x.rank() == 4, "extract_patches: images of shape ", x.shape());
  const Patches patches(x, patch, y, "extract_patches");
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    patches.for_runs([=](int64_t image, int64_t token) { convert_row(px + image, py + token, patch); });
  });
}

void scatter_patches(const Tensor& dy, int64_t patch, const Tensor& dx) {
  check(dx.rank() == 4, "scatter_patches: images of shape ", dx.shape());
  const Patches patches(dx, patch, dy, "scatter_patches");
  dispatch(dy.dtype(), dx.dtype(), [&](auto ty, auto tx) {
    const auto* py = dy.data<decltype(ty)>();
    auto* px = dx.data<decltype(tx)>();
    patches.for_runs([=](int64_t image, int64_t token) { convert_row(py + token, px + image, patch); });
  });
}

void prepend_tokens(const Tensor& front, const Tensor& x, const Tensor& y) {
  check(front.rank() == 2 && x.rank() == 3 && front.dim(1) == x.dim(2) && y.shape() == x.shape().with(1, x.dim(1) + front.dim(0)) &&
            front.is_contiguous() && x.is_contiguous() && y.is_contiguous(),
        "prepend_tokens: tokens ", front.shape(), " before ", x.shape(), " into ", y.shape());
  const int64_t tokens = y.dim(1), width = x.dim(2), before = front.dim(0);
  dispatch(front.dtype(), x.dtype(), y.dtype(), [&](auto tt, auto tx, auto ty) {
    const auto* pt = front.data<decltype(tt)>();
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    parallel_rows(y.dim(0) * tokens, width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / tokens, n = row % tokens;
        if (n < before)
          convert_row(pt + n * width, py + row * width, width);
        else
          convert_row(px + (row - (b + 1) * before) * width, py + row * width, width);
      }
    });
  });
}

void mean_tokens(const Tensor& x, int64_t from, const Tensor& y) {
  check(x.rank() == 3 && y.rank() == 2 && y.dim(0) == x.dim(0) && y.dim(1) == x.dim(2) && x.is_contiguous() && y.is_contiguous(),
        "mean_tokens: tensors of shapes ", x.shape(), " and ", y.shape());
  const int64_t tokens = x.dim(1), width = x.dim(2);
  check(from >= 0 && from < tokens, "mean_tokens: from token ", from, " of ", tokens);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using A = Acc<decltype(tx)>;
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    const A share = A(1) / static_cast<A>(tokens - from);
    parallel_rows(x.dim(0), tokens * width, [=](int64_t begin, int64_t end) {
      std::vector<A> spare(width);
      A* sum = spare.data();
      for (int64_t b = begin; b < end; ++b) {
        std::fill(sum, sum + width, A(0));
        for (int64_t n = from; n < tokens; ++n) {
          const auto* row = px + (b * tokens + n) * width;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) sum[c] += load(row + c);
        }
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) store(py + b * width + c, sum[c] * share);
      }
    });
  });
}

void mean_tokens_grad(const Tensor& dy, int64_t from, const Tensor& dx) {
  check(dx.rank() == 3 && dy.rank() == 2 && dy.dim(0) == dx.dim(0) && dy.dim(1) == dx.dim(2) && dx.is_contiguous() && dy.is_contiguous(),
        "mean_tokens_grad: tensors of shapes ", dy.shape(), " and ", dx.shape());
  const int64_t tokens = dx.dim(1), width = dx.dim(2);
  check(from >= 0 && from < tokens, "mean_tokens_grad: from token ", from, " of ", tokens);
  dispatch(dy.dtype(), dx.dtype(), [&](auto ty, auto tx) {
    using A = Acc<decltype(ty)>;
    const auto* py = dy.data<decltype(ty)>();
    auto* px = dx.data<decltype(tx)>();
    const A share = A(1) / static_cast<A>(tokens - from);
    parallel_rows(dx.dim(0) * tokens, width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* from_row = py + row / tokens * width;
        auto* to = px + row * width;
        const A factor = row % tokens < from ? A(0) : share;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) store(to + c, factor == A(0) ? A(0) : factor * load(from_row + c));
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
