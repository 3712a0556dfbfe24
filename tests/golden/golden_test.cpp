// The whole network against PyTorch in double (generate.py wrote the numbers): logits, loss, every gradient, ten steps of AdamW.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "mesa/models/model.h"
#include "mesa/optim/adamw.h"
#include "mesa/train/safetensors.h"
#include "support/gradcheck.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

SafetensorsFile golden(const std::string& name) { return read_safetensors(source_dir() + "/tests/golden/" + name); }

const Tensor& of(const SafetensorsFile& file, const std::string& name) {
  const Tensor* tensor = file.find(name);
  check(tensor != nullptr, "the golden file has no ", name);
  return *tensor;
}

Tensor as(const Tensor& x, DType dtype) {
  const Tensor y = Tensor::empty(x.shape(), dtype);
  kernels::copy(x, y);
  return to(y, test_device(), MemoryKind::inputs);
}

/// Norm-wise and, against the tensor's largest element, element by element.
void check_close(const std::string& name, const Numbers& x, const Numbers& expected, double tolerance, double elementwise) {
  INFO(name);
  REQUIRE(x.size() == expected.size());
  CHECK(relative_error(x, expected) <= tolerance);
  CHECK(largest_difference(x, expected) <= elementwise * largest(expected));
}

void check_buffers(const ParamStore& store, const SafetensorsFile& file, const std::string& prefix, double tolerance) {
  for (const ModelBuffer& buffer : store.buffers())
    check_close(buffer.name, buffer.value.to_vector<double>(), of(file, prefix + buffer.name).to_vector<double>(), tolerance, tolerance);
}

struct Variant {
  const char* storage;
  AttentionKind attention;
  DType dtype;
};

StoragePolicy policy_of(const std::string& storage) {
  std::vector<StorageRule> rules{{"*", "exact", {}, ""}};
  if (storage == "rebuild") rules.push_back({"@(*.@(qkv|q|kv|sr|fc1|fc2|reduction|conv[23])|head*):x", "rebuild", {}, ""});
  return StoragePolicy(storage, rules);
}

/// The golden network with the golden weights.
struct Golden {
  ParamStore store;
  Net model;
  StoragePolicy policy;
  Tensor images, labels;

  static NetConfig with(NetConfig c, AttentionKind attention) {
    std::visit(
        [&](auto& family) {
          family.classes = 7;
          if constexpr (requires { family.attention; }) family.attention = attention;
        },
        c.family);
    return c;
  }

  Golden(const SafetensorsFile& file, const NetConfig& config, const Variant& v)
      : model(Builder(store, 0, v.dtype, v.dtype, test_device()), with(config, v.attention)), policy(policy_of(v.storage)) {
    for (Param& param : store.params()) {
      const Tensor& w = of(file, "weight/" + param.name);
      REQUIRE(w.shape() == param.value.shape());
      transfer(as(w, v.dtype), param.value);
    }
    for (ModelBuffer& buffer : store.buffers()) transfer(as(of(file, "weight/" + buffer.name), v.dtype), buffer.value);
    store.allocate_gradients();
    images = as(of(file, "images"), v.dtype);
    labels = to(of(file, "labels"), test_device(), MemoryKind::inputs);
  }

  /// Forward and backward; returns logits and loss.
  std::pair<Numbers, Numbers> gradients() {
    store.clear_gradients();
    Tape tape(policy);
    const Var logits = model(images), loss = cross_entropy(logits, labels, 0.1);
    tape.backward(loss);
    return {logits.value().to_vector<double>(), loss.value().to_vector<double>()};
  }
};

/// Every choice with every other; on a GPU, of which the emulated one is slow, every two together once.
std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (DType dtype : {DType::f64, DType::f32})
    for (AttentionKind kind : {AttentionKind::fused, AttentionKind::explicit_})
      for (const bool rebuild : {false, true}) {
        const int parity = (dtype == DType::f32) + (kind == AttentionKind::explicit_) + rebuild;
        if (test_device() != kCuda || parity % 2 == 0) all.push_back({rebuild ? "rebuild" : "exact", kind, dtype});
      }
  return all;
}

void check_gradients(const std::string& name, const NetConfig& config) {
  const SafetensorsFile file = golden(name);
  for (const Variant& v : variants()) {
    const double tolerance = v.dtype == DType::f64 ? 1e-10 : 1e-5;
    INFO(name << ", " << v.storage << ", " << (v.attention == AttentionKind::fused ? "fused" : "explicit") << ", " << to_string(v.dtype));
    Golden net(file, config, v);
    const auto [logits, loss] = net.gradients();
    check_close("logits", logits, of(file, "logits").to_vector<double>(), tolerance, tolerance);
    check_close("loss", loss, of(file, "loss").to_vector<double>(), tolerance, tolerance);
    for (const Param& param : net.store.params())
      check_close(param.name, param.grad.to_vector<double>(), of(file, "gradient/" + param.name).to_vector<double>(), tolerance, tolerance);
    size_t weights = 0;
    for (const NamedTensor& t : file.tensors) weights += t.name.starts_with("weight/");
    CHECK(weights == net.store.params().size() + net.store.buffers().size());
    check_buffers(net.store, file, "running/", tolerance);
  }
}

/// The ViT of all goldens, changed.
template <class Change>
NetConfig vit(const Change& change) {
  VitConfig config;
  config.image_size = 16, config.patch_size = 4, config.width = 24, config.heads = 3, config.depth = 1;
  change(config);
  return {config};
}

NetConfig deit() {
  return vit([](VitConfig& c) { c.depth = 2; });
}

NetConfig deit3() {
  return vit([](VitConfig& c) { c.registers = 2, c.layer_scale = 1e-6, c.token_positions = false; });
}

NetConfig swin(int64_t height, int64_t width_px, int64_t width, int64_t heads, std::vector<int64_t> depths, int64_t window) {
  SwinConfig config;
  config.image_size = height, config.image_width = width_px, config.patch_size = 2;
  config.width = width, config.heads = heads, config.depths = std::move(depths), config.window = window;
  config.pad = true;
  return {config};
}
NetConfig pvt(int64_t height, int64_t width_px, int64_t patch, std::vector<PvtConfig::Stage> stages) {
  PvtConfig config;
  config.image_size = height, config.image_width = width_px, config.patch_size = patch, config.stages = std::move(stages);
  return {config};
}
NetConfig resnet(int64_t height, int64_t width_px, int64_t width, std::vector<int64_t> depths, bool bottleneck) {
  ResNetConfig config;
  config.image_size = height, config.image_width = width_px, config.width = width;
  config.depths = std::move(depths), config.bottleneck = bottleneck;
  return {config};
}
NetConfig bottlenecks() { return resnet(45, 35, 4, {1, 2}, true); }
NetConfig basic_blocks() { return resnet(37, 50, 6, {2, 1}, false); }
NetConfig wide_pvt() { return pvt(16, 24, 4, {{8, 1, 1, 2, 2}, {12, 2, 3, 2, 1}}); }
NetConfig wide_swin() { return swin(24, 32, 8, 2, {2, 2}, 4); }

/// The gradient of a key's bias is zero (softmax ignores what all scores of a row share), so that AdamW, which divides a gradient by its
/// own size, turns the rounding noise of single precision into steps: these elements are left out there.
Numbers without_key_bias(const std::string& name, Numbers bias) {
  const bool packed = name.ends_with("qkv.bias"), pair = name.ends_with(".kv.bias");
  const auto c = static_cast<int64_t>(bias.size()) / (packed ? 3 : 2);
  if (packed) bias.erase(bias.begin() + c, bias.begin() + 2 * c);
  if (pair) bias.erase(bias.begin(), bias.begin() + c);
  return bias;
}

}  // namespace

TEST_CASE("golden: logits, loss and every gradient of a DeiT are PyTorch's") { check_gradients("deit.safetensors", deit()); }

TEST_CASE("golden: the same of a ViT that pools the mean") {
  check_gradients("mean_pool.safetensors", vit([](VitConfig& c) { c.class_token = false; }));
}

TEST_CASE("golden: the same of a distilled DeiT") {
  check_gradients("distilled.safetensors", vit([](VitConfig& c) { c.distilled = true; }));
}

TEST_CASE("golden: the same of a DeiT III with registers") { check_gradients("deit3.safetensors", deit3()); }

TEST_CASE("golden: the same of a ViT with registers that pools the patches") {
  check_gradients("registers.safetensors", vit([](VitConfig& c) { c.class_token = false, c.registers = 2; }));
}

TEST_CASE("golden: the same of Swin transformers, with grids that windows tile, that they do not, and as wide as they are") {
  check_gradients("swin.safetensors", wide_swin());
  check_gradients("swin_odd.safetensors", swin(20, 12, 8, 1, {2, 2}, 3));
  check_gradients("swin_even.safetensors", swin(16, 16, 12, 3, {2}, 4));
}

TEST_CASE("golden: the same of pyramid vision transformers") {
  check_gradients("pvt.safetensors", wide_pvt());
  check_gradients("pvt_long.safetensors", pvt(32, 32, 2, {{4, 1, 1, 2, 8}, {8, 1, 2, 2, 4}, {8, 1, 1, 2, 2}, {12, 1, 3, 2, 1}}));
}

TEST_CASE("golden: the same of residual networks, with the running statistics of their batch norms") {
  check_gradients("resnet.safetensors", bottlenecks());
  check_gradients("resnet_basic.safetensors", basic_blocks());
  check_gradients("resnet_one.safetensors", resnet(51, 40, 4, {1, 1, 1}, false));
}

namespace {

void check_steps(const std::string& name, const NetConfig& config) {
  const SafetensorsFile file = golden(name);
  const Numbers norms = of(file, "gradient_norms").to_vector<double>();
  for (const Variant& v : variants()) {
    const bool wide = v.dtype == DType::f64;
    INFO(name << ", " << v.storage << ", " << (v.attention == AttentionKind::fused ? "fused" : "explicit") << ", " << to_string(v.dtype));
    Golden net(file, config, v);
    AdamW optimizer(net.store.params(), {});
    if (!net.store.buffers().empty()) net.gradients();  // running statistics have seen the pass that the other numbers are of
    for (double expected : norms) {
      net.gradients();
      const double norm = optimizer.gradient_norm();
      CHECK(std::abs(norm - expected) <= (wide ? 1e-10 : 1e-5) * expected);
      optimizer.step(1e-3, std::min(1.0, 1.0 / (norm + 1e-6)));
    }
    for (const Param& param : net.store.params()) {
      Numbers after = param.value.to_vector<double>(), expected = of(file, "after/" + param.name).to_vector<double>();
      if (!wide) after = without_key_bias(param.name, after), expected = without_key_bias(param.name, expected);
      check_close(param.name, after, expected, wide ? 1e-10 : 1e-5, wide ? 1e-10 : 1e-5);
    }
    if (net.store.buffers().empty()) continue;
    check_buffers(net.store, file, "after/", wide ? 1e-10 : 1e-5);
    const Numbers logits = net.model(net.images).value().to_vector<double>();
    check_close("logits of the evaluation", logits, of(file, "eval_logits").to_vector<double>(), wide ? 1e-10 : 1e-5, wide ? 1e-10 : 1e-5);
  }
}

}  // namespace

TEST_CASE("golden: ten clipped AdamW steps arrive at PyTorch's weights") {
  check_steps("deit.safetensors", deit());
  check_steps("deit3.safetensors", deit3());
  check_steps("swin.safetensors", wide_swin());
  check_steps("pvt.safetensors", wide_pvt());
  check_steps("resnet.safetensors", bottlenecks());
  check_steps("resnet_basic.safetensors", basic_blocks());
}
