// columns[g, (b, place), (tap, c)] = x[b, token of the tap, g C/groups + c], 0 outside of the grid, and its gradient;
// y[b, place, c] = max over the taps of x, and its gradient by the tap that it was.
#include "cpu.h"
#include "mesa/kernels/conv_common.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// f(with a value of x's element type).
template <class F>
void dispatch_one(DType dtype, F&& f) {
  dispatch(dtype, dtype, [&](auto tag, auto) { f(tag); });
}

/// The token that a tap of a window reads, or -1.
struct Taps {
  ConvGeometry g;
  int64_t across = g.out_width(), places = g.out_height() * g.out_width();

  int64_t token(int64_t place, int64_t tap) const {
    const int64_t y = place / across * g.stride - g.padding + tap / g.kernel_width * g.dilation;
    const int64_t x = place % across * g.stride - g.padding + tap % g.kernel_width * g.dilation;
    return y < 0 || y >= g.height || x < 0 || x >= g.width ? -1 : y * g.width + x;
  }
  /// The place whose window reads this token by this tap, or -1.
  int64_t place(int64_t token, int64_t tap) const {
    const int64_t y = token / g.width + g.padding - tap / g.kernel_width * g.dilation;
    const int64_t x = token % g.width + g.padding - tap % g.kernel_width * g.dilation;
    if (y < 0 || x < 0 || y % g.stride != 0 || x % g.stride != 0 || x / g.stride >= across || y / g.stride * across >= places) return -1;
    return y / g.stride * across + x / g.stride;
  }
};

}  // namespace

void unfold(const Tensor& x, const ConvGeometry& g, const Tensor& columns) {
  check_unfolded(x, columns, g, "unfold");
  const Taps taps{g};
  const int64_t C = x.dim(2), c = C / g.groups, T = g.taps(), N = x.dim(1), M = x.dim(0) * taps.places;
  dispatch_one(x.dtype(), [&](auto tag) {
    using X = decltype(tag);
    const X* px = x.data<X>();
    X* to = columns.data<X>();
    parallel_rows(g.groups * M, T * c, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t group = row / M, b = row % M / taps.places, place = row % M % taps.places;
        for (int64_t tap = 0; tap < T; ++tap) {
          const int64_t token = taps.token(place, tap);
          X* out = to + (row * T + tap) * c;
          if (token < 0)
            std::fill_n(out, c, X(0));
          else
            std::copy_n(px + (b * N + token) * C + group * c, c, out);
        }
      }
    });
  });
}

void fold(const Tensor& columns, const ConvGeometry& g, const Tensor& dx) {
  check_unfolded(dx, columns, g, "fold");
  const Taps taps{g};
  const int64_t C = dx.dim(2), c = C / g.groups, T = g.taps(), N = dx.dim(1), M = dx.dim(0) * taps.places;
  dispatch_one(dx.dtype(), [&](auto tag) {
    using X = decltype(tag);
    using A = Acc<X>;
    const X* from = columns.data<X>();
    X* out = dx.data<X>();
    parallel_rows(dx.dim(0) * N, T * C, [=](int64_t begin, int64_t end) {
      std::vector<A> sum(C);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t tap = 0; tap < T; ++tap) {
          const int64_t place = taps.place(row % N, tap);
          if (place < 0) continue;
          for (int64_t group = 0; group < g.groups; ++group) {
            const X* term = from + ((group * M + row / N * taps.places + place) * T + tap) * c;
            A* to = sum.data() + group * c;
            for (int64_t i = 0; i < c; ++i) to[i] += load(term + i);
          }
        }
        for (int64_t i = 0; i < C; ++i) store(out + row * C + i, sum[i]);
      }
    });
  });
}

void max_pool(const Tensor& x, const ConvGeometry& g, const Tensor& y, const Tensor& index) {
  check_pooled(x, y, index, g, "max_pool");
  const Taps taps{g};
  const int64_t C = x.dim(2), T = g.taps(), N = x.dim(1);
  dispatch_one(x.dtype(), [&](auto tag) {
    using X = decltype(tag);
    const X* px = x.data<X>();
    X* py = y.data<X>();
    uint8_t* pi = index.data<uint8_t>();
    parallel_rows(x.dim(0) * taps.places, T * C, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        X* best = py + row * C;
        uint8_t* which = pi + row * C;
        bool first = true;
        for (int64_t tap = 0; tap < T; ++tap) {
          const int64_t token = taps.token(row % taps.places, tap);
          if (token < 0) continue;
          const X* in = px + (row / taps.places * N + token) * C;
          for (int64_t c = 0; c < C; ++c) {
            const auto value = load(in + c), most = load(best + c);
            const bool larger = first || value > most || (value != value && most == most);
            best[c] = larger ? in[c] : best[c];
            which[c] = larger ? static_cast<uint8_t>(tap) : which[c];
          }
          first = false;
        }
      }
    });
  });
}

void max_pool_grad(const Tensor& dy, const Tensor& index, const ConvGeometry& g, const Tensor& dx) {
  check_pooled(dx, dy, index, g, "max_pool_grad");
  const Taps taps{g};
  const int64_t C = dx.dim(2), T = g.taps(), N = dx.dim(1);
  dispatch_one(dx.dtype(), [&](auto tag) {
    using X = decltype(tag);
    using A = Acc<X>;
    const X* from = dy.data<X>();
    const uint8_t* pi = index.data<uint8_t>();
    X* out = dx.data<X>();
    parallel_rows(dx.dim(0) * N, T * C, [=](int64_t begin, int64_t end) {
      std::vector<A> sum(C);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t tap = 0; tap < T; ++tap) {
          const int64_t place = taps.place(row % N, tap);
          if (place < 0) continue;
          const int64_t at = (row / N * taps.places + place) * C;
          A* to = sum.data();
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) to[c] += pi[at + c] == tap ? load(from + at + c) : A(0);
        }
        for (int64_t c = 0; c < C; ++c) store(out + row * C + c, sum[c]);
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
