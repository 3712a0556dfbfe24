// Codes by running ranges: against quantize and the formula of the estimates. Codes that a kernel writes as it computes or reads a value,
// against those that are made of the value by themselves; and kernels that decode as they read, against the same on decoded tensors.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/norm.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using kernels::Coding;
using kernels::GroupLayout;

namespace {

/// Estimates that some of the values of a normal tensor exceed, and room for the codes of n elements.
Coding running(const GroupLayout& layout, int bits, bool stochastic, int64_t n, bool in_place) {
  const int64_t groups = layout.groups;
  const auto floats = [&](float value) { return Tensor::from({groups}, std::vector<float>(groups, value)); };
  Coding r;
  r.layout = layout, r.bits = bits, r.stochastic = stochastic, r.key = RandomKey::of(7, "site", 3);
  r.alpha = floats(4), r.beta = floats(-1.75F);
  for (int64_t g = 0; g < groups; ++g) r.beta.data<float>()[g] += 0.01F * static_cast<float>(g % 50);
  r.alpha.data<float>()[groups - 1] = 0;  // constant so far
  r.next_alpha = in_place ? r.alpha : floats(-1), r.next_beta = in_place ? r.beta : floats(-1);
  r.decay = 0.75;
  r.step = floats(-1), r.offset = floats(-1);
  r.codes = Tensor::from({(n * bits + 7) / 8}, std::vector<uint8_t>((n * bits + 7) / 8, 0xee));
  r.counts = Tensor::zeros({2}, DType::i64);
  return r;
}

/// By the own ranges of runs of `inner` elements.
Coding current(int64_t inner, int bits, bool stochastic, int64_t n) {
  Coding c = running({1, (n + inner - 1) / inner, inner, true}, bits, stochastic, n, false);
  c.alpha = c.beta = c.next_alpha = c.next_beta = Tensor();
  return c;
}

std::string bits_of(const Tensor& t) { return {static_cast<const char*>(t.raw()), static_cast<size_t>(t.bytes())}; }

/// Everything that is written, bit for bit.
std::vector<std::string> written(const Coding& r) {
  std::vector<std::string> out;
  for (const Tensor& t : {r.codes, r.step, r.offset, r.next_alpha, r.next_beta, r.counts})
    if (t.defined()) out.push_back(bits_of(t));
  return out;
}

struct Setting {
  int bits;
  bool stochastic, in_place;
};
const Setting kSettings[] = {{8, true, false}, {4, true, true}, {2, true, false}, {8, false, true}, {4, false, false}, {2, false, true}};

/// Groups by head, by layer and by channel of rows of `width`.
std::vector<GroupLayout> layouts(int64_t rows, int64_t width, int64_t heads) {
  return {{rows, heads, width / heads, false}, {1, 1, rows * width, false}, {rows, width, 1, false}};
}

void spoil(const Tensor& x) {
  std::vector<float> odd = x.to_vector<float>();
  odd[odd.size() / 2] = std::numeric_limits<float>::quiet_NaN();
  odd[odd.size() / 3] = -std::numeric_limits<float>::infinity();
  odd[odd.size() / 5] = 1e30F;
  kernels::plain::copy(Tensor::from(x.shape(), odd), x);
}

}  // namespace

TEST_CASE("running codes: quantize with the estimates' scale, and the estimates follow their formula", "[kernels][codec]") {
  for (const int64_t rows : {1, 37})
    for (const GroupLayout& layout : layouts(rows, 48, 3))
      for (const Setting& s : kSettings) {
        CAPTURE(rows, layout.groups, s.bits, s.stochastic, s.in_place);
        const Tensor x = random({rows, 48}, DType::f32, "x");
        const Coding start = running(layout, s.bits, s.stochastic, x.numel(), false);
        const Tensor lo = empty_like(start.step), hi = empty_like(lo), codes = empty_like(start.codes), step = empty_like(lo);
        for (int64_t g = 0; g < layout.groups; ++g)
          step.data<float>()[g] = start.alpha.data<float>()[g] / static_cast<float>((1 << s.bits) - 1);
        const Tensor counts = Tensor::zeros({2}, DType::i64);
        kernels::plain::quantize(x, layout, s.bits, s.stochastic, start.key, step, start.beta, codes, lo, hi, counts);
        for (const auto& run : implementations(kernels::quantize_running)) {
          const Coding r = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          run(x, r);
          REQUIRE(r.codes.to_vector<uint8_t>() == codes.to_vector<uint8_t>());
          REQUIRE(r.step.to_vector<float>() == step.to_vector<float>());
          REQUIRE(r.offset.to_vector<float>() == start.beta.to_vector<float>());
          REQUIRE(r.counts.to_vector<int64_t>() == counts.to_vector<int64_t>());
          Coding uncounted = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          uncounted.counts = Tensor();
          run(x, uncounted);
          uncounted.counts = r.counts;
          REQUIRE((written(uncounted) == written(r)));
          for (int64_t g = 0; g < layout.groups; ++g) {
            const double a = start.alpha.data<float>()[g], b = start.beta.data<float>()[g], keep = a == 0 ? 0 : 0.75;
            const double l = lo.data<float>()[g], extent = static_cast<double>(hi.data<float>()[g]) - l;
            CHECK(r.next_alpha.data<float>()[g] == Approx(keep * a + (1 - keep) * extent).epsilon(1e-6));
            CHECK(r.next_beta.data<float>()[g] == Approx(keep * b + (1 - keep) * l).epsilon(1e-6));
          }
        }
      }
}

TEST_CASE("running codes: layer norm codes what it would have kept", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  for (const auto& [width, heads] :
       {std::pair<int64_t, int64_t>{64, 2}, {192, 3}, {384, 6}, {768, 12}, {1024, 8}, {2048, 4}, {72, 3}, {50, 5}})
    for (const DType out : {DType::f32, DType::bf16})
      for (const GroupLayout& layout : layouts(41, width, heads))
        for (const Setting& s : kSettings) {
          if (width > 500 && (s.bits == 4 || layout.groups == 1)) continue;  // enough of the large ones
          CAPTURE(width, to_string(out), layout.groups, s.bits, s.stochastic);
          const Tensor x = random({41, width}, DType::f32, "x", 3), gamma = random({width}, DType::f32, "gamma");
          const Tensor beta = random({width}, DType::f32, "beta"), y = Tensor::empty(x.shape(), out), want_y = empty_like(y);
          if (s.bits == 2) spoil(x);
          const Tensor xhat = empty_like(y), rstd = Tensor::empty({41}, DType::f32), want_rstd = empty_like(rstd);
          staged(kernels::cuda::layer_norm)(x, gamma, beta, 1e-6, want_y, xhat, want_rstd);
          const Coding want = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          staged(kernels::cuda::quantize_running)(xhat, want);
          const Coding got = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          staged(kernels::cuda::layer_norm_codes)(x, gamma, beta, 1e-6, y, rstd, got);
          REQUIRE((written(got) == written(want)));
          REQUIRE((bits_of(y) == bits_of(want_y)));
          REQUIRE((bits_of(rstd) == bits_of(want_rstd)));
        }
}

TEST_CASE("running codes: gelu codes what it reads", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  for (const auto& [rows, width, heads] : {std::array<int64_t, 3>{7, 64, 2}, {33, 192, 3}, {300, 96, 3}, {5, 3072, 12}, {3, 50, 5}})
    for (const DType type : {DType::f32, DType::bf16})
      for (const GroupLayout& layout : layouts(rows, width, heads))
        for (const Setting& s : kSettings) {
          CAPTURE(rows, width, to_string(type), layout.groups, s.bits, s.stochastic);
          const Tensor x = random({rows, width}, type, "x"), y = empty_like(x), want_y = empty_like(x);
          if (s.bits == 8) spoil(x);
          staged(kernels::cuda::gelu)(x, want_y);
          const Coding want = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          staged(kernels::cuda::quantize_running)(x, want);
          const Coding got = running(layout, s.bits, s.stochastic, x.numel(), s.in_place);
          staged(kernels::cuda::gelu_codes)(x, y, got);
          REQUIRE((written(got) == written(want)));
          REQUIRE((bits_of(y) == bits_of(want_y)));
        }
}

TEST_CASE("codes by own ranges: layer norm and gelu write what quantize_current would", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  for (const auto& [rows, width] : {std::array<int64_t, 2>{17, 384}, {3, 384}, {11, 192}, {8, 768}, {3, 1024}, {9, 64}, {3, 1536}, {6, 50}})
    for (const int64_t inner : {256, 192, 8, 2048, 100})
      for (const DType type : {DType::f32, DType::bf16})
        for (const auto& [bits, stochastic, odd] : kSettings) {
          if (width > 500 && bits == 4) continue;  // enough of the large ones
          CAPTURE(rows, width, inner, to_string(type), bits, stochastic);
          const Tensor x = random({rows, width}, DType::f32, "x", 3), gamma = random({width}, DType::f32, "gamma");
          const Tensor beta = random({width}, DType::f32, "beta"), y = Tensor::empty(x.shape(), type), want_y = empty_like(y);
          if (odd) spoil(x);
          const Tensor xhat = empty_like(y), rstd = Tensor::empty({rows}, DType::f32), want_rstd = empty_like(rstd);
          const auto expected = [&, bits = bits, stochastic = stochastic](const Tensor& values) {
            const Coding c = current(inner, bits, stochastic, values.numel());
            kernels::plain::quantize_current(values, c.layout, bits, stochastic, c.key, c.step, c.offset, c.codes, c.counts);
            return written(c);
          };
          staged(kernels::cuda::layer_norm)(x, gamma, beta, 1e-6, want_y, xhat, want_rstd);
          Coding got = current(inner, bits, stochastic, x.numel());
          staged(kernels::cuda::layer_norm_codes)(x, gamma, beta, 1e-6, y, rstd, got);
          REQUIRE((written(got) == expected(xhat)));
          REQUIRE((bits_of(y) == bits_of(want_y)));
          REQUIRE((bits_of(rstd) == bits_of(want_rstd)));

          const Tensor h = Tensor::empty(x.shape(), type), g = empty_like(h), want_g = empty_like(h);
          kernels::plain::copy(x, h);
          staged(kernels::cuda::gelu)(h, want_g);
          got = current(inner, bits, stochastic, x.numel());
          staged(kernels::cuda::gelu_codes)(h, g, got);
          REQUIRE((written(got) == expected(h)));
          REQUIRE((bits_of(g) == bits_of(want_g)));
        }
}

TEST_CASE("running codes: attention codes the q, k and v that it reads", "[kernels][codec][fused]") {
  if (test_device() != kCuda) return;
  struct Form {
    int64_t B, N, H, D;
    kernels::Windows windows = {};
    int64_t others = 0;  ///< keys of their own
  };
  for (const auto& [B, N, H, D, grid, others] :
       {Form{2, 17, 2, 32}, Form{1, 197, 3, 64}, Form{3, 5, 1, 64}, Form{1, 70, 4, 32}, Form{2, 98, 3, 32, {7, 14, 7, 7, 0, 3, 7, 14}},
        Form{2, 150, 1, 64, {}, 49}, Form{1, 17, 2, 32, {}, 150}})
    for (const Setting& s : kSettings)
      for (const int without : {-1, 0, 2}) {
        CAPTURE(B, N, others, H, D, s.bits, s.stochastic, without);
        const int64_t C = H * D;
        const Tensor qkv = random({B, N, 3 * C}, DType::bf16, "qkv"), kv = random({B, others, 2 * C}, DType::bf16, "kv");
        const Tensor o = Tensor::empty({B, N, C}, DType::bf16), want_o = empty_like(o);
        const Tensor lse = Tensor::empty({B, H, N}, DType::f32), want_lse = empty_like(lse);
        kernels::WindowBias windows{grid, {}, {}, false};
        if (grid.defined()) windows.table = random({grid.distances(), H}, DType::f32, "table");
        const auto part = [&](int i) { return others > 0 && i > 0 ? kv.narrow(-1, (i - 1) * C, C) : qkv.narrow(-1, i * C, C); };
        staged(kernels::cuda::fused_attention)(part(0), part(1), part(2), H, 0.125, want_o, want_lse, kernels::QkvCodes{}, windows);
        kernels::QkvCodes got, want;
        for (int i = 0; i < 3; ++i) {
          if (i == without) continue;
          const int64_t n = part(i).numel();
          if (without == 2 && i == 1) {  // beside the running ranges of q
            got[i] = current(64, s.bits, s.stochastic, n), want[i] = current(64, s.bits, s.stochastic, n);
            kernels::plain::quantize_current(part(i), want[i].layout, s.bits, s.stochastic, want[i].key, want[i].step, want[i].offset,
                                             want[i].codes, want[i].counts);
            continue;
          }
          const auto all = layouts(n / C, C, H);
          const GroupLayout& layout = all[(i + s.bits / 4) % 3];  // by head, by layer and by channel in turn
          got[i] = running(layout, s.bits, s.stochastic, n, s.in_place), want[i] = running(layout, s.bits, s.stochastic, n, s.in_place);
          staged(kernels::cuda::quantize_running)(part(i), want[i]);
        }
        staged(kernels::cuda::fused_attention)(part(0), part(1), part(2), H, 0.125, o, lse, got, windows);
        for (int i = 0; i < 3; ++i)
          if (i != without) REQUIRE((written(got[i]) == written(want[i])));
        CHECK(o.to_vector<double>() == want_o.to_vector<double>());
        CHECK(lse.to_vector<double>() == want_lse.to_vector<double>());
      }
}

TEST_CASE("coded operands: kernels that decode as they read compute what they would of the decoded tensor", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{40, 64}, {33, 72}, {7, 50}, {1, 8}, {129, 32}})
    for (const DType type : {DType::f32, DType::bf16, DType::f64})
      for (const int bits : {8, 4, 2})
        for (const GroupLayout& layout : {GroupLayout{1, (rows * width + 63) / 64, 64, true}, GroupLayout{rows, width, 1, false},
                                          GroupLayout{rows, 2, width / 2, false}, GroupLayout{1, 1, rows * width, false}}) {
          CAPTURE(rows, width, to_string(type), bits, layout.groups, layout.inner);
          const Tensor x = random({rows, width}, type, "x"), decoded = empty_like(x), dy = random({rows, width}, type, "dy");
          const Tensor step = Tensor::zeros({layout.groups}, DType::f32), offset = Tensor::zeros({layout.groups}, DType::f32);
          const Tensor codes = Tensor::zeros({(x.numel() * bits + 7) / 8}, DType::u8);
          kernels::plain::quantize_current(x, layout, bits, true, RandomKey::of(1, "codes", 2), step, offset, codes, {});
          staged(kernels::cuda::dequantize)(codes, layout, bits, step, offset, decoded);
          const kernels::Coded coded{codes, step, offset, layout, bits};
          const Tensor got = empty_like(x), want = empty_like(x), got_y = empty_like(x), want_y = empty_like(x);
          staged(kernels::cuda::gelu)(decoded, want_y);
          staged(kernels::cuda::gelu_coded)(coded, got_y);
          REQUIRE((bits_of(got_y) == bits_of(want_y)));
          staged(kernels::cuda::gelu_grad)(dy, decoded, want, Tensor());
          staged(kernels::cuda::gelu_grad_coded)(dy, coded, got, Tensor());
          REQUIRE((bits_of(got) == bits_of(want)));
          kernels::fill(got_y, 0), kernels::copy(dy, got);
          staged(kernels::cuda::gelu_grad_coded)(got, coded, got, got_y);  // both at once, in place
          REQUIRE((bits_of(got) == bits_of(want)));
          REQUIRE((bits_of(got_y) == bits_of(want_y)));
          const DType wide = type == DType::f64 ? DType::f64 : DType::f32;
          const Tensor gamma = random({width}, wide, "gamma"), beta = random({width}, wide, "beta");
          staged(kernels::cuda::affine)(decoded, gamma, beta, want);
          staged(kernels::cuda::affine_coded)(coded, gamma, beta, got);
          REQUIRE((bits_of(got) == bits_of(want)));
        }
}

TEST_CASE("coded operands: layer norm's gradient from codes is that from the decoded tensor", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  for (const auto& [rows, width] : {std::array<int64_t, 2>{40, 384}, {20, 192}, {9, 768}, {40, 64}, {7, 50}, {3, 2048}, {1, 8}})
    for (const auto& [type_dy, type_dx] : {std::pair{DType::bf16, DType::f32}, {DType::f32, DType::f32}, {DType::bf16, DType::bf16}})
      for (const int bits : {8, 4, 2})
        for (const GroupLayout& layout : {GroupLayout{1, (rows * width + 255) / 256, 256, true}, GroupLayout{rows, 2, width / 2, false},
                                          GroupLayout{rows, width, 1, false}, GroupLayout{1, 1, rows * width, false}}) {
          CAPTURE(rows, width, to_string(type_dy), to_string(type_dx), bits, layout.groups, layout.inner);
          const Tensor xhat = random({rows, width}, type_dy, "xhat"), decoded = empty_like(xhat), dy = random({rows, width}, type_dy, "dy");
          const Tensor step = Tensor::zeros({layout.groups}, DType::f32), offset = Tensor::zeros({layout.groups}, DType::f32);
          const Tensor codes = Tensor::zeros({(xhat.numel() * bits + 7) / 8}, DType::u8);
          kernels::plain::quantize_current(xhat, layout, bits, true, RandomKey::of(1, "codes", 2), step, offset, codes, {});
          staged(kernels::cuda::dequantize)(codes, layout, bits, step, offset, decoded);
          const Tensor rstd = random({rows}, DType::f32, "rstd"), gamma = random({width}, DType::f32, "gamma"),
                       beta = random({width}, DType::f32, "beta");
          const auto room = [&, rows = rows, width = width, type_dx = type_dx] {
            kernels::LayerNormGrads to;
            to.dx = random({rows, width}, type_dx, "residual");
            to.dgamma = random({width}, DType::f32, "dgamma"), to.dbeta = Tensor::zeros({width}, DType::f32);
            to.add_gamma = true;
            return to;
          };
          const auto compare = [&](const kernels::LayerNormGrads& got, const kernels::LayerNormGrads& want) {
            staged(kernels::cuda::layer_norm_grad)(dy, decoded, rstd, gamma, beta, want);
            staged(kernels::cuda::layer_norm_grad_coded)(dy, kernels::Coded{codes, step, offset, layout, bits}, rstd, gamma, beta, got);
            for (const auto part : {&kernels::LayerNormGrads::dx, &kernels::LayerNormGrads::dgamma, &kernels::LayerNormGrads::dbeta,
                                    &kernels::LayerNormGrads::dx_copy, &kernels::LayerNormGrads::y})
              if ((got.*part).defined()) REQUIRE((bits_of(got.*part) == bits_of(want.*part)));
          };
          const kernels::LayerNormGrads first = room();
          compare(first, room());
          kernels::LayerNormGrads alone = room(), all = room(), also = room();
          alone.dgamma = alone.dbeta = Tensor();
          compare(alone, room());
          REQUIRE((bits_of(alone.dx) == bits_of(first.dx)));
          for (kernels::LayerNormGrads* to : {&all, &also}) {
            to->add_x = true;
            to->y = empty_like(xhat), to->dx_copy = Tensor::empty({rows, width}, DType::bf16);
            to->copy_factors = random({rows % 4 == 0 ? rows / 4 : 1}, DType::f32, "factors");
          }
          compare(all, also);
          REQUIRE((bits_of(all.dx) != bits_of(alone.dx)));
          const Tensor over = empty_like(dy);  // y in dy's place
          kernels::copy(dy, over);
          kernels::LayerNormGrads in_place = room();
          in_place.add_x = true, in_place.y = over;
          staged(kernels::cuda::layer_norm_grad_coded)(over, kernels::Coded{codes, step, offset, layout, bits}, rstd, gamma, beta,
                                                       in_place);
          REQUIRE((bits_of(in_place.y) == bits_of(all.y)));
          REQUIRE((bits_of(in_place.dx) == bits_of(all.dx)));
          REQUIRE((bits_of(in_place.dgamma) == bits_of(all.dgamma)));
        }
}
