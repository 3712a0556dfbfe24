#include "mesa/train/kernel_benchmark.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "kernel_work.h"
#include "mesa/base/cuda.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "mesa/kernels/loss.h"
#include "mesa/kernels/matmul.h"
#include "mesa/kernels/norm.h"
#include "mesa/kernels/optimizer.h"
#include "mesa/train/plan.h"

namespace mesa {
namespace {

using Clock = std::chrono::steady_clock;

/// What a ViT's step runs.
class Bench : public WorkList {
 public:
  using WorkList::WorkList;

  std::vector<Work> work() {
    normalization();
    pointwise();
    codecs();
    attention();
    products();
    ends();
    return take();
  }

 private:
  /// 8-bit codes by heads of a tensor of so many channels, by ranges that suit normal values and stay as they are.
  kernels::Coding running_codes(int64_t channels) const {
    kernels::Coding r;
    r.layout = {e_.B * e_.N, e_.H, channels / e_.H, false};
    r.key = RandomKey{5, 6};
    r.alpha = r.next_alpha = room({e_.H}, DType::f32), r.beta = r.next_beta = room({e_.H}, DType::f32);
    kernels::fill(r.alpha, 8), kernels::fill(r.beta, -4);
    r.decay = 1;
    r.step = room({e_.H}, DType::f32), r.offset = room({e_.H}, DType::f32), r.codes = room({e_.B * e_.N * channels}, DType::u8);
    r.counts = Tensor::zeros({2}, DType::i64, e_.device);
    return r;
  }
  /// Codes of a tensor of n elements by the own ranges of runs of 256, as the storage presets have them.
  kernels::Coding current_codes(int64_t n, int bits) const {
    kernels::Coding c;
    c.layout = {1, (n + 255) / 256, 256, true};
    c.bits = bits, c.stochastic = bits < 8, c.key = RandomKey{5, 6};
    c.step = room({c.layout.groups}, DType::f32), c.offset = room({c.layout.groups}, DType::f32), c.codes = room({n * bits / 8}, DType::u8);
    c.counts = Tensor::zeros({2}, DType::i64, e_.device);
    return c;
  }

  void normalization() {
    const double n = e_.rows() * static_cast<double>(e_.C), w = width(e_.type);
    const Tensor x = tokens(DType::f32), y = room(x.shape(), e_.type), xhat = room(x.shape(), e_.type),
                 rstd = room({e_.B * e_.N}, DType::f32);
    const Tensor gamma = values({e_.C}, DType::f32), beta = values({e_.C}, DType::f32), dgamma = room({e_.C}, DType::f32),
                 dbeta = room({e_.C}, DType::f32);
    const Tensor dy = tokens(e_.type), dx = room(x.shape(), DType::f32);
    const bool copies = e_.type == DType::bf16;
    const double copied = copies ? 2 : 0;
    const Tensor sums = on_gpu() ? room({kernels::layer_norm_grad_parts(e_.B * e_.N, e_.C), e_.C}, DType::f32) : Tensor();
    const double summed = on_gpu() ? static_cast<double>(sums.bytes()) : 0;
    const kernels::LayerNormGrads alone{.dx = dx, .dgamma = dgamma, .dbeta = dbeta};
    // Added to the residual's, which the next products take in bf16, with its sums for their bias, and y rebuilt.
    kernels::LayerNormGrads in_a_block = alone;
    in_a_block.add_x = true, in_a_block.y = y, in_a_block.dx_copy = copies ? room(x.shape(), DType::bf16) : Tensor();
    in_a_block.dx_sums = sums;
    add("layer_norm", n * (4 + 2 * w), 0, [=] { kernels::layer_norm(x, gamma, beta, 1e-6, y, xhat, rstd); });
    kernels::layer_norm(x, gamma, beta, 1e-6, y, xhat, rstd);
    if (on_gpu())
      add("layer_norm, codes 8 bits", n * (4 + w + 1), 0,
          [=, to = running_codes(e_.C)] { kernels::layer_norm_codes(x, gamma, beta, 1e-6, y, rstd, to); });
    for (const int bits : {8, 4}) {
      if (!on_gpu()) break;
      const kernels::Coding to = current_codes(xhat.numel(), bits);
      const std::string suffix = concat("codes of runs, ", bits, " bits");
      add("layer_norm, " + suffix, n * (4 + w + bits / 8.0), 0, [=] { kernels::layer_norm_codes(x, gamma, beta, 1e-6, y, rstd, to); });
      kernels::encode(xhat, to);
      const kernels::Coded coded{to.codes, to.step, to.offset, to.layout, bits};
      add("layer_norm_grad, " + suffix, n * (2 * w + 8 + bits / 8.0 + copied) + summed, 0,
          [=] { kernels::layer_norm_grad_coded(dy, coded, rstd, gamma, beta, in_a_block); });
    }
    if (copies) {
      kernels::LayerNormGrads dropped = in_a_block;
      dropped.copy_factors = values({e_.B}, DType::f32);
      add("layer_norm_grad, behind drop path", n * (3 * w + 8 + copied) + summed, 0,
          [=] { kernels::layer_norm_grad(dy, xhat, rstd, gamma, beta, dropped); });
    }
    add("affine", n * 2 * w, 0, [=] { kernels::affine(xhat, gamma, beta, y); });
    add("layer_norm_grad", n * (2 * w + 4), 0, [=] { kernels::layer_norm_grad(dy, xhat, rstd, gamma, beta, alone); });
    add("layer_norm_grad, in a block", n * (3 * w + 8 + copied) + summed, 0,
        [=] { kernels::layer_norm_grad(dy, xhat, rstd, gamma, beta, in_a_block); });
  }

  /// As behind a linear layer with a bias, whose gradient they are.
  void gelu_with_sums(const Tensor& h, const Tensor& dg, const Tensor& dh, const Tensor& g) {
    const double m = static_cast<double>(h.numel()), w = width(e_.type);
    const Tensor sums = room({kernels::sum_parts(h.rows(), h.dim(-1)), h.dim(-1)}, DType::f32), db = room({h.dim(-1)}, DType::f32);
    const double moved = 2.0 * static_cast<double>(sums.bytes());
    add("gelu_grad and gelu, with sums", m * 4 * w + moved, 0, [=] {
      kernels::gelu_grad_sums(dg, h, dh, g, sums);
      kernels::sum_rows(sums, db, false);
    });
    for (const int bits : {8, 4}) {
      const kernels::Coding runs = current_codes(h.numel(), bits);
      kernels::encode(h, runs);
      const kernels::Coded coded{runs.codes, runs.step, runs.offset, runs.layout, runs.bits};
      add(concat("gelu_grad and gelu, with sums, coded in runs, ", bits, " bits"), m * (3 * w + bits / 8.0) + moved, 0, [=] {
        kernels::gelu_grad_coded_sums(dg, coded, dh, g, sums);
        kernels::sum_rows(sums, db, false);
      });
    }
  }

  void pointwise() {
    const double m = e_.rows() * static_cast<double>(e_.hidden), n = e_.rows() * static_cast<double>(e_.C), w = width(e_.type);
    const Tensor h = values({e_.B, e_.N, e_.hidden}, e_.type), g = empty_like(h), dg = values(h.shape(), e_.type), dh = empty_like(h);
    const Tensor residual = tokens(DType::f32), branch = tokens(e_.type), sum = room(residual.shape(), DType::f32);
    const Tensor db = room({e_.hidden}, DType::f32);
    add("gelu", m * 2 * w, 0, [=] { kernels::gelu(h, g); });
    if (on_gpu()) add("gelu, codes 8 bits", m * (2 * w + 1), 0, [=, to = running_codes(e_.hidden)] { kernels::gelu_codes(h, g, to); });
    for (const int bits : {8, 4})
      if (on_gpu())
        add(concat("gelu, codes of runs, ", bits, " bits"), m * (2 * w + bits / 8.0), 0,
            [=, to = current_codes(h.numel(), bits)] { kernels::gelu_codes(h, g, to); });
    add("gelu_grad", m * 3 * w, 0, [=] { kernels::gelu_grad(dg, h, dh, Tensor()); });
    add("gelu_grad and gelu", m * 4 * w, 0, [=] { kernels::gelu_grad(dg, h, dh, g); });
    if (on_gpu()) {
      const kernels::Coding to = running_codes(e_.hidden);
      kernels::quantize_running(h, to);
      const kernels::Coded coded{to.codes, to.step, to.offset, to.layout, to.bits};
      add("gelu_grad and gelu, coded 8 bits", m * (3 * w + 1), 0, [=] { kernels::gelu_grad_coded(dg, coded, dh, g); });
      gelu_with_sums(h, dg, dh, g);
    }
    add("mul", m * 3 * w, 0, [=] { kernels::mul(dg, h, dh); });
    add("add (residual)", n * (8 + w), 0, [=] { kernels::add(residual, branch, sum); });
    add("dropout", m * 2 * w, 0, [=] { kernels::dropout(h, g, 0.1, RandomKey{3, 4}); });
    add("add_drop_path", n * (8 + w), 0, [=, factors = room({e_.B}, DType::f32)] {
      kernels::add_drop_path(residual, branch, 0.1, RandomKey{3, 4}, sum, factors);
    });
    const Shape samples{e_.B, e_.N * e_.C};
    add("scale_rows (of samples)", n * (4 + w), 0,
        [from = residual.reshape(samples), to = branch.reshape(samples), factors = values({e_.B}, DType::f32)] {
          kernels::scale_rows(from, factors, to);
        });
    add("sum_rows", m * w, 0, [=] { kernels::sum_rows(h, db, false); });
    add("copy to f32", n * (w + 4), 0, [=] { kernels::copy(branch, sum); });
  }

  void codecs() {
    const Tensor h = values({e_.B, e_.N, e_.hidden}, e_.type), back = empty_like(h);
    const double m = static_cast<double>(h.numel()), w = width(e_.type);
    const kernels::GroupLayout runs{1, (h.numel() + 255) / 256, 256, true};
    const Tensor counts = Tensor::zeros({2}, DType::i64, e_.device);
    for (int bits : {8, 4, 2}) {
      const Tensor codes = room({(h.numel() * bits + 7) / 8}, DType::u8), step = room({runs.groups}, DType::f32), offset = empty_like(step);
      const double packed = m * bits / 8, scales = 8.0 * static_cast<double>(runs.groups);
      const std::string suffix = concat(" ", bits, " bits");
      add("quantize, runs of 256," + suffix, m * w + packed + scales, 0, [=] {
        kernels::quantize_current(h, runs, bits, true, RandomKey{5, 6}, step, offset, codes, counts);
      });
      kernels::quantize_current(h, runs, bits, true, RandomKey{5, 6}, step, offset, codes, counts);
      add("dequantize," + suffix, m * w + packed + scales, 0, [=] { kernels::dequantize(codes, runs, bits, step, offset, back); });
    }
    add("quantize, running heads, 8 bits", m * (w + 1), 0, [=, to = running_codes(e_.hidden)] { kernels::quantize_running(h, to); });
  }

  void attention() {
    const Tensor qkv = values({e_.B, e_.N, 3 * e_.C}, e_.type), o = room({e_.B, e_.N, e_.C}, e_.type), d_o = tokens(e_.type);
    const Tensor lse = room({e_.B, e_.H, e_.N}, DType::f32), dqkv = empty_like(qkv);
    const auto third = [C = e_.C](const Tensor& t, int i) { return t.narrow(-1, i * C, C); };
    const double scale = 1 / std::sqrt(static_cast<double>(e_.C / e_.H));
    const double product = 2.0 * static_cast<double>(e_.B * e_.N * e_.N * e_.C);
    add("attention", 0, 2 * product, [=, H = e_.H] { kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), H, scale, o, lse); });
    kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), e_.H, scale, o, lse);
    const kernels::QkvCodes codes{running_codes(e_.C), running_codes(e_.C), running_codes(e_.C)};
    add("attention, codes 8 bits", 0, 2 * product, [=, H = e_.H] {
      kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), H, scale, o, lse, kernels::AttentionBy::engine, codes);
    });
    constexpr auto by = kernels::AttentionBy::engine;
    const int64_t parts = kernels::attention_grad_parts(d_o, e_.H, by, {});
    const Tensor sums = parts > 0 ? room({parts, 3 * e_.C}, DType::f32) : Tensor();  // for the bias in front
    const auto backward = [=, H = e_.H](const Tensor& out, const Tensor& rows) {
      kernels::attention_grad(d_o, {third(qkv, 0), {}}, {third(qkv, 1), {}}, {third(qkv, 2), {}}, out, rows, H, scale, third(dqkv, 0),
                              third(dqkv, 1), third(dqkv, 2), by, {}, sums);
    };
    add("attention_grad", 0, 5 * product, [=] { backward(o, lse); });
    add("attention_grad, rows again", 0, 5 * product, [=] { backward(Tensor(), Tensor()); });
  }

  void products() {
    const int64_t M = e_.B * e_.N;
    struct Linear {
      const char* name;
      int64_t in, out;
    };
    for (const Linear& l : {Linear{"qkv", e_.C, 3 * e_.C}, {"proj", e_.C, e_.C}, {"fc1", e_.C, e_.hidden}, {"fc2", e_.hidden, e_.C}}) {
      const Tensor x = values({M, l.in}, e_.type), w = values({l.out, l.in}, e_.type), y = room({M, l.out}, e_.type), dx = empty_like(x);
      const Tensor bias = values({l.out}, DType::f32), dw = room({l.out, l.in}, DType::f32), db = room({l.out}, DType::f32);
      kernels::copy(values(y.shape(), e_.type), y);
      const double flops = 2.0 * static_cast<double>(M) * static_cast<double>(l.in * l.out);
      add(concat(l.name, ": y = x w^T + b"), 0, flops, [=] { kernels::matmul(x, w.transpose(0, 1), y, bias); });
      if (l.out == e_.C) {
        const Tensor residual = values({M, l.out}, DType::f32), sum = empty_like(residual);
        add(concat(l.name, ": y = residual + x w^T + b"), 0, flops, [=] { kernels::matmul(x, w.transpose(0, 1), sum, bias, residual); });
      }
      add(concat(l.name, ": dx = dy w"), 0, flops, [=] { kernels::matmul(y, w, dx); });
      add(concat(l.name, ": dw, db"), 0, flops, [=] { kernels::matmul_weight_grad(y, x, dw, false, db, false); });
      add(concat(l.name, ": dw"), 0, flops, [=] { kernels::matmul_weight_grad(y, x, dw, false, Tensor(), false); });
    }
  }

  void ends() {
    const Tensor pixels = Tensor::zeros({e_.B, e_.image, e_.image, e_.channels}, DType::u8, e_.device);
    const Tensor images = room({e_.B, e_.channels, e_.image, e_.image}, e_.pictures());
    const int64_t side = e_.image / e_.patch, inner = e_.channels * e_.patch * e_.patch;
    const Tensor patches = room({e_.B, side * side, inner}, e_.type);
    const double p = static_cast<double>(images.numel()), picture = width(e_.pictures());
    const std::vector<float> half(static_cast<size_t>(e_.channels), 0.5f);
    add("normalize_images", p * (1 + picture), 0, [=] { kernels::normalize_images(pixels, half, half, Tensor(), Tensor(), images); });
    add("extract_patches", p * (picture + width(e_.type)), 0, [=, patch = e_.patch] { kernels::extract_patches(images, patch, patches); });
    // As many parameters as 12 blocks have.
    const Tensor w = values({e_.hidden * e_.C * 36}, DType::f32), g = values(w.shape(), DType::f32), m = room(w.shape(), DType::f32),
                 v = empty_like(m);
    const Tensor copy = e_.type == DType::bf16 ? room(w.shape(), DType::bf16) : Tensor();
    clear(m), clear(v);
    const std::vector<kernels::UpdateSlot> slots{{w, g, m, v, copy, 0.05, 1}};
    const std::vector<kernels::AverageSlot> averages{{m, w}};
    const double elements = static_cast<double>(w.numel()), copied = copy.defined() ? 2 : 0;
    add("adamw", elements * (28 + copied), 0, [=] { kernels::adamw(slots, kernels::AdamWStep{1e-4, 0.9, 0.999, 1e-8, 1, 5}); });
    add("sgd", elements * (20 + copied), 0, [=] { kernels::sgd(slots, kernels::SgdStep{1e-4, 0.9, false, 1}); });
    const Tensor squares_of_slot = room({1, 2}, DType::f64);
    add("lamb", elements * (40 + copied), 0, [=] {
      const kernels::LambStep step{1e-4, 0.9, 0.999, 1e-6, 1, 5, false};
      kernels::lamb_moments(slots, step, squares_of_slot);
      kernels::lamb(slots, step, squares_of_slot);
    });
    add("moving_average", elements * 12, 0, [=] { kernels::moving_average(averages, 0.999); });
    const std::vector<Tensor> gradients{g};
    const Tensor squares = room({1}, DType::f64);
    add("sum_squares", static_cast<double>(g.numel()) * 4, 0, [=] { kernels::sum_squares(gradients, squares); });
  }
};

using Call = std::function<void()>;
using Calls = std::vector<Call>;

/// Milliseconds that a device takes for f. `ahead` keeps a GPU busy while the host hands f over: of short kernels it would else wait for
/// the host, and look slow, or be seen to be no slower than a copy of which that is true as well.
double milliseconds_of(const Call& f, Device device, const Call& ahead) {
  if (is_gpu(device)) return 1e3 * cuda::seconds_of(f, ahead);
  const auto start = Clock::now();
  f();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// Milliseconds a call: several rounds, each of enough calls to hide the clock. The calls are of one kernel, on operands of their own, and
/// take turns.
Spread time_calls(const Calls& calls, Device device, const Call& ahead) {
  size_t next = 0;
  const auto round = [&](int64_t count) {
    const auto turns = [&] {
      for (int64_t i = 0; i < count; ++i) calls[next++ % calls.size()]();
    };
    return milliseconds_of(turns, device, ahead);
  };
  round(2);  // algorithms are chosen, memory is taken
  const double once = std::max(1e-3, round(1));
  const int64_t count = std::clamp<int64_t>(static_cast<int64_t>(20 / once), 1, 200);
  std::vector<double> ms;
  for (int i = 0; i < 5; ++i) ms.push_back(round(count) / static_cast<double>(count));
  return spread_of(std::move(ms));
}

/// What copies reach: of random values, since zeros move faster on some GPUs, and through all of two buffers in turns, so that a short one
/// does not find the last one's in the cache. On a GPU the faster of our kernel and the driver.
class Copies {
 public:
  /// `side` bytes in each buffer; 0 takes many more than the device's caches hold.
  Copies(Device device, int64_t side) : device_(device) {
    if (side == 0) side = device.kind == DeviceKind::cuda ? int64_t{1} << 30 : int64_t{1} << 27;
    from_ = random_values({side / 4}, DType::f32, device), to_ = empty_like(from_);
  }
  /// Bytes a second of a copy that reads and writes about `bytes` together; a short one pays for its start and its end, too.
  double rate(double bytes) {
    constexpr int64_t kPack = 64, kMostCalls = 1024;
    const int64_t all = from_.numel();
    const int64_t elements = std::clamp<int64_t>(static_cast<int64_t>(bytes / 8) / kPack * kPack, std::min(kPack, all), all);
    const auto [known, is_new] = rates_.try_emplace(elements, 0.0);
    if (is_new) {
      Calls own, drivers;
      for (int64_t i = 0; i < std::min(kMostCalls, all / elements); ++i) {
        const Tensor x = from_.narrow(0, i * elements, elements), y = to_.narrow(0, i * elements, elements);
        own.push_back([=] { kernels::copy(x, y); });
        if (device_.kind == DeviceKind::cuda) drivers.push_back([=] { cuda::copy_on_device(y.raw(), x.raw(), x.bytes()); });
      }
      for (const Calls& calls : {own, drivers})
        if (!calls.empty())
          known->second = std::max(known->second, 8e3 * static_cast<double>(elements) / time_calls(calls, device_, ahead()).median);
    }
    return known->second;
  }
  /// The longest copy: half a millisecond of a GPU's time.
  Call ahead() const {
    return [from = from_, to = to_] { kernels::copy(from, to); };
  }
  double longest() { return rate(8.0 * static_cast<double>(from_.numel())); }

 private:
  Device device_;
  Tensor from_, to_;
  std::map<int64_t, double> rates_;  // by elements
};

std::vector<Work> all_kernels(const Extents& extents, const std::shared_ptr<DrawnValues>& drawn) {
  std::vector<Work> work = Bench(extents, drawn).work();
  for (Work& more : further_kernels(extents, drawn)) work.push_back(std::move(more));
  return work;
}

/// The same kernels on several sets of operands. On a GPU a kernel's operands would else lie in the L2 cache since its last call, and look
/// faster than memory: eight sets of the smallest ones, 19 MB at DeiT-S's batch of 128, are more than twice an H200's 60 MB. Fewer where
/// memory is short.
std::vector<std::vector<Work>> sets_of_operands(const Extents& extents) {
  constexpr int64_t kMostSets = 8;
  const auto drawn = std::make_shared<DrawnValues>();
  Allocator& memory = Allocator::of(extents.device);
  const int64_t before = memory.use().total;
  std::vector<std::vector<Work>> sets{all_kernels(extents, drawn)};
  if (extents.device.kind != DeviceKind::cuda) return sets;
  const int64_t room = available_memory(extents.device) * 3 / 4;  // attention by products needs scratch
  const int64_t more = std::min(kMostSets - 1, room / std::max<int64_t>(1, memory.use().total - before));
  for (int64_t i = 0; i < more; ++i) sets.push_back(all_kernels(extents, drawn));
  return sets;
}

}  // namespace

KernelReport run_kernel_benchmark(const RunConfig& config, const std::function<void(const std::string&)>& progress, int64_t copy_bytes) {
  const NetConfig net = model_config(config, known_classes(config));
  if (!std::holds_alternative<VitConfig>(net.family)) config.refuse("model.name", "kernels are measured at the sizes of a ViT");
  const VitConfig& model = std::get<VitConfig>(net.family);
  const Device device = choose_device(config.device);
  use_threads(config);
  const Extents extents{config.train.batch_size,
                        model.tokens(),
                        model.width,
                        model.heads,
                        model.hidden(),
                        model.classes,
                        model.image_size,
                        model.channels,
                        model.patch_size,
                        compute_dtype(config, device),
                        device};
  KernelReport report;
  report.device = describe_device(config.device, device);
  Copies copies(device, copy_bytes);
  report.copy_bytes_per_second = copies.longest();
  const std::vector<std::vector<Work>> sets = sets_of_operands(extents);
  for (size_t i = 0; i < sets.front().size(); ++i) {
    const Work& work = sets.front()[i];
    if (progress) progress(work.name);
    Calls calls;
    for (const std::vector<Work>& set : sets) calls.push_back(set[i].call);
    KernelResult result{work.name, work.bytes, work.flops, time_calls(calls, device, copies.ahead()), 0, 0};
    if (work.bytes > 0) {
      const double rate = work.bytes / (result.ms.median * 1e-3);
      result.of_copy = rate / copies.rate(work.bytes), result.of_bandwidth = rate / report.copy_bytes_per_second;
    }
    report.kernels.push_back(std::move(result));
  }
  return report;
}

std::string format_kernels(const KernelReport& report) {
  char line[160];
  std::snprintf(line, sizeof line, "bandwidth: %.1f GB/s, by a long copy; \"of copy\" is beside one of as many bytes\n\n",
                report.copy_bytes_per_second / 1e9);
  std::string out = report.device + "\n" + line;
  std::snprintf(line, sizeof line, "%-38s %10s %10s %8s %13s %10s\n", "kernel", "ms", "GB/s", "of copy", "of bandwidth", "TFLOP/s");
  out += line;
  for (const KernelResult& k : report.kernels) {
    const double seconds = k.ms.median * 1e-3;
    if (k.bytes > 0)
      std::snprintf(line, sizeof line, "%-38s %10.4f %10.1f %7.0f%% %12.0f%%\n", k.name.c_str(), k.ms.median, k.bytes / seconds / 1e9,
                    100 * k.of_copy, 100 * k.of_bandwidth);
    else
      std::snprintf(line, sizeof line, "%-38s %10.4f %10s %8s %13s %10.3f\n", k.name.c_str(), k.ms.median, "", "", "",
                    k.flops / seconds / 1e12);
    out += line;
  }
  return out;
}

std::string kernels_json(const KernelReport& report) {
  nlohmann::ordered_json out{
      {"device", report.device}, {"copy_bytes_per_second", report.copy_bytes_per_second}, {"kernels", nlohmann::ordered_json::array()}};
  for (const KernelResult& k : report.kernels)
    out["kernels"].push_back({{"name", k.name},
                              {"bytes", k.bytes},
                              {"flops", k.flops},
                              {"ms", {{"minimum", k.ms.minimum}, {"median", k.ms.median}, {"maximum", k.ms.maximum}}},
                              {"of_copy", k.of_copy},
                              {"of_bandwidth", k.of_bandwidth}});
  return out.dump(2) + "\n";
}

}  // namespace mesa
