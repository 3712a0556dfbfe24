// One step of a network on the test device against the same step on the CPU. On the CPU itself there is nothing to compare.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>

#include "mesa/kernels/attention.h"
#include "mesa/train/setup.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

struct StepResult {
  std::vector<std::pair<std::string, Numbers>> gradients;
  double loss = 0;
};

/// Emulated threads take their time: a small network there, DeiT-Ti on a GPU.
RunConfig config_of(const std::string& precision, const std::string& storage, const std::string& attention,
                    const std::string& family = "") {
  const bool emulated = std::string(cuda::describe_device()).find("emulated") != std::string::npos;
  const std::string model =
      !family.empty() ? family
      : emulated ? "{name: vit, image_size: 32, patch_size: 8, width: 64, depth: 2, heads: 2, classes: 10, drop_path: 0.2, attention: " +
                       attention + "}"
                 : "{name: deit_tiny_patch16_224, drop_path: 0.1, attention: " + attention + "}";
  return parse_config(
      "model: " + model + "\ntrain: {precision: " + precision + ", force_precision: true, batch_size: 4}\nstorage: " + storage + "\n",
      "parity.yaml");
}

StepResult step_on(Device device, const RunConfig& config, const std::string& pictures = "images") {
  const NetConfig net = model_config(config, 10);
  BuiltModel model(config, net, device);
  model.params.allocate_gradients();
  StoragePolicy policy = make_policy(config.storage);
  const Tensor images = to(normal_tensor({4, 3, net.input().image_size, net.input().image_size}, pictures, DType::f32, MemoryKind::inputs),
                           device, MemoryKind::inputs);
  const Tensor labels = to(Tensor::from<int64_t>({4}, {1, 0, 3, 2}, MemoryKind::inputs), device, MemoryKind::inputs);
  Tape tape(policy, 5, 1);
  const Var loss = cross_entropy(model.net(images), labels, 0.1);
  tape.backward(loss);
  StepResult out;
  out.loss = loss.value().to_vector<double>()[0];
  for (const Param& param : model.params.params()) out.gradients.emplace_back(param.name, param.grad.to_vector<double>());
  return out;
}

/// The bias of the keys has no gradient but rounding (softmax ignores what all scores of a row share).
Numbers without_key_bias(const std::string& name, Numbers g) {
  const auto c = static_cast<int64_t>(g.size()) / (name.ends_with("qkv.bias") ? 3 : 2);
  if (name.ends_with("qkv.bias")) g.erase(g.begin() + c, g.begin() + 2 * c);
  if (name.ends_with(".kv.bias")) g.erase(g.begin(), g.begin() + c);
  return g;
}

/// A stream of pictures for which no input of relu is as near to 0 as the devices' roundings differ: one alone would let it pass.
std::string pictures_off_kinks(const RunConfig& config) {
  const NetConfig net = model_config(config, 10);
  BuiltModel model(config, net, kCpu);
  for (int i = 0; i < 40; ++i) {
    const std::string pictures = concat("images ", i);
    StoragePolicy policy = make_policy(config.storage);
    Tape tape(policy, 5, 1);
    double nearest = 1;
    tape.inspect([&](const Tensor& value, const std::string& name) {
      if (name.ends_with("batch_norm") || name.ends_with("add") || name.ends_with("drop_path"))
        for (const double x : value.to_vector<double>()) nearest = std::min(nearest, x == 0 ? 1 : std::fabs(x));
    });
    model.net(normal_tensor({4, 3, net.input().image_size, net.input().image_size}, pictures));
    if (nearest > 3e-6 && nearest < 1) return pictures;
  }
  FAIL("no pictures are away from relu's kinks");
  return {};
}

double norm(const Numbers& x) { return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0)); }

/// By what an error of gradient i counts: all of it, but for a batch norm's bias. What that adds the next norm takes away again, except at
/// relu and borders between them: the sum can nearly cancel, and is as exact as its terms, which the gradient of the weight shows.
double share_of_error(const StepResult& step, size_t i) {
  const auto& [name, g] = step.gradients[i];
  const bool of_batch_norm = name.find("bn") != std::string::npos || name.find("downsample.1") != std::string::npos;
  if (!of_batch_norm || !name.ends_with(".bias")) return 1;
  REQUIRE((i > 0 && step.gradients[i - 1].first == name.substr(0, name.size() - 4) + "weight"));
  return std::min(1.0, norm(g) / (0.1 * norm(step.gradients[i - 1].second)));
}

void compare(const RunConfig& config, double tolerance, const std::string& pictures = "images") {
  const StepResult cpu = step_on(kCpu, config, pictures), gpu = step_on(kCuda, config, pictures);
  CHECK(std::abs(gpu.loss - cpu.loss) <= tolerance * std::abs(cpu.loss));
  REQUIRE(cpu.gradients.size() == gpu.gradients.size());
  for (size_t i = 0; i < cpu.gradients.size(); ++i) {
    const auto& [name, want] = cpu.gradients[i];
    INFO(name);
    const double error = relative_error(without_key_bias(name, gpu.gradients[i].second), without_key_bias(name, want));
    CHECK(share_of_error(cpu, i) * error <= tolerance);
  }
}

const char* const kStorages[] = {
    "[{match: \"*\", codec: exact}]",
    "[{match: \"*\", codec: exact}, {match: \"*.fc2:x\", codec: rebuild}, {match: \"*.fc1:x\", codec: rebuild}]"};

}  // namespace

TEST_CASE("device: every gradient of a step in fp32 is the CPU's within 1e-4") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const char* storage : kStorages)
    for (const char* attention : {"fused", "explicit"}) compare(config_of("fp32", storage, attention), 1e-4);
}

TEST_CASE("device: in bf16 within 2e-2") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const char* storage : kStorages) compare(config_of("bf16", storage, "fused"), 2e-2);
}

TEST_CASE("device: a ViT with LayerScale agrees as well") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  const std::string vit =
      "{name: vit, image_size: 32, patch_size: 8, width: 64, depth: 2, heads: 2, classes: 10, layer_scale: 0.1, drop_path: ";
  for (const char* drop_path : {"0}", "0.2}"}) {
    compare(config_of("fp32", kStorages[1], "fused", vit + drop_path), 1e-4);
    compare(config_of("bf16", kStorages[1], "fused", vit + drop_path), 2e-2);
  }
}

TEST_CASE("device: Swin and PVT agree as well, by fused kernels and by products, from exact storage and from codes") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const char* family :
       {"{name: swin, image_size: 32, patch_size: 4, width: 64, heads: 2, depths: [2, 1], window: 3, pad: true, classes: 10}",
        "{name: pvt_tiny, image_size: 64, depths: [1, 1, 1, 1], classes: 10, drop_path: 0.2}"}) {
    INFO(family);
    compare(config_of("fp32", kStorages[1], "fused", family), 1e-4);
    compare(config_of("bf16", kStorages[1], "fused", family), 5e-2);  // of four keys in all: what a query's gradient adds up nearly cancels
    compare(config_of("fp32", "[{match: \"*\", codec: int8}]", "fused", family), 1e-2);
    compare(config_of("bf16", "[{match: \"*\", codec: int8}]", "fused", family), 7e-2);
  }
}

TEST_CASE("device: residual networks agree as well, from exact storage and from codes") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const char* family : {"{name: resnet50, image_size: 33, width: 8, depths: [1, 1], classes: 10, drop_path: 0.2}",
                             "{name: resnet18, image_size: 40, width: 16, depths: [1, 2], classes: 10}"}) {
    INFO(family);
    const std::string exact = "[{match: \"*\", codec: exact}]";
    const std::string pictures = pictures_off_kinks(config_of("fp32", exact, "fused", family));
    compare(config_of("fp32", exact, "fused", family), 1e-4, pictures);
    compare(config_of("fp32", "[{match: \"*\", codec: exact}, {match: \"*.conv[23]:x\", codec: rebuild}]", "fused", family), 1e-4,
            pictures);
    compare(config_of("bf16", exact, "fused", family), 7e-2, pictures);
    compare(config_of("fp32", "[{match: \"*\", codec: int8}]", "fused", family), 1e-2, pictures);
  }
}

TEST_CASE("device: attention by cuDNN agrees as well, from exact storage and from codes") {
  if (test_device() != kCuda || kernels::cudnn_attention.cuda == nullptr) return;
  INFO(seed_note());
  const auto gradients = [](const char* storage, const char* attention) {
    return step_on(kCuda, config_of("bf16", storage, attention)).gradients;
  };
  for (const char* storage : {"[{match: \"*\", codec: exact}]", "[{match: \"*\", codec: int8}]"}) {
    const auto own = gradients(storage, "fused"), cudnn = gradients(storage, "cudnn");
    for (size_t i = 0; i < own.size(); ++i) {
      INFO(storage << ", " << own[i].first);
      CHECK(relative_error(without_key_bias(own[i].first, cudnn[i].second), without_key_bias(own[i].first, own[i].second)) <= 3e-2);
    }
  }
}

TEST_CASE("device: the same codes, so the same gradients from 8 bits as on the CPU within fp32") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  // A value that rounds differently on the two devices may fall into the neighbouring code: a step of 1/255 of a group's range.
  compare(config_of("fp32", "[{match: \"*\", codec: int8}]", "fused"), 1e-2);
}

TEST_CASE("device: values in the host's memory come back as they left") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  const StepResult exact = step_on(kCuda, config_of("fp32", "[{match: \"*\", codec: exact}]", "fused"));
  const StepResult host = step_on(kCuda, config_of("fp32", "[{match: \"*\", codec: host}]", "fused"));
  CHECK(exact.gradients == host.gradients);
}
