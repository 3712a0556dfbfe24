// From a config to objects: what is refused, with the key's place, before anything expensive is built.
#include "mesa/train/setup.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "mesa/base/cuda.h"
#include "mesa/data/pixels.h"
#include "support/data_files.h"
#include "support/device.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

RunConfig config_of(const std::vector<std::string>& sets) {
  return parse_config("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\n", "s.yaml", sets);
}

}  // namespace

TEST_CASE("setup: the fields that are set change the table's entry, the data say the classes") {
  const auto vit = std::get<VitConfig>(model_config(config_of({"model.pool=mean", "model.drop_path=0.1"}), 7).family);
  CHECK(vit.width == 24);
  CHECK(vit.classes == 7);
  CHECK_FALSE(vit.class_token);
  CHECK(vit.drop_path == 0.1);
  CHECK(model_config(config_of({"model.classes=3"}), 7).input().classes == 3);
  CHECK(std::get<VitConfig>(model_config(parse_config("model: {name: deit_small_patch16_224}\n", "d.yaml"), 0).family).width == 384);
}

TEST_CASE("setup: a Swin has its own keys, and what another family has is refused") {
  const auto of = [](std::vector<std::string> sets) {
    return model_config(parse_config("model: {name: swin, image_size: 32, patch_size: 2}\n", "s.yaml", sets), 7);
  };
  const auto swin = std::get<SwinConfig>(of({"model.window=4", "model.depths=[2, 1]", "model.heads=2", "model.width=8"}).family);
  CHECK(swin.window == 4);
  CHECK(swin.depths == std::vector<int64_t>{2, 1});
  CHECK(swin.classes == 7);
  CHECK_THROWS_WITH(of({"model.window=5"}), Contains("--set model.window=5") && Contains("windows of 5") && Contains("model.pad: true"));
  CHECK_NOTHROW(of({"model.window=5", "model.pad=true"}));
  CHECK_THROWS_WITH(of({"model.window=4", "model.depth=3"}), Contains("--set model.depth=3") && Contains("model.depths"));
  CHECK_THROWS_WITH(of({"model.window=4", "model.registers=3"}), Contains("model.registers") && Contains("Swin"));
  CHECK_THROWS_WITH(of({"model.window=4", "model.pool=token"}), Contains("no class token"));
  CHECK_THROWS_WITH(of({"model.depths=[2, 2, 2, 2, 2, 2]"}), Contains("--set model.depths=[2, 2, 2, 2, 2, 2]"));
  CHECK_THROWS_WITH(model_config(config_of({"model.window=4"}), 7), Contains("model.window") && Contains("ViT"));
  CHECK_THROWS_WITH(model_config(config_of({"model.depths=[4]"}), 7), Contains("model.depths") && Contains("model.depth"));
}

TEST_CASE("setup: of a PVT the depths may change, and what another family has is refused") {
  const auto of = [](std::vector<std::string> sets) { return model_config(parse_config("model: {name: pvt_tiny}\n", "p.yaml", sets), 7); };
  const auto pvt = std::get<PvtConfig>(of({"model.depths=[1, 1, 2, 1]", "model.image_size=64"}).family);
  CHECK(pvt.stages[2].depth == 2);
  CHECK(pvt.classes == 7);
  CHECK_THROWS_WITH(of({"model.depths=[1, 1]"}), Contains("--set model.depths=[1, 1]") && Contains("2 stages"));
  CHECK_THROWS_WITH(of({"model.width=32"}), Contains("model.width") && Contains("PVT"));
  CHECK_THROWS_WITH(of({"model.attn_drop_rate=0.1"}), Contains("model.attn_drop_rate") && Contains("not there for a PVT"));
  CHECK_THROWS_WITH(of({"model.pool=mean"}), Contains("class token"));
  CHECK_THROWS_WITH(of({"model.attention=explicit"}), Contains("not there for a PVT"));
  CHECK_THROWS_WITH(of({"model.image_size=230"}), Contains("--set model.image_size=230") && Contains("224 or 256 would"));
}

TEST_CASE("setup: of a ResNet the depths, the width and the image may change, and what another family has is refused") {
  const auto of = [](std::vector<std::string> sets) { return model_config(parse_config("model: {name: resnet50}\n", "r.yaml", sets), 7); };
  const auto net = std::get<ResNetConfig>(
      of({"model.depths=[1, 2]", "model.width=16", "model.image_size=65", "model.drop_path=0.1", "model.drop_rate=0.2"}).family);
  CHECK(net.depths == std::vector<int64_t>{1, 2});
  CHECK(net.width == 16);
  CHECK(net.image_size == 65);
  CHECK(net.classes == 7);
  CHECK((net.drop_path == 0.1 && net.drop_rate == 0.2 && net.bottleneck));
  for (const char* key :
       {"model.patch_size=8", "model.heads=2", "model.window=7", "model.registers=1", "model.mlp_ratio=2", "model.pad=true",
        "model.qkv_bias=false", "model.layer_scale=1e-6", "model.distilled=true", "model.token_positions=false", "model.depth=3"})
    CHECK_THROWS_WITH(of({key}), Contains(concat("--set ", key)) && Contains("ResNet"));
  CHECK_THROWS_WITH(of({"model.attention=explicit"}), Contains("has no attention"));
  CHECK_THROWS_WITH(of({"model.attn_drop_rate=0.1"}), Contains("has no attention"));
  CHECK_THROWS_WITH(of({"model.pool=token"}), Contains("no class token"));
  CHECK_THROWS_WITH(of({"model.depths=[2, 0]"}), Contains("--set model.depths=[2, 0]") && Contains("at least 1"));
  CHECK_THROWS_WITH(of({"model.width=0"}), Contains("model.width"));
}

TEST_CASE("setup: what cannot be is a usage error with the key and its place") {
  const auto usage = [](auto&& f) {
    try {
      f();
    } catch (const UsageError& e) {
      return std::string(e.what());
    }
    return std::string("no UsageError");
  };
  if (cuda::available()) {
    CHECK((choose_device("cuda") == kCuda && choose_device("auto") == kCuda));
  } else {
    CHECK_THROWS_WITH(choose_device("cuda"), Contains("device cuda: " + cuda::unavailable()) && Contains("--device cpu"));
    CHECK(choose_device("auto") == kCpu);
    CHECK(describe_device("auto", kCpu) == "cpu (" + cuda::unavailable() + ")");
  }
  CHECK(choose_device("cpu") == kCpu);
  CHECK_THAT(usage([] { model_config(config_of({"model.name=deit_smal"}), 0); }), Contains("--set model.name") && Contains("deit_small"));
  CHECK_THAT(usage([] { make_datasets(config_of({"data.kind=idx"}), {}); }), Contains("data.path"));
  const RunConfig big = config_of({"data.kind=random", "data.train_size=100", "train.batch_size=100"});
  CHECK_NOTHROW(make_training_data(big, model_config(big, 0).input()));
  RunConfig bigger = big;
  bigger.train.batch_size = 101;
  CHECK_THAT(usage([&] { make_training_data(bigger, model_config(bigger, 0).input()); }), Contains("train.batch_size") && Contains("100"));
  const RunConfig few = config_of({"model.classes=9", "data.train_size=64"});
  CHECK_THAT(usage([&] { make_training_data(few, model_config(few, 0).input()); }), Contains("model.classes") && Contains("10 classes"));
  CHECK_THAT(usage([] { BuiltModel(config_of({"train.frozen=[nothing.*]"}), model_config(config_of({}), 2)); }), Contains("train.frozen"));
}

TEST_CASE("setup: the normalization fits the channels") {
  const RunConfig gray = config_of({"model.channels=1", "data.kind=image_folder"});
  const TransformOptions t = make_transform(gray, model_config(gray, 2).input());
  REQUIRE(t.mean.size() == 1);
  CHECK(t.mean[0] == Approx((0.485 + 0.456 + 0.406) / 3).epsilon(1e-5));
}

TEST_CASE("setup: the augmentations of a recipe reach the transform and the loader") {
  const RunConfig c = load_config("deit_s", {"data.path=/imagenet"});
  const TransformOptions t = make_transform(c, model_config(c, 1000).input());
  CHECK(t.crop == Crop::resized);
  CHECK(t.flip == 0.5);
  CHECK(t.augment.choices.size() == 15);
  CHECK(t.augment.magnitude_std == 0.5);
  CHECK(t.erasing.probability == 0.25);
  CHECK(t.erasing.mode == ErasingMode::pixel);
  CHECK(t.erasing.max_count == 1);
  CHECK_FALSE(t.random_interpolation);
  CHECK(make_loader_options(c, true, kCpu).repeats == 3);
  CHECK(make_loader_options(c, false, kCpu).repeats == 1);
  const RunConfig d =
      load_config("deit3_s", {"data.path=/imagenet", "data.crop=simple", "data.vflip=0.1", "data.grayscale=0.2", "data.blur=0.3",
                              "data.erasing=0.4", "data.erasing_mode=rand", "data.erasing_count=2", "data.interpolation=random"});
  const TransformOptions u = make_transform(d, model_config(d, 1000).input());
  CHECK(u.crop == Crop::simple);
  CHECK(u.augment.choices.size() == 3);
  CHECK(u.color_jitter == 0.3);
  CHECK(u.augment.color_jitter);
  CHECK(u.vflip == 0.1);
  CHECK(u.grayscale == 0.2);
  CHECK(u.blur == 0.3);
  CHECK(u.erasing.probability == 0.4);
  CHECK(u.erasing.mode == ErasingMode::color);
  CHECK(u.erasing.max_count == 2);
  CHECK(u.random_interpolation);
  CHECK(u.interpolation == Interpolation::bicubic);
  const RunConfig small = config_of({"data.crop=simple", "data.crop_padding=16", "model.image_size=32"});
  CHECK_THAT(error_of([&] { make_transform(small, model_config(small, 10).input()); }),
             Contains("data.crop_padding") && Contains("half of the picture's side of 32"));
}

TEST_CASE("setup: a flip that is the last step of augmentation reaches the model, from the loader on") {
  const RunConfig config = config_of({"data.kind=shapes", "data.train_size=64", "data.test_size=8", "data.workers=1", "train.batch_size=64",
                                      "data.flip=0.5", "data.crop=none"});
  const ImageConfig model = model_config(config, 10).input();
  const Device device = test_device();
  const DatasetPair data = make_training_data(config, model);
  const TransformOptions flipping = make_transform(config, model);
  REQUIRE(flipping.flips_last());
  TransformOptions still = flipping, always = flipping;
  still.flip = 0, always.flip = 1;
  const auto seen = [&](const TransformOptions& transform) {
    Loader loader(data.train, transform, make_loader_options(config, true, device));
    loader.start_epoch(0);
    const SentBatch batch = send(*loader.next(), 10, device);
    const std::vector<double> images = prepare(batch, transform, DType::f32).images.to_vector<double>();
    const Tensor narrow = prepare(batch, transform, DType::bf16).images;
    CHECK(narrow.to_vector<double>() == tensor_of(narrow.shape(), images, DType::bf16).to_vector<double>());
    return images;
  };
  const auto plain = seen(still), all = seen(always), some = seen(flipping);
  const size_t side = 16, picture = 3 * side * side;
  size_t flipped = 0;
  for (size_t b = 0; b < 64; ++b) {
    std::vector<double> turned(picture);
    for (size_t i = 0; i < picture; ++i) turned[i] = plain[b * picture + i - i % side + side - 1 - i % side];
    const auto is = [&](const std::vector<double>& images, const std::vector<double>& want, size_t from) {
      return std::equal(want.begin() + from, want.begin() + from + picture, images.begin() + b * picture);
    };
    CHECK(is(all, turned, 0));
    const bool mirror = is(some, turned, 0);
    CHECK((mirror || is(some, plain, b * picture)));
    flipped += mirror;
  }
  CHECK((flipped > 16 && flipped < 48));
}
