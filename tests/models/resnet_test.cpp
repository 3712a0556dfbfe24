// Residual networks: timm's names and the published sizes, first values, frozen and evaluated norms, and configurations that cannot be.
#include <catch2/catch.hpp>
#include <cmath>
#include <map>

#include "mesa/models/model.h"
#include "mesa/train/setup.h"
#include "support/errors.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

ResNetConfig config_of(const std::string& name) { return std::get<ResNetConfig>(net_config(name).family); }

/// Parameters without memory.
struct Plan {
  ParamStore store;
  ResNet model;
  explicit Plan(const ResNetConfig& config) : model(Builder(store, 0, DType::f32, DType::f32, kMeta), config) {}
};

ResNetConfig tiny(bool bottleneck = false) {
  ResNetConfig config;
  config.image_size = 40, config.width = 8, config.depths = {1, 1}, config.classes = 5, config.bottleneck = bottleneck;
  return config;
}

/// A network on the test device.
struct Tiny {
  ParamStore store;
  ResNet model;
  StoragePolicy policy = one_codec("exact");
  Tensor images, labels;

  explicit Tiny(const ResNetConfig& config) : model(Builder(store, 3, DType::f32, DType::f32, test_device()), config) {
    images = to(normal_tensor({4, 3, config.image_size, config.image_size}, "images", DType::f32, MemoryKind::inputs), test_device(),
                MemoryKind::inputs);
    labels = to(Tensor::from<int64_t>({4}, {1, 0, 3, 2}, MemoryKind::inputs), test_device(), MemoryKind::inputs);
  }
  Numbers pass() {
    Tape tape(policy);
    const Var logits = model(images);
    tape.backward(cross_entropy(logits, labels));
    return logits.value().to_vector<double>();
  }
  Numbers evaluate() { return model(images).value().to_vector<double>(); }
  std::map<std::string, Numbers> statistics() const {
    std::map<std::string, Numbers> all;
    for (const ModelBuffer& b : store.buffers()) all[b.name] = b.value.to_vector<double>();
    return all;
  }
};

}  // namespace

TEST_CASE("resnet: resnet18 and resnet50 have timm's parameters and buffers under its names") {
  for (const bool bottleneck : {false, true}) {
    Plan plan(config_of(bottleneck ? "resnet50" : "resnet18"));
    std::map<std::string, Shape> expected{{"conv1.weight", {64, 3, 7, 7}}};
    std::map<std::string, Shape> statistics;
    const auto norm = [&](const std::string& name, int64_t width) {
      for (const char* which : {".weight", ".bias"}) expected[name + which] = {width};
      for (const char* which : {".running_mean", ".running_var"}) statistics[name + which] = {width};
    };
    norm("bn1", 64);
    const int64_t depths[2][4] = {{2, 2, 2, 2}, {3, 4, 6, 3}};
    int64_t before = 64;
    for (int stage = 0; stage < 4; ++stage)
      for (int64_t i = 0; i < depths[bottleneck][stage]; ++i) {
        const std::string block = concat("layer", stage + 1, ".", i, ".");
        const int64_t width = 64 << stage, out = bottleneck ? 4 * width : width, first = bottleneck ? 1 : 3;
        expected[block + "conv1.weight"] = {width, before, first, first};
        expected[block + "conv2.weight"] = {width, width, 3, 3};
        if (bottleneck) expected[block + "conv3.weight"] = {out, width, 1, 1};
        norm(block + "bn1", width), norm(block + "bn2", width);
        if (bottleneck) norm(block + "bn3", out);
        if (i == 0 && before != out) {
          expected[block + "downsample.0.weight"] = {out, before, 1, 1};
          norm(block + "downsample.1", out);
        }
        before = out;
      }
    expected["fc.weight"] = {1000, before};
    expected["fc.bias"] = {1000};
    std::map<std::string, Shape> found, buffers;
    for (const Param& p : plan.store.params()) {
      found[p.name] = p.value.shape();
      CHECK(p.decay == (p.value.rank() > 1));
    }
    for (const ModelBuffer& b : plan.store.buffers()) buffers[b.name] = b.value.shape();
    CHECK(found == expected);
    CHECK(buffers == statistics);
  }
}

// Operations as torchvision publishes them, multiply-adds of products (1.82, 3.67, 4.11 and 7.83 elsewhere count the norms, too).
TEST_CASE("resnet: parameter counts and operations of the published sizes") {
  struct Known {
    const char* name;
    double millions, giga_products;
  };
  for (const Known& k : {Known{"resnet18", 11.69, 1.814}, Known{"resnet34", 21.80, 3.664}, Known{"resnet50", 25.56, 4.089},
                         Known{"resnet101", 44.55, 7.801}, Known{"resnet152", 60.19, 11.514}}) {
    INFO(k.name);
    CHECK(static_cast<double>(Plan(config_of(k.name)).store.count()) / 1e6 == Approx(k.millions).margin(0.006));
    CHECK(config_of(k.name).forward_flops() / 2e9 == Approx(k.giga_products).margin(0.0006));
  }
}

TEST_CASE("resnet: a new network's blocks are their shortcuts") {
  Tiny net(tiny());
  for (const Param& p : net.store.params()) {
    INFO(p.name);
    const Numbers values = p.value.to_vector<double>();
    const bool norm = p.value.rank() == 1 && p.name != "fc.bias";
    const bool last_norm = p.name.ends_with("bn2.weight") && p.name.starts_with("layer");
    if (norm) CHECK(largest(values) == (last_norm || p.name.ends_with("bias") ? 0 : 1));
    if (p.value.rank() != 4) continue;
    const double std = std::sqrt(2.0 / static_cast<double>(p.value.dim(0) * p.value.dim(2) * p.value.dim(3)));
    const double n = static_cast<double>(values.size());
    CHECK(testing::norm(values) / std::sqrt(n) == Approx(std).epsilon(6 / std::sqrt(2 * n)));
  }
}

TEST_CASE("resnet: training takes the statistics of the batch and moves the running ones, evaluation leaves them") {
  INFO(seed_note());
  Tiny net(tiny(true));
  const auto before = net.statistics();
  const Numbers evaluated = net.evaluate();
  CHECK(net.statistics() == before);
  const Numbers trained = net.pass();
  const auto after = net.statistics();
  for (const auto& [name, values] : before) {
    INFO(name);
    CHECK(after.at(name) != values);
  }
  CHECK(relative_error(trained, evaluated) > 1e-3);
  CHECK(net.evaluate() != evaluated);  // by the moved ones
}

TEST_CASE("resnet: buffers that are remembered come back after any number of passes") {
  INFO(seed_note());
  Tiny net(tiny());
  net.pass();
  const auto good = net.statistics();
  net.store.remember_buffers();
  CHECK(net.statistics() == good);  // where they lie has changed
  net.pass(), net.pass();
  CHECK(net.statistics() != good);
  net.store.restore_buffers();
  CHECK(net.statistics() == good);
}

TEST_CASE("resnet: a frozen norm takes its running statistics in training, too, and leaves them") {
  INFO(seed_note());
  Tiny net(tiny());
  net.pass();
  net.store.freeze("*bn*");
  net.store.freeze("*downsample.1.*");
  const auto before = net.statistics();
  const Numbers evaluated = net.evaluate();
  CHECK(net.pass() == evaluated);
  CHECK(net.statistics() == before);
  for (const Param& p : net.store.params())
    if (p.trainable) CHECK(p.grad_written);
  // It keeps nothing, so that a convolution keeps its input although the rule says rebuild.
  net.policy = make_policy(reference_storage());
  net.pass();
  std::map<std::string, int64_t> kept;
  for (const SiteRecord& site : net.policy.sites()) kept[site.site.name()] = site.kept_bytes;
  CHECK(kept.count("layer1.0.bn1:xhat") == 0);
  CHECK(kept.at("layer1.0.conv2:x") == 4 * 4 * 10 * 10 * 8);
}

TEST_CASE("resnet: kept bytes are those of the convolutions' inputs and the norms, with a bit for each relu") {
  INFO(seed_note());
  Tiny net(tiny());
  net.policy = make_policy(reference_storage());
  net.pass();
  std::map<std::string, int64_t> kept;
  for (const SiteRecord& site : net.policy.sites()) kept[site.site.name()] = site.kept_bytes;
  const int64_t stem = 4 * 20 * 20 * 8, first = 4 * 10 * 10 * 8, second = 4 * 5 * 5 * 16;
  const std::map<std::string, int64_t> expected{{"conv1:x", 0},  // images are there anyway
                                                {"bn1:xhat", 4 * stem},
                                                {"bn1:rstd", 32},
                                                {"act1:mask", stem / 8},
                                                {"maxpool:index", first},
                                                {"layer1.0.conv1:x", 4 * first},
                                                {"layer1.0.bn1:xhat", 4 * first},
                                                {"layer1.0.bn1:rstd", 32},
                                                {"layer1.0.act1:mask", first / 8},
                                                {"layer1.0.conv2:x", 0},
                                                {"layer1.0.bn2:xhat", 4 * first},
                                                {"layer1.0.bn2:rstd", 32},
                                                {"layer1.0.act2:mask", first / 8},
                                                {"layer2.0.conv1:x", 4 * first},
                                                {"layer2.0.bn1:xhat", 4 * second},
                                                {"layer2.0.bn1:rstd", 64},
                                                {"layer2.0.act1:mask", second / 8},
                                                {"layer2.0.conv2:x", 0},
                                                {"layer2.0.bn2:xhat", 4 * second},
                                                {"layer2.0.bn2:rstd", 64},
                                                {"layer2.0.downsample.0:x", 0},
                                                {"layer2.0.downsample.1:xhat", 4 * second},
                                                {"layer2.0.downsample.1:rstd", 64},
                                                {"layer2.0.act2:mask", second / 8},
                                                {"fc:x", 4 * 4 * 16},
                                                {"cross_entropy:logits", 4 * 4 * 5}};
  CHECK(kept == expected);
}

TEST_CASE("resnet: values that are rebuilt give the same gradients bit for bit") {
  INFO(seed_note());
  for (const bool bottleneck : {false, true}) {
    Tiny exact(tiny(bottleneck)), rebuilt(tiny(bottleneck));
    rebuilt.policy = make_policy(reference_storage());
    CHECK(exact.pass() == rebuilt.pass());
    auto other = rebuilt.store.params().begin();
    for (const Param& p : exact.store.params()) {
      INFO(p.name);
      CHECK(p.grad.to_vector<double>() == (other++)->grad.to_vector<double>());
    }
  }
}

TEST_CASE("resnet: sizes that cannot be are refused") {
  const auto refusal = [](auto change) {
    ResNetConfig config = config_of("resnet18");
    change(config);
    return error_of([&] { config.validate(); });
  };
  CHECK_THAT(refusal([](ResNetConfig& c) { c.depths.clear(); }), Contains("model.depths has 0 stages"));
  CHECK_THAT(refusal([](ResNetConfig& c) { c.depths = {2, -1}; }), Contains("model.depths is -1"));
  CHECK_THAT(refusal([](ResNetConfig& c) { c.width = 0; }), Contains("model.width is 0"));
  CHECK_THAT(refusal([](ResNetConfig& c) { c.drop_path = 1; }), Contains("model.drop_path"));
  ResNetConfig small = tiny();
  small.image_size = 8, small.depths = {1, 1, 1};
  Tiny net(small);
  net.images = to(Tensor::zeros({1, 3, 8, 8}, DType::f32), test_device());
  CHECK_THROWS_WITH(net.pass(), Contains("layer2.0.bn1") && Contains("more than one value a channel"));
  CHECK_NOTHROW(net.evaluate());
}
