// Kernels beside those of a ViT's step, at extents that go well beyond caches: losses of as many rows as there are tokens, grids of a
// ResNet's and a Swin's first stage.
#include "kernel_work.h"

#include <cmath>

#include "mesa/kernels/attention.h"
#include "mesa/kernels/batch_norm.h"
#include "mesa/kernels/conv.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "mesa/kernels/loss.h"
#include "mesa/kernels/norm.h"

namespace mesa {

Tensor random_values(const Shape& shape, DType dtype, Device device) {
  RandomStream random(RandomKey::of(1, to_string(shape), 0));
  std::vector<float> block(4096);
  for (float& v : block) v = static_cast<float>(random.normal());
  std::vector<float> all(static_cast<size_t>(shape.numel()));
  for (size_t i = 0; i < all.size(); ++i) all[i] = block[(i * 7 + i / 4096) % 4096];
  const Tensor converted = Tensor::empty(shape, dtype);
  kernels::copy(Tensor::from<float>(shape, all), converted);
  return to(converted, device);
}

Tensor WorkList::values(const Shape& shape, DType dtype) const {
  Tensor& drawn = (*drawn_)[{std::vector<int64_t>(shape.begin(), shape.end()), dtype}];
  if (!drawn.defined()) drawn = random_values(shape, dtype, e_.device);
  const Tensor own = room(shape, dtype);
  kernels::copy(drawn, own);
  return own;
}

namespace {

class FurtherKernels : public WorkList {
 public:
  using WorkList::WorkList;

  void fill() {
    scores();
    losses();
    independent_classes();
    if (on_gpu())
      for (int bits : {8, 4, 2}) running_codes(bits);
    tokens_of_images();
    batch_norm();
    pooling();
    windows();
  }

 private:
  void scores() {
    const Tensor s = values({e_.B, e_.H, e_.N, e_.N}, e_.type), p = room(s.shape(), e_.type), dp = values(s.shape(), e_.type);
    const double n = static_cast<double>(s.numel()), w = width(e_.type);
    add("softmax", n * 2 * w, 0, [=] { kernels::softmax(s, p); });
    add("softmax_grad", n * 3 * w, 0, [=] { kernels::softmax_grad(dp, s, p); });
  }

  Tensor labels() const {
    std::vector<int64_t> all(static_cast<size_t>(e_.B * e_.N));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i * 7919) % e_.classes;
    return to(Tensor::from<int64_t>({e_.B * e_.N}, all), e_.device);
  }
  /// Every sample is mixed with its neighbour, outside of a box.
  Tensor mixing(int64_t samples) const {
    const float side = static_cast<float>(e_.image);
    std::vector<float> all;
    for (int64_t b = 0; b < samples; ++b) all.insert(all.end(), {0, 0, 0, side / 2, side / 2, 0.75f});
    return to(Tensor::from<float>({samples, Mixing::kNumbers}, all), e_.device);
  }

  void losses() {
    const Tensor logits = values({e_.B * e_.N, e_.classes}, DType::f32), targets = values(logits.shape(), DType::f32);
    const Tensor dlogits = room(logits.shape(), DType::f32), loss = room({e_.B * e_.N}, DType::f32), dloss = room({1}, DType::f32);
    const Tensor labels = this->labels(), mixing = this->mixing(e_.B * e_.N / 2 * 2), chosen = empty_like(labels);
    const Tensor paired = labels.narrow(0, 0, mixing.dim(0)), their_targets = room({mixing.dim(0), e_.classes}, DType::f32);
    kernels::fill(dloss, 1);
    const double n = static_cast<double>(logits.numel());
    add("cross_entropy", n * 4, 0, [=] { kernels::cross_entropy(logits, labels, 0.1, loss); });
    add("cross_entropy_grad", n * 8, 0, [=] { kernels::cross_entropy_grad(dloss, logits, labels, 0.1, dlogits); });
    add("cross_entropy_soft", n * 8, 0, [=] { kernels::cross_entropy_soft(logits, targets, loss); });
    add("cross_entropy_soft_grad", n * 12, 0, [=] { kernels::cross_entropy_soft_grad(dloss, logits, targets, dlogits); });
    add("mixed_targets", static_cast<double>(their_targets.numel()) * 4, 0,
        [=] { kernels::mixed_targets(paired, mixing, 0.1, -1, their_targets); });
    add("argmax", n * 4, 0, [=] { kernels::argmax(logits, chosen); });
  }

  void independent_classes() {
    const Tensor logits = values({e_.B * e_.N, e_.classes}, DType::f32), targets = room(logits.shape(), DType::f32);
    const Tensor dlogits = room(logits.shape(), DType::f32), loss = room({e_.B * e_.N}, DType::f32), dloss = room({1}, DType::f32);
    kernels::fill(targets, 0.25), kernels::fill(dloss, 1);
    const double n = static_cast<double>(logits.numel());
    add("binary_cross_entropy", n * 8, 0, [=] { kernels::binary_cross_entropy(logits, targets, loss); });
    add("binary_cross_entropy_grad", n * 12, 0, [=] { kernels::binary_cross_entropy_grad(dloss, logits, targets, dlogits); });
  }

  using Codes = kernels::QkvCodes::value_type;
  /// By heads of a tensor of so many channels, by ranges that suit normal values and stay as they are.
  Codes codes(int64_t channels, int bits) const {
    Codes c;
    c.layout = {e_.B * e_.N, e_.H, channels / e_.H, false};
    c.bits = bits;
    c.key = RandomKey{5, 6};
    c.alpha = c.next_alpha = room({e_.H}, DType::f32), c.beta = c.next_beta = room({e_.H}, DType::f32);
    kernels::fill(c.alpha, 8), kernels::fill(c.beta, -4);
    c.decay = 1;
    c.step = room({e_.H}, DType::f32), c.offset = room({e_.H}, DType::f32);
    c.codes = room({(e_.B * e_.N * channels * bits + 7) / 8}, DType::u8);
    c.counts = Tensor::zeros({2}, DType::i64, e_.device);
    return c;
  }

  /// What writes and reads codes of running ranges; 8 bits are mostly among a step's kernels.
  void running_codes(int bits) {
    const std::string suffix = concat(" ", bits, " bits");
    const double n = e_.rows() * static_cast<double>(e_.C), m = e_.rows() * static_cast<double>(e_.hidden), w = width(e_.type);
    const double packed = bits / 8.0;
    const Tensor x = tokens(DType::f32), y = room(x.shape(), e_.type), rstd = room({e_.B * e_.N}, DType::f32);
    const Tensor gamma = values({e_.C}, DType::f32), beta = values({e_.C}, DType::f32);
    const Tensor h = values({e_.B, e_.N, e_.hidden}, e_.type), g = empty_like(h), dg = values(h.shape(), e_.type), dh = empty_like(h);
    const Codes of_x = codes(e_.C, bits), of_h = codes(e_.hidden, bits);
    kernels::layer_norm_codes(x, gamma, beta, 1e-6, y, rstd, of_x);
    kernels::quantize_running(h, of_h);
    const kernels::Coded xhat{of_x.codes, of_x.step, of_x.offset, of_x.layout, bits},
        coded{of_h.codes, of_h.step, of_h.offset, of_h.layout, bits};
    if (bits < 8) {
      add("layer_norm, codes" + suffix, n * (4 + w + packed), 0, [=] { kernels::layer_norm_codes(x, gamma, beta, 1e-6, y, rstd, of_x); });
      add("gelu, codes" + suffix, m * (2 * w + packed), 0, [=] { kernels::gelu_codes(h, g, of_h); });
      add("gelu_grad and gelu, coded" + suffix, m * (3 * w + packed), 0, [=] { kernels::gelu_grad_coded(dg, coded, dh, g); });
      add("quantize, running heads," + suffix, m * (w + packed), 0, [=] { kernels::quantize_running(h, of_h); });
    }
    add("affine, coded" + suffix, n * (w + packed), 0, [=] { kernels::affine_coded(xhat, gamma, beta, y); });
    add("gelu, coded" + suffix, m * (w + packed), 0, [=] { kernels::gelu_coded(coded, g); });
    add("gelu_grad, coded" + suffix, m * (2 * w + packed), 0, [=] { kernels::gelu_grad_coded(dg, coded, dh, Tensor()); });
    add("dequantize, heads," + suffix, m * (w + packed), 0,
        [=] { kernels::dequantize(coded.codes, coded.layout, bits, coded.step, coded.offset, g); });
  }

  void tokens_of_images() {
    const Tensor pixels = Tensor::zeros({e_.B, e_.image, e_.image, e_.channels}, DType::u8, e_.device);
    const Tensor images = room({e_.B, e_.channels, e_.image, e_.image}, e_.pictures());
    const int64_t side = e_.image / e_.patch;
    const Tensor patches = values({e_.B, side * side, e_.channels * e_.patch * e_.patch}, e_.type);
    const double p = static_cast<double>(images.numel()), n = e_.rows() * static_cast<double>(e_.C);
    const std::vector<float> half(static_cast<size_t>(e_.channels), 0.5f);
    if (e_.B % 2 == 0)
      add("normalize_images, mixed", p * (1 + width(e_.pictures())), 0,  // the neighbours' pixels are found in the cache
          [=, mixing = mixing(e_.B)] { kernels::normalize_images(pixels, half, half, Tensor(), mixing, images); });
    add("scatter_patches", p * (width(e_.pictures()) + width(e_.type)), 0,
        [=, patch = e_.patch] { kernels::scatter_patches(patches, patch, images); });
    const Tensor x = tokens(DType::f32), y = room({e_.B, e_.N + 1, e_.C}, DType::f32), position = values({e_.N, e_.C}, DType::f32);
    const Tensor token = values({1, e_.C}, DType::f32), mean = values({e_.B, e_.C}, DType::f32), sum = empty_like(x);
    add("prepend_tokens", n * 8, 0, [=] { kernels::prepend_tokens(token, x, y); });
    add("add_rows (positions)", n * 8, 0, [=] { kernels::add_rows(x, position, sum); });
    add("mean_tokens", n * 4, 0, [=] { kernels::mean_tokens(x, 1, mean); });
    add("mean_tokens_grad", n * 4, 0, [=] { kernels::mean_tokens_grad(mean, 1, sum); });
  }

  static constexpr int64_t kStem = 64;  // channels of a ResNet's first stage

  void batch_norm() {
    const Tensor x = values({e_.B, (e_.image / 4) * (e_.image / 4), kStem}, e_.type), y = empty_like(x), xhat = empty_like(x),
                 dx = empty_like(x);
    const Tensor mean = values({kStem}, DType::f32), gamma = values({kStem}, DType::f32), beta = values({kStem}, DType::f32);
    const Tensor rstd = room({kStem}, DType::f32), dgamma = empty_like(rstd), dbeta = empty_like(rstd),
                 running = Tensor::zeros({kStem}, DType::f32, e_.device), var = Tensor::zeros({kStem}, DType::f32, e_.device);
    const Tensor mask = room({(x.numel() + 7) / 8}, DType::u8);
    const double n = static_cast<double>(x.numel()), w = width(e_.type);
    add("batch_statistics", n * w, 0, [=] { kernels::batch_statistics(x, 1e-5, 0.1, mean, rstd, running, var); });
    kernels::batch_statistics(x, 1e-5, 0.1, mean, rstd, running, var);
    add("batch_norm", n * 3 * w, 0, [=] { kernels::batch_norm(x, mean, rstd, gamma, beta, y, xhat); });
    kernels::batch_norm(x, mean, rstd, gamma, beta, y, xhat);
    add("batch_norm_sums", n * 2 * w, 0, [=] { kernels::batch_norm_sums(x, xhat, dgamma, dbeta); });
    kernels::batch_norm_sums(x, xhat, dgamma, dbeta);
    add("batch_norm_grad", n * 3 * w, 0, [=] { kernels::batch_norm_grad(x, xhat, rstd, gamma, dgamma, dbeta, dx); });
    add("relu_mask", n * (2 * w + 0.125), 0, [=] { kernels::relu_mask(x, y, mask); });
    kernels::relu_mask(x, y, mask);
    add("apply_mask", n * (2 * w + 0.125), 0, [=] { kernels::apply_mask(x, mask, dx); });
  }

  void pooling() {
    kernels::ConvGeometry g;
    g.height = g.width = e_.image / 2;
    g.kernel_height = g.kernel_width = 3, g.stride = 2, g.padding = 1;
    const Tensor x = values({e_.B, g.height * g.width, kStem}, e_.type), dx = empty_like(x);
    const Tensor y = room({e_.B, g.out_height() * g.out_width(), kStem}, e_.type), index = room(y.shape(), DType::u8);
    const double n = static_cast<double>(x.numel()), pooled = static_cast<double>(y.numel()), w = width(e_.type);
    add("max_pool", n * w + pooled * (w + 1), 0, [=] { kernels::max_pool(x, g, y, index); });
    kernels::max_pool(x, g, y, index);
    add("max_pool_grad", n * w + pooled * (w + 1), 0, [=] { kernels::max_pool_grad(y, index, g, dx); });
  }

  void windows() {
    constexpr int64_t C = 96, H = 3;  // Swin-T's first stage
    kernels::WindowBias bias;
    kernels::Windows& w = bias.windows;
    w.height = w.width = w.inner_height = w.inner_width = static_cast<int>(e_.image / 4);
    w.window_height = w.window_width = w.height % 7 == 0 ? 7 : w.height;
    w.shift_y = w.shift_x = w.window_height < w.height ? w.window_height / 2 : 0;
    bias.table = values({w.distances(), H}, DType::f32), bias.d_table = room(bias.table.shape(), DType::f32);
    const Tensor qkv = values({e_.B, w.tokens(), 3 * C}, e_.type), dqkv = empty_like(qkv), o = values({e_.B, w.tokens(), C}, e_.type);
    const Tensor d_o = values(o.shape(), e_.type), lse = room({e_.B * w.count(), H, w.length()}, DType::f32);
    const Tensor windowed = room({e_.B * w.count(), w.length(), C}, e_.type);
    const double n = static_cast<double>(o.numel()), product = 2 * n * w.length(), scale = 1 / std::sqrt(static_cast<double>(C / H));
    const auto third = [](const Tensor& t, int i) { return t.narrow(-1, i * C, C); };
    add("gather_windows", n * 2 * width(e_.type), 0, [=] { kernels::gather_windows(o, w, 0, windowed); });
    add("scatter_windows", n * 2 * width(e_.type), 0, [=] { kernels::scatter_windows(windowed, w, 0, o); });
    add("attention in windows", 0, 2 * product,
        [=] { kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), H, scale, o, lse, kernels::AttentionBy::engine, {}, bias); });
    kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), H, scale, o, lse, kernels::AttentionBy::engine, {}, bias);
    add("attention_grad in windows", 0, 5 * product, [=] {
      kernels::attention_grad(d_o, {third(qkv, 0), {}}, {third(qkv, 1), {}}, {third(qkv, 2), {}}, o, lse, H, scale, third(dqkv, 0),
                              third(dqkv, 1), third(dqkv, 2), kernels::AttentionBy::engine, bias);
    });
  }
};

}  // namespace

std::vector<Work> further_kernels(const Extents& e, std::shared_ptr<DrawnValues> drawn) {
  FurtherKernels list(e, std::move(drawn));
  list.fill();
  return list.take();
}

}  // namespace mesa
