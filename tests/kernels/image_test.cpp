// Images to tokens and back, element by element, on every instruction set this CPU has.
#include "mesa/kernels/image.h"

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f64};

}  // namespace

TEST_CASE("normalize_images turns pixels into planes", "[kernels]") {
  const std::vector<float> mean{0.485f, 0.456f, 0.406f, 0.5f}, deviation{0.229f, 0.224f, 0.225f, 0.25f};
  for (const int64_t channels : {1, 3, 4})
    for (const int64_t size : {1, 5, 32, 61}) {
      std::vector<uint8_t> values(2 * size * (size + 1) * channels);
      for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(mix64(i) & 255);
      const Tensor pixels = Tensor::from<uint8_t>({2, size, size + 1, channels}, values);
      const std::vector<float> m(mean.begin(), mean.begin() + channels), d(deviation.begin(), deviation.begin() + channels);
      for (const DType dtype : kFloats)
        for (const auto& run : implementations(kernels::normalize_images)) {
          const Tensor y = Tensor::empty({2, channels, size, size + 1}, dtype);
          run(pixels, m, d, {}, {}, y);
          const std::vector<double> got = y.to_vector<double>();
          const int64_t plane = size * (size + 1);
          double worst = 0;
          for (int64_t i = 0; i < y.numel(); ++i) {
            const int64_t b = i / plane / channels, c = i / plane % channels;
            const double want = (values[(b * plane + i % plane) * channels + c] / 255.0 - mean[c]) / deviation[c];
            worst = worse(worst, std::fabs(got[i] - want));
          }
          CHECK(worst < (dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 5e-7 : 0.01));
        }
    }
}

TEST_CASE("normalize_images mixes each picture with its neighbour", "[kernels]") {
  // Nothing, Mixup, CutMix of a box, of a corner, an empty box, of everything.
  const std::vector<Mixing> mixing{{1, 0, 0, 4, 4, 1},    {0.75f, 0, 0, 6, 8, 0.75f}, {0, 1, 2, 4, 7, 0.5f},
                                   {0, 0, 0, 1, 1, 0.9f}, {0, 3, 3, 3, 3, 1},         {0, 0, 0, 6, 8, 0}};
  const int64_t batch = 6, height = 6, width = 8;
  const Tensor rows = Tensor::empty({batch, Mixing::kNumbers}, DType::f32);
  std::memcpy(rows.data<float>(), mixing.data(), mixing.size() * sizeof(Mixing));
  for (const int64_t channels : {1, 3}) {
    std::vector<uint8_t> values(batch * height * width * channels);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(mix64(i + 7) & 255);
    const Tensor pixels = Tensor::from<uint8_t>({batch, height, width, channels}, values);
    const std::vector<float> mean(channels, 0.5f), deviation(channels, 0.25f);
    std::vector<double> want;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x) {
            const Mixing& m = mixing[b];
            const auto pixel = [&](int64_t of) { return values[((of * height + y) * width + x) * channels + c] / 255.0; };
            const bool within = y >= m.y0 && y < m.y1 && x >= m.x0 && x < m.x1;
            const double own = within ? m.inside : 1, mixed = own * pixel(b) + (1 - own) * pixel(b ^ 1);
            want.push_back((mixed - 0.5) / 0.25);
          }
    for (const DType dtype : kFloats)
      for (const auto& run : implementations(kernels::normalize_images)) {
        CAPTURE(channels, to_string(dtype));
        const Tensor y = Tensor::empty({batch, channels, height, width}, dtype);
        run(pixels, mean, deviation, {}, rows, y);
        expect(y, want, dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 0.008);
      }
  }
}

TEST_CASE("normalize_images reads mirrored pictures from right to left, before they are mixed", "[kernels]") {
  for (const auto& [height, width, channels] : {std::array<int64_t, 3>{6, 8, 3}, {5, 7, 3}, {4, 16, 1}, {3, 32, 3}}) {
    const int64_t batch = 6;
    const std::vector<uint8_t> flags{0, 1, 1, 0, 2, 1};
    const std::vector<Mixing> mixing{{1, 0, 0, 1, 1, 1},    {0.75f, 0, 0, 3, 7, 0.75f}, {0, 1, 2, 3, 6, 0.5f},
                                     {0, 0, 0, 1, 1, 0.9f}, {1, 0, 0, 1, 1, 1},         {0, 0, 0, 3, 7, 0}};
    const Tensor rows = Tensor::empty({batch, Mixing::kNumbers}, DType::f32);
    std::memcpy(rows.data<float>(), mixing.data(), mixing.size() * sizeof(Mixing));
    std::vector<uint8_t> values(batch * height * width * channels), turned(values.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(mix64(i + 3) & 255);
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) % channels, x = static_cast<int64_t>(i) / channels % width;
      const int64_t line = static_cast<int64_t>(i) / channels / width, b = line / height;
      turned[i] = values[(line * width + (flags[b] != 0 ? width - 1 - x : x)) * channels + c];
    }
    const Shape shape{batch, height, width, channels};
    const Tensor pixels = Tensor::from<uint8_t>(shape, values), upright = Tensor::from<uint8_t>(shape, turned);
    const Tensor mirrored = Tensor::from<uint8_t>({batch}, flags);
    const std::vector<float> mean(channels, 0.5f), deviation(channels, 0.25f);
    for (const DType dtype : kFloats)
      for (const Tensor& mixed : {Tensor(), rows})
        for (const auto& run : implementations(kernels::normalize_images)) {
          CAPTURE(height, width, channels, to_string(dtype), mixed.defined());
          const Tensor y = Tensor::empty({batch, channels, height, width}, dtype), want = empty_like(y);
          run(upright, mean, deviation, {}, mixed, want);
          run(pixels, mean, deviation, mirrored, mixed, y);
          CHECK(y.to_vector<double>() == want.to_vector<double>());
        }
  }
}

TEST_CASE("patches are extracted in convolution order and scattered back", "[kernels]") {
  for (const DType dtype : kFloats)
    for (const int64_t p : {1, 2, 4, 7, 16}) {
      CAPTURE(to_string(dtype), p);
      const int64_t batch = 2, channels = 3, height = 2 * p, width = 3 * p;
      const Tensor x = random({batch, channels, height, width}, dtype, "x");
      const std::vector<double> vx = x.to_vector<double>();
      const Tensor y = Tensor::empty({batch, 6, channels * p * p}, dtype), back = empty_like(x);
      const auto scatters = implementations(kernels::scatter_patches);
      size_t which = 0;
      for (const auto& run : implementations(kernels::extract_patches)) {
        run(x, p, y);
        const std::vector<double> got = y.to_vector<double>();
        size_t i = 0, wrong = 0;
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t token = 0; token < 6; ++token)
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t row = token / 3 * p; row < token / 3 * p + p; ++row)
                for (int64_t column = token % 3 * p; column < token % 3 * p + p; ++column)
                  wrong += got[i++] != vx[((b * channels + c) * height + row) * width + column];
        CHECK(wrong == 0);
        kernels::fill(back, 0);
        scatters[which++](y, p, back);
        CHECK(back.to_vector<double>() == vx);
      }
    }
  const Tensor x = Tensor::zeros({1, 3, 6, 6}, DType::f32);
  CHECK_THROWS_AS(kernels::extract_patches(x, 4, Tensor::zeros({1, 4, 27}, DType::f32)), Error);
}

TEST_CASE("prepend_tokens puts the tokens first", "[kernels]") {
  for (const DType dtype : kFloats)
    for (const int64_t before : {1, 3}) {
      const int64_t batch = 3, tokens = 9, width = 65;
      const Tensor front = random({before, width}, dtype == DType::f64 ? dtype : DType::f32, "tokens"),
                   x = random({batch, tokens, width}, dtype, "x");
      const Tensor y = Tensor::empty({batch, before + tokens, width}, dtype), rounded = Tensor::empty({before, width}, dtype);
      kernels::copy(front, rounded);
      const std::vector<double> vt = rounded.to_vector<double>(), vx = x.to_vector<double>();
      for (const auto& run : implementations(kernels::prepend_tokens)) {
        run(front, x, y);
        const std::vector<double> got = y.to_vector<double>();
        size_t i = 0, wrong = 0;
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t n = 0; n < before + tokens; ++n)
            for (int64_t c = 0; c < width; ++c)
              wrong += got[i++] != (n < before ? vt[n * width + c] : vx[(b * tokens + n - before) * width + c]);
        CHECK(wrong == 0);
      }
    }
}

TEST_CASE("mean_tokens and its gradient", "[kernels]") {
  for (const DType dtype : kFloats)
    for (const int64_t from : {0, 1, 5}) {
      const int64_t batch = 3, tokens = 50, width = 197;
      const Tensor x = random({batch, tokens, width}, dtype, "x"), y = Tensor::empty({batch, width}, dtype);
      const Tensor dy = random({batch, width}, dtype, "dy"), dx = empty_like(x);
      const std::vector<double> vx = x.to_vector<double>(), vdy = dy.to_vector<double>();
      std::vector<double> means(batch * width);
      for (int64_t i = 0; i < x.numel(); ++i)
        if (i / width % tokens >= from) means[i / width / tokens * width + i % width] += vx[i] / static_cast<double>(tokens - from);
      const double tolerance = dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 0.01;
      for (const auto& run : implementations(kernels::mean_tokens)) {
        run(x, from, y);
        for (size_t i = 0; i < means.size(); ++i) CHECK(y.to_vector<double>()[i] == Approx(means[i]).margin(tolerance).epsilon(tolerance));
      }
      for (const auto& run : implementations(kernels::mean_tokens_grad)) {
        run(dy, from, dx);
        const std::vector<double> got = dx.to_vector<double>();
        double worst = 0;
        for (int64_t i = 0; i < x.numel(); ++i) {
          const double share = i / width % tokens < from ? 0.0 : 1.0 / static_cast<double>(tokens - from);
          worst = worse(worst, std::fabs(got[i] - share * vdy[i / width / tokens * width + i % width]));
        }
        CHECK(worst < tolerance);
      }
    }
  const Tensor x = Tensor::zeros({1, 3, 4}, DType::f32), y = Tensor::zeros({1, 4}, DType::f32);
  CHECK_THROWS_AS(kernels::mean_tokens(x, 3, y), Error);
}
