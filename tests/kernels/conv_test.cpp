// Convolutions and pooling against their sums in double, in every dtype, and the kernels under them on every instruction set.
#include "mesa/kernels/conv.h"

#include <limits>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using kernels::ConvGeometry;

namespace {

using Numbers = std::vector<double>;

struct Size {
  const char* name;
  int64_t B, I, O;
  ConvGeometry g;
};

std::vector<Size> sizes() {
  return {{"3 x 3", 2, 8, 16, {7, 9, 3, 3, 1, 1}},
          {"every second", 3, 5, 7, {10, 7, 3, 3, 2, 1}},
          {"a stem", 1, 3, 16, {23, 18, 7, 7, 2, 3}},
          {"1 x 1", 2, 16, 8, {5, 3}},
          {"1 x 1, every second", 2, 16, 24, {7, 6, 1, 1, 2}},
          {"padded 1 x 1", 1, 4, 4, {3, 3, 1, 1, 1, 1}},
          {"dilated", 2, 4, 8, {9, 8, 3, 3, 1, 2, 2}},
          {"in groups", 2, 8, 12, {6, 5, 3, 3, 1, 1, 1, 4}},
          {"depthwise", 2, 16, 16, {8, 9, 3, 3, 1, 1, 1, 16}},
          {"depthwise of 7 x 7, every second", 1, 8, 8, {9, 14, 7, 7, 2, 3, 1, 8}},
          {"a kernel that is no square", 2, 3, 4, {6, 11, 2, 5, 3, 1}},
          {"one place", 1, 32, 5, {1, 1, 3, 3, 1, 1}},
          {"many rows", 4, 16, 32, {33, 31, 3, 3, 1, 1}}};
}

/// f(b, place, o, token, tap, i, i within the group) for each product of the convolution.
template <class F>
void each_term(const Size& s, const F& f) {
  const int64_t across = s.g.out_width(), places = s.g.out_height() * across, c = s.I / s.g.groups;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t place = 0; place < places; ++place)
      for (int64_t tap = 0; tap < s.g.taps(); ++tap) {
        const int64_t y = place / across * s.g.stride - s.g.padding + tap / s.g.kernel_width * s.g.dilation;
        const int64_t x = place % across * s.g.stride - s.g.padding + tap % s.g.kernel_width * s.g.dilation;
        if (y < 0 || y >= s.g.height || x < 0 || x >= s.g.width) continue;
        for (int64_t o = 0; o < s.O; ++o)
          for (int64_t i = 0; i < c; ++i) f(b, place, o, y * s.g.width + x, tap, o / (s.O / s.g.groups) * c + i, i);
      }
}

Tensor on_device(const Tensor& t) { return to(t, test_device()); }

struct Operands {
  Tensor x, w, bias, dy;
  Numbers vx, vw, vb, vdy;
  int64_t N, M, c;

  Operands(const Size& s, DType dtype) : N(s.g.height * s.g.width), M(s.g.out_height() * s.g.out_width()), c(s.I / s.g.groups) {
    const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
    const Tensor hx = random({s.B, N, s.I}, dtype, "x"), hb = random({s.O}, wide, "bias"), hdy = random({s.B, M, s.O}, dtype, "dy");
    const Tensor rounded = random({s.O, c, s.g.kernel_height, s.g.kernel_width}, dtype, "w"), hw = empty_like(rounded, wide);
    kernels::copy(rounded, hw);
    vx = hx.to_vector<double>(), vw = hw.to_vector<double>(), vb = hb.to_vector<double>(), vdy = hdy.to_vector<double>();
    x = on_device(hx), w = on_device(hw), bias = on_device(hb), dy = on_device(hdy);
  }
};

/// Of the terms together. A bf16 is rounded to within 2^-8.
double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-13 : dtype == DType::f32 ? 2e-6 : 0.0041; }

}  // namespace

TEST_CASE("convolutions and their gradients are the sums they stand for", "[kernels]") {
  for (const Size& s : sizes())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(s.name << " in " << to_string(dtype));
      const Operands o(s, dtype);
      Numbers y(s.B * o.M * s.O), dx(o.vx.size()), dw(o.vw.size()), ty(y.size()), tx(dx.size()), tw(dw.size());
      for (size_t i = 0; i < y.size(); ++i) y[i] = o.vb[i % s.O], ty[i] = std::fabs(y[i]);
      each_term(s, [&](int64_t b, int64_t place, int64_t out, int64_t token, int64_t tap, int64_t i, int64_t within) {
        const size_t at_y = (b * o.M + place) * s.O + out, at_x = (b * o.N + token) * s.I + i,
                     at_w = (out * o.c + within) * s.g.taps() + tap;
        y[at_y] += o.vx[at_x] * o.vw[at_w], ty[at_y] += std::fabs(o.vx[at_x] * o.vw[at_w]);
        dx[at_x] += o.vdy[at_y] * o.vw[at_w], tx[at_x] += std::fabs(o.vdy[at_y] * o.vw[at_w]);
        dw[at_w] += o.vdy[at_y] * o.vx[at_x], tw[at_w] += std::fabs(o.vdy[at_y] * o.vx[at_x]);
      });
      const Tensor got_y = empty_like(o.dy), got_dx = empty_like(o.x), got_dw = empty_like(o.w), again = empty_like(o.w);
      kernels::conv2d(o.x, o.w, o.bias, got_y, s.g);
      const bool bias_after = test_device() == kCuda && dtype == DType::bf16;  // another rounding
      expect(got_y, y, (bias_after ? 2 : 1) * tolerance(dtype), ty);
      kernels::conv2d_data_grad(o.dy, o.w, got_dx, s.g);
      expect(got_dx, dx, tolerance(dtype), tx);
      kernels::conv2d_weight_grad(o.dy, o.x, got_dw, false, s.g);
      expect(got_dw, dw, tolerance(dtype), tw);
      kernels::conv2d_weight_grad(o.dy, o.x, again, false, s.g);
      CHECK(got_dw.to_vector<double>() == again.to_vector<double>());
      kernels::conv2d_weight_grad(o.dy, o.x, again, true, s.g);
      for (size_t i = 0; i < dw.size(); ++i) dw[i] *= 2, tw[i] *= 2;
      expect(again, dw, tolerance(dtype), tw);
    }
}

TEST_CASE("a tap that lies outside of the grid everywhere has no gradient, whatever the memory held", "[kernels]") {
  CHECK_FALSE(ConvGeometry{1, 1, 3, 3, 2, 1}.every_tap_reads());
  CHECK_FALSE(ConvGeometry{5, 1, 3, 3, 1, 1}.every_tap_reads());
  CHECK(ConvGeometry{2, 2, 3, 3, 1, 1}.every_tap_reads());
  const ConvGeometry g{1, 1, 3, 3, 2, 1};  // a ResNet's last grid: only the middle tap reads
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t channels : {3, 16, 64})
      for (int round = 0; round < 4; ++round) {
        CAPTURE(to_string(dtype), channels, round);
        for (int64_t numbers = 16; numbers <= (1 << 18); numbers *= 2)  // blocks that the library's scratch will be made of
          for (int i = 0; i < 4; ++i) kernels::fill(Tensor::empty({numbers}, DType::f32), 7 + round);
        const Tensor x = random({1, 1, channels}, dtype, concat("x", round)), dy = random({1, 1, 64}, dtype, concat("dy", round));
        const Tensor dw = Tensor::empty({64, channels, 3, 3}, DType::f32);
        kernels::fill(dw, 5);
        kernels::conv2d_weight_grad(dy, x, dw, false, g);
        const Numbers got = dw.to_vector<double>(), vx = x.to_vector<double>(), vy = dy.to_vector<double>();
        int64_t wrong = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          const size_t o = i / 9 / vx.size(), c = i / 9 % vx.size();
          wrong += !(std::abs(got[i] - (i % 9 == 4 ? vy[o] * vx[c] : 0.0)) < 1e-6);
        }
        CHECK(wrong == 0);
      }
}

TEST_CASE("convolutions that cannot be are refused", "[kernels]") {
  const Tensor x = Tensor::zeros({1, 12, 4}, DType::f32), w = Tensor::zeros({2, 4, 3, 3}, DType::f32),
               y = Tensor::zeros({1, 12, 2}, DType::f32);
  CHECK_NOTHROW(kernels::conv2d(x, w, {}, y, {3, 4, 3, 3, 1, 1}));
  CHECK_THROWS_WITH(kernels::conv2d(x, w, {}, y, {4, 4, 3, 3, 1, 1}), Catch::Contains("grids [1, 12, 4]"));
  CHECK_THROWS_WITH(kernels::conv2d(x, w, {}, y, {3, 4, 3, 3, 1, 1, 1, 2}), Catch::Contains("2 groups"));
  CHECK_THROWS_WITH(kernels::conv2d(x, w, {}, y, {3, 4, 3, 3, 0, 1}), Catch::Contains("stride 0"));
  CHECK_THROWS_WITH(kernels::conv2d(x, w, {}, y, {3, 4, 3, 3, 1, 0, 2}), Catch::Contains("does not fit a grid of 3 x 4"));
  CHECK_THROWS_WITH(kernels::conv2d(x, w, Tensor::zeros({3}, DType::f32), y, {3, 4, 3, 3, 1, 1}), Catch::Contains("a bias [3]"));
}

TEST_CASE("unfold lays windows side by side and fold adds them up again", "[kernels]") {
  for (const Size& s : sizes())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(s.name << " in " << to_string(dtype));
      const int64_t N = s.g.height * s.g.width, M = s.g.out_height() * s.g.out_width(), c = s.I / s.g.groups, T = s.g.taps();
      const Tensor x = random({s.B, N, s.I}, dtype, "x"), columns = Tensor::empty({s.g.groups, s.B * M, T * c}, dtype), dx = empty_like(x);
      const Tensor back = random(columns.shape(), dtype, "back");
      const Numbers vx = x.to_vector<double>(), vb = back.to_vector<double>();
      Numbers want(columns.numel()), sums(vx.size()), terms(vx.size());
      Size one = s;
      one.O = s.g.groups;  // one result for each group reads each input once
      each_term(one, [&](int64_t b, int64_t place, int64_t group, int64_t token, int64_t tap, int64_t i, int64_t within) {
        const size_t at = ((group * s.B * M + b * M + place) * T + tap) * c + within, from = (b * N + token) * s.I + i;
        want[at] = vx[from];
        sums[from] += vb[at], terms[from] += std::fabs(vb[at]);
      });
      for (const auto& run : implementations(kernels::unfold)) {
        kernels::fill(columns, 9);
        run(x, s.g, columns);
        CHECK(columns.to_vector<double>() == want);
      }
      for (const auto& run : implementations(kernels::fold)) {
        run(back, s.g, dx);
        expect(dx, sums, dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 0.0041, terms);
      }
    }
}

TEST_CASE("max pooling takes the largest of each window, the first of equal ones, and a NaN before all", "[kernels]") {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
  struct Pool {
    int64_t B, C;
    ConvGeometry g;
  };
  for (const Pool& p :
       {Pool{2, 8, {7, 9, 3, 3, 2, 1}}, Pool{1, 3, {4, 6, 2, 2, 2}}, Pool{3, 16, {5, 5, 3, 3, 1, 1}}, Pool{1, 1, {1, 1, 3, 3, 2, 1}}})
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(p.C << " channels of " << p.g.height << " x " << p.g.width << " in " << to_string(dtype));
      const int64_t N = p.g.height * p.g.width, across = p.g.out_width(), M = p.g.out_height() * across, C = p.C;
      Numbers values = normal_values(p.B * N * C, "x");
      for (size_t i = 0; i < values.size(); ++i) {
        if (i % 5 == 0) values[i] = 1;  // ties
        if (i % 17 == 3) values[i] = i % 2 ? -kInfinity : kNan;
      }
      const Tensor x = tensor_of({p.B, N, C}, values, dtype), dy = random({p.B, M, C}, dtype, "dy");
      const Numbers vx = x.to_vector<double>(), vdy = dy.to_vector<double>();
      Numbers want(p.B * M * C), dx(vx.size());
      std::vector<int64_t> taps(want.size());
      for (int64_t at = 0; at < p.B * M * C; ++at) {
        const int64_t c = at % C, place = at / C % M, b = at / C / M;
        int64_t best = -1;
        for (int64_t tap = 0; tap < p.g.taps(); ++tap) {
          const int64_t y = place / across * p.g.stride - p.g.padding + tap / p.g.kernel_width;
          const int64_t column = place % across * p.g.stride - p.g.padding + tap % p.g.kernel_width;
          if (y < 0 || y >= p.g.height || column < 0 || column >= p.g.width) continue;
          const int64_t from = (b * N + y * p.g.width + column) * C + c;
          if (best >= 0 && !(vx[from] > vx[best]) && !(std::isnan(vx[from]) && !std::isnan(vx[best]))) continue;
          best = from;
          taps[at] = tap;
        }
        want[at] = vx[best];
        dx[best] += vdy[at];
      }
      const Tensor y = Tensor::empty({p.B, M, C}, dtype), index = empty_like(y, DType::u8), got = empty_like(x);
      for (size_t which = 0; which < implementations(kernels::max_pool).size(); ++which) {
        implementations(kernels::max_pool)[which](x, p.g, y, index);
        const Numbers found = y.to_vector<double>();
        for (size_t i = 0; i < want.size(); ++i) {
          REQUIRE((std::isnan(want[i]) ? std::isnan(found[i]) : found[i] == want[i]));
          REQUIRE(index.data<uint8_t>()[i] == taps[i]);
        }
        implementations(kernels::max_pool_grad)[which](dy, index, p.g, got);
        expect(got, dx, dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 0.0041);
      }
    }
  const Tensor x = Tensor::zeros({1, 9, 1}, DType::f32), index = Tensor::zeros({1, 9, 1}, DType::u8);
  CHECK_THROWS_WITH(kernels::max_pool(x, ConvGeometry{3, 3, 1, 1, 1, 1}, x, index), Catch::Contains("windows of 1 x 1 with padding 1"));
}
