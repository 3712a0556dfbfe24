// Training that starts from weights: what is taken, resized or begun anew, and what is refused.
#include <catch2/catch.hpp>

#include "mesa/kernels/elementwise.h"
#include "mesa/models/resize.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/gradcheck.h"
#include "train/checkpoint_parts.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

Numbers rows_of(const Tensor& x, int64_t from, int64_t count) {
  const int64_t C = x.dim(-1);
  const Numbers all = x.to_vector<double>();
  return Numbers(all.begin() + from * C, all.begin() + (from + count) * C);
}

/// The built model of a config, without anything else.
struct Built {
  BuiltModel model;
  explicit Built(const std::string& text, int64_t classes = 4)
      : model(parse_config(text, "b.yaml"), model_config(parse_config(text, "b.yaml"), classes)) {}
  void write(const std::string& path) const {
    std::vector<NamedTensor> weights;
    for (const Param& param : model.params.params()) weights.push_back({param.name, param.value});
    write_safetensors(path, weights);
  }
  const Tensor& at(const std::string& name) { return model.params.at(name).value; }
};

}  // namespace

TEST_CASE("weights: another picture size and other classes take what fits, resize positions, and begin the head anew") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "run").string();
  Parts parts(config_of());
  parts.save(path, {});
  Built other("model: {name: vit, image_size: 24, patch_size: 8, width: 24, depth: 1, heads: 3}\nseed: 6\n", 7);
  const Numbers head = other.at("head.weight").to_vector<double>();
  const std::string text = start_from_weights(other.model.params, path);
  CHECK_THAT(text, Contains("started from " + path + "/model.safetensors") && Contains("resized pos_embed [1, 5, 24] to [1, 10, 24]") &&
                       Contains("with first values: head.weight; head.bias"));
  CHECK(other.at("head.weight").to_vector<double>() == head);
  const Tensor& before = parts.model.params.at("pos_embed").value;
  const Tensor& after = other.at("pos_embed");
  CHECK(rows_of(after, 0, 1) == rows_of(before, 0, 1));
  const Numbers places = rows_of(before, 1, 4);
  const Tensor grid = Tensor::from<float>({4, 24}, std::vector<float>(places.begin(), places.end()));
  CHECK(rows_of(after, 1, 9) == resize_bicubic(grid, 2, 2, 3, 3).to_vector<double>());
  CHECK(other.at("blocks.0.attn.qkv.weight").to_vector<double>() ==
        parts.model.params.at("blocks.0.attn.qkv.weight").value.to_vector<double>());
  other.model.params.freeze("head.*");  // random values that nothing would ever change
  CHECK_THROWS_WITH(start_from_weights(other.model.params, path),
                    Contains("head.weight") && Contains("train.frozen keeps it from learning"));
}

TEST_CASE("weights: a Swin of another window resizes its tables") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "swin.safetensors").string();
  const std::string sizes = "image_size: 16, patch_size: 2, width: 8, heads: 2, depths: [2], window: ";
  Built small("model: {name: swin, " + sizes + "2}\n"), large("model: {name: swin, " + sizes + "4}\nseed: 9\n");
  small.write(path);
  CHECK_THAT(start_from_weights(large.model.params, path),
             Contains("resized layers.0.blocks.[0-1].attn.relative_position_bias_table [9, 2] to [49, 2]"));
  CHECK(large.at("layers.0.blocks.1.attn.relative_position_bias_table").to_vector<double>() ==
        resize_bicubic(small.at("layers.0.blocks.1.attn.relative_position_bias_table"), 3, 3, 7, 7).to_vector<double>());
}

TEST_CASE("weights: the original Swin's and DeiT III's names are changed into timm's") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "original.safetensors").string();
  const auto check_taken = [&](const std::string& model, const std::map<std::string, std::string>& originals) {
    Built from(model), to(model + "seed: 9\n");
    size_t renamed = 0;
    int value = 0;
    std::vector<NamedTensor> tensors{{"layers.0.blocks.1.attn_mask", Tensor::zeros({1}, DType::f32)}};
    for (const Param& p : from.model.params.params()) {
      kernels::fill(p.value, ++value);
      std::string name = p.name;
      for (const auto& [here, original] : originals)
        if (const size_t at = name.find(here); at != std::string::npos) name.replace(at, here.size(), original), ++renamed;
      tensors.push_back({"module." + name, p.value});
    }
    tensors[0].name = "module." + tensors[0].name;
    CHECK(renamed >= originals.size());
    write_safetensors(path, tensors);
    CHECK(start_from_weights(to.model.params, path) == "started from " + path);
    for (const Param& p : from.model.params.params()) {
      INFO(p.name);
      CHECK(to.at(p.name).to_vector<double>() == p.value.to_vector<double>());
    }
    const RunConfig config = parse_config(model, "m.yaml");
    const LoadedModel loaded = load_model(path, WeightsKind::automatic, &config);  // as mesa-eval does
    load_weights(to.model.params, loaded.weights, path);
  };
  // microsoft/Swin-Transformer: models/swin_transformer.py, facebookresearch/deit: models_v2.py
  check_taken("model: {name: swin, image_size: 32, patch_size: 2, width: 8, heads: 2, depths: [2, 2, 2], window: 2}\n",
              {{"layers.1.downsample", "layers.0.downsample"}, {"layers.2.downsample", "layers.1.downsample"}, {"head.fc", "head"}});
  check_taken("model: {name: deit3_small_patch16_224, image_size: 32, width: 24, depth: 2, heads: 3}\n",
              {{"ls1.gamma", "gamma_1"}, {"ls2.gamma", "gamma_2"}});
  // CaiT has such names, too, but is another model.
  std::vector<NamedTensor> tensors = read_safetensors(path).tensors;
  tensors.push_back({"module.blocks.0.attn.proj_l.weight", Tensor::zeros({3, 3}, DType::f32)});
  write_safetensors(path, tensors);
  Built deit3("model: {name: deit3_small_patch16_224, image_size: 32, width: 24, depth: 2, heads: 3}\n");
  CHECK_THROWS_WITH(start_from_weights(deit3.model.params, path), Contains("missing blocks.[0-1].ls1.gamma [24]"));
}

TEST_CASE("weights: a file of another family is refused with all parameters that differ") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "vit.safetensors").string();
  Built vit("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\n");
  vit.write(path);
  Built swin("model: {name: swin, image_size: 16, patch_size: 2, width: 8, heads: 2, depths: [2], window: 4}\n");
  CHECK_THROWS_WITH(
      start_from_weights(swin.model.params, path),
      Contains("vit.safetensors belongs to another model:\n  patch_embed.proj.weight is [24, 3, 8, 8] but the model has [8, 3, 2, 2]\n") &&
          Contains("\n  missing patch_embed.norm.weight [8]\n") &&
          Contains("\n  missing layers.0.blocks.[0-1].attn.qkv.weight [24, 8]\n") &&
          Contains("\n  norm.bias is [24] but the model has [8]") && Contains("\n  unexpected cls_token"));
  Built deeper("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 4, heads: 3}\n");
  CHECK_THROWS_WITH(start_from_weights(deeper.model.params, path), Contains("missing blocks.[1-3].norm1.weight [24]") &&
                                                                       Contains("missing blocks.[1-3].mlp.fc2.bias [24]") &&
                                                                       !Contains("more"));
  CHECK_THROWS_WITH(start_from_weights(deeper.model.params, path + "x"), Contains("there is no checkpoint at"));
  // Positions that are no square grid cannot be resized.
  Built wide("model: {name: vit, image_size: 24, patch_size: 8, width: 24, depth: 1, heads: 3, token_positions: false}\n");
  CHECK_THROWS_WITH(start_from_weights(wide.model.params, path), Contains("pos_embed is [1, 5, 24] but the model has [1, 9, 24]"));
}

TEST_CASE("weights: of a ResNet running statistics come along, PyTorch's counts of batches do not matter, and other classes begin anew") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "resnet.safetensors").string();
  const std::string model = "model: {name: resnet18, image_size: 24, width: 8, depths: [1], classes: ";
  Built from(model + "4}\n"), same(model + "4}\nseed: 8\n"), other(model + "3}\nseed: 9\n");
  std::map<std::string, Tensor> weights;
  std::vector<NamedTensor> tensors;
  for (ModelBuffer& b : from.model.params.buffers()) kernels::fill(b.value, 0.75), tensors.push_back({b.name, b.value});
  for (const Param& p : from.model.params.params()) tensors.push_back({p.name, p.value});
  for (const char* norm : {"bn1", "layer1.0.bn1"})
    tensors.push_back({concat(norm, ".num_batches_tracked"), Tensor::from<int64_t>({}, {7})});
  for (const NamedTensor& t : tensors) weights[t.name] = t.tensor;
  write_safetensors(path, tensors, {});
  const auto running = [](Built& b) { return b.model.params.buffers().front().value.to_vector<double>(); };

  load_weights(same.model.params, weights, "r.safetensors");
  CHECK(running(same) == Numbers(8, 0.75));
  const Numbers head = other.at("fc.weight").to_vector<double>();
  CHECK_THAT(start_from_weights(other.model.params, path),
             Contains("with first values: fc.weight; fc.bias") && !Contains("num_batches_tracked"));
  CHECK(running(other) == Numbers(8, 0.75));
  CHECK(other.at("fc.weight").to_vector<double>() == head);
  CHECK(other.at("conv1.weight").to_vector<double>() == from.at("conv1.weight").to_vector<double>());

  weights.erase("layer1.0.bn2.running_var");
  weights["bn1.running_mean"] = Tensor::zeros({3}, DType::f32);
  CHECK_THROWS_WITH(load_weights(same.model.params, weights, "r.safetensors"),
                    Contains("bn1.running_mean is [3] but the model has [8]") && Contains("missing layer1.0.bn2.running_var [8]"));
  std::erase_if(tensors, [](const NamedTensor& t) { return t.name == "bn1.running_var"; });
  write_safetensors(path, tensors, {});
  CHECK_THROWS_WITH(start_from_weights(other.model.params, path), Contains("missing bn1.running_var [8]"));
}

TEST_CASE("weights: every name that is missing or unexpected is told, blocks together") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "vit.safetensors").string(), sizes = "image_size: 16, patch_size: 8, width: 24, heads: 3, ";
  Built from("model: {name: vit, " + sizes + "depth: 3}\n");
  std::map<std::string, Tensor> weights;
  std::vector<NamedTensor> tensors;
  for (const Param& p : from.model.params.params()) tensors.push_back({p.name, p.value});
  for (const int block : {0, 1, 2, 5, 7, 8}) tensors.push_back({concat("blocks.", block, ".extra"), Tensor::zeros({2}, DType::f32)});
  for (const char* name : {"a", "b.weight", "c.weight", "attn_mask", "blocks.0.attn.relative_position_index", "bn.num_batches_tracked"})
    tensors.push_back({name, Tensor::zeros({1}, DType::f32)});
  std::erase_if(tensors, [](const NamedTensor& t) { return t.name == "cls_token"; });
  for (const NamedTensor& t : tensors) weights[t.name] = t.tensor;
  CHECK_THROWS_WITH(
      load_weights(from.model.params, weights, "w"),
      Contains("w belongs to another model:\n  missing cls_token [1, 1, 24]\n  unexpected a [1]\n  unexpected b.weight [1]\n  "
               "unexpected blocks.[0-2,5,7-8].extra [2]\n  unexpected c.weight [1]"));
  std::erase_if(tensors, [](const NamedTensor& t) { return t.name.ends_with("c.weight") || t.name == "a"; });
  tensors.push_back({"cls_token", Tensor::zeros({1, 1, 24}, DType::f32)});
  write_safetensors(path, tensors);
  const std::string text = start_from_weights(from.model.params, path);
  CHECK_THAT(text, Contains("; not of this model, so unused: b.weight; blocks.[0-2,5,7-8].extra"));
  CHECK_THAT(text, !Contains("attn_mask") && !Contains("relative_position_index") && !Contains("num_batches"));
}

TEST_CASE("weights: prefixes of wrappers go where every name has them") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "vit.safetensors").string();
  const std::string text = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\n";
  Built from(text);
  const auto write = [&](const std::string& prefix, const std::vector<NamedTensor>& more = {}) {
    std::vector<NamedTensor> tensors = more;
    for (const Param& p : from.model.params.params()) tensors.push_back({prefix + p.name, p.value});
    write_safetensors(path, tensors);
  };
  for (const std::string prefix : {"model.", "module.", "_orig_mod.", "module._orig_mod.", "module.model."}) {
    INFO(prefix);
    Built to(text + "seed: 5\n");
    write(prefix);
    CHECK_THAT(start_from_weights(to.model.params, path), !Contains("unused") && !Contains("first values"));
    CHECK(to.at("blocks.0.mlp.fc1.weight").to_vector<double>() == from.at("blocks.0.mlp.fc1.weight").to_vector<double>());
  }
  Built to(text + "seed: 5\n");
  write("model.", {{"loss.weight", Tensor::zeros({1}, DType::f32)}});
  CHECK_THROWS_WITH(start_from_weights(to.model.params, path), Contains("missing cls_token"));
}

TEST_CASE("weights: a distilled DeiT takes both heads, or begins both anew for other classes") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "deit.safetensors").string();
  const std::string text = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, distilled: true}\nseed: ";
  Built from(text + "1\n"), same(text + "2\n"), other(text + "3\n", 7);
  from.write(path);
  CHECK(start_from_weights(same.model.params, path) == "started from " + path);
  for (const char* name : {"head.weight", "head_dist.weight", "dist_token", "pos_embed"})
    CHECK(same.at(name).to_vector<double>() == from.at(name).to_vector<double>());
  const Numbers head = other.at("head_dist.weight").to_vector<double>();
  CHECK_THAT(start_from_weights(other.model.params, path),
             Contains("with first values: head.weight; head.bias; head_dist.weight; head_dist.bias"));
  CHECK(other.at("head_dist.weight").to_vector<double>() == head);
  CHECK(other.at("dist_token").to_vector<double>() == from.at("dist_token").to_vector<double>());
  Built larger("model: {name: vit, image_size: 24, patch_size: 8, width: 24, depth: 1, heads: 3, distilled: true}\n");
  CHECK_THAT(start_from_weights(larger.model.params, path), Contains("resized pos_embed [1, 6, 24] to [1, 11, 24]"));
  Built undistilled("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\n");
  CHECK_THROWS_WITH(start_from_weights(undistilled.model.params, path), Contains("pos_embed is [1, 6, 24] but the model has [1, 5, 24]"));
}
