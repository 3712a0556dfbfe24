// Checkpoints: what is restored, what is refused, and what is left alone.
#include "mesa/train/checkpoint.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <sstream>

#include "mesa/base/files.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/models/resize.h"
#include "mesa/optim/adamw.h"
#include "mesa/train/files.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/setup.h"
#include "support/data_files.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

RunConfig config_of(const std::vector<std::string>& sets = {}) {
  const char* const text = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, classes: 4}\nseed: 5\n";
  return parse_config(text, "c.yaml", sets);
}

void no_warning(const std::string& text) { FAIL("unexpected: " << text); }

struct Parts {
  RunConfig config;
  BuiltModel model;
  StoragePolicy policy;
  AdamW optimizer;
  explicit Parts(const RunConfig& c)
      : config(c),
        model(c, model_config(c, 4)),
        policy(make_policy(c.storage)),
        optimizer((model.params.allocate_gradients(), model.params.params()), {}) {}
  void save(const std::string& folder, const TrainingState& state) {
    save_checkpoint(folder, config, {"a", "b", "c", "d"}, model.params, optimizer, policy, state);
  }
  TrainingState load(const std::string& folder) { return load_checkpoint(folder, config, model.params, optimizer, policy).state; }
};

}  // namespace

TEST_CASE("checkpoint: every field of the state comes back, NaN too") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  TrainingState state;
  state.epoch = 3, state.batch = 7, state.step = 1234567890123, state.micro_step = 4, state.bad_steps = 5, state.bad_in_a_row = 2;
  state.epoch_loss = 0.1, state.interval_loss = 1e-300, state.best_top1 = 99.9, state.evaluated_step = 11;
  state.branch = 2, state.eval_loss = std::nan(""), state.train_loss = std::numeric_limits<double>::infinity(), state.peak_bytes = 1 << 30;
  parts.save(path, state);
  const TrainingState back = parts.load(path);
  CHECK(back.epoch == 3);
  CHECK(back.step == 1234567890123);
  CHECK(back.bad_in_a_row == 2);
  CHECK(back.epoch_loss == 0.1);
  CHECK(back.interval_loss == 1e-300);
  CHECK(back.best_top1 == 99.9);
  CHECK(back.evaluated_step == 11);
  CHECK(back.branch == 2);
  CHECK(std::isnan(back.eval_loss));
  CHECK(back.peak_bytes == 1 << 30);
}

namespace {

/// Rewrites a file of a checkpoint, which stays whole as a folder; `change` gets its text. A file left empty is removed.
void rewrite(const std::string& folder, const std::string& name, const std::function<std::string(const std::string&)>& change) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().filename() != "manifest.json") files[entry.path().filename().string()] = read_text(entry.path().string());
  files.at(name) = change(files.at(name));
  write_folder_atomically(folder, [&](const std::string& at) {
    for (const auto& [file, text] : files) {
      if (text.empty()) continue;
      OutputFile out(at + "/" + file);
      out.write(text);
      out.close();
    }
  });
}

std::string without_lines(const std::string& text, const std::vector<std::string>& words) {
  std::string out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (std::none_of(words.begin(), words.end(), [&](const std::string& word) { return line.find(word) != std::string::npos; }))
      out += line + "\n";
  return out;
}

/// Takes some steps with made-up gradients.
void train(ParamStore& params, Optimizer& optimizer, Ema* ema) {
  for (int64_t t = 0; t < 3; ++t) {
    for (Param& p : params.params()) kernels::fill(p.grad, 0.1 * static_cast<double>(t + 1)), p.grad_written = true;
    optimizer.step(0.01);
    if (ema != nullptr) ema->update();
  }
}

}  // namespace

TEST_CASE("checkpoint: one from before there were other optimizers and averages still loads for AdamW") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  train(parts.model.params, parts.optimizer, nullptr);
  TrainingState state;
  state.step = 3;
  parts.save(path, state);
  rewrite(path, "state.json", [](const std::string& text) { return without_lines(text, {"\"optimizer\"", "_ema\""}); });
  CHECK_THAT(read_text(path + "/state.json"), !Contains("ema") && !Contains("adamw") && Contains("\"optimizer_steps\": 3"));
  Parts other(config_of());
  const TrainingState back = other.load(path);
  CHECK(back.step == 3);
  CHECK(std::isnan(back.eval_top1_ema));
  CHECK(other.optimizer.steps() == 3);
  const auto before = parts.optimizer.state();
  for (const auto& [name, moment] : other.optimizer.state()) CHECK(moment.to_vector<float>() == before.at(name).to_vector<float>());
  // What the config of that time spelled out is what is left out now.
  CHECK(changed_keys(config_of({"optimizer.beta1=0.9", "optimizer.beta2=0.999", "optimizer.eps=1e-8"}), config_of()).empty());
}

TEST_CASE("checkpoint: the state of another optimizer is refused with what to do") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  parts.save(path, {});
  const RunConfig config = config_of({"optimizer.name=sgd"});
  BuiltModel model(config, model_config(config, 4));
  StoragePolicy policy = make_policy(config.storage);
  const auto optimizer = make_optimizer(config, model.params);
  CHECK_THROWS_AS(load_checkpoint(path, config, model.params, *optimizer, policy), UsageError);
  CHECK_THROWS_WITH(
      load_checkpoint(path, config, model.params, *optimizer, policy),
      Contains("--set optimizer.name=sgd: optimizer.name: ") && Contains("was trained by adamw") && Contains("train.weights"));
}

TEST_CASE("checkpoint: averages come back with their count, begin where there are none, and are a model of their own") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of({"train.ema_decay=0.9"}));
  const auto ema = make_ema(parts.config, parts.model.params), back = make_ema(parts.config, parts.model.params);
  train(parts.model.params, parts.optimizer, ema.get());
  const auto save = [&](const Ema* with) {
    save_checkpoint(path, parts.config, {"a", "b", "c", "d"}, parts.model.params, parts.optimizer, parts.policy, {}, with);
  };
  save(ema.get());
  const auto load = [&](Ema* into) {
    return load_checkpoint(path, parts.config, parts.model.params, parts.optimizer, parts.policy, into).average_begins;
  };
  CHECK_FALSE(load(back.get()));
  CHECK(back->updates() == 3);
  const auto averages = ema->state();
  for (const auto& [name, average] : back->state()) CHECK(average.to_vector<float>() == averages.at(name).to_vector<float>());
  const LoadedModel averaged = load_model(path), raw = load_model(path, WeightsKind::raw);
  CHECK(averaged.averaged);
  CHECK_FALSE(raw.averaged);
  CHECK(averaged.class_names == raw.class_names);
  CHECK(averaged.config == raw.config);
  CHECK(averaged.weights.at("head.weight").to_vector<float>() == averages.at("head.weight").to_vector<float>());
  CHECK(raw.weights.at("head.weight").to_vector<float>() == parts.model.params.at("head.weight").value.to_vector<float>());
  CHECK(raw.weights.at("head.weight").to_vector<float>() != averaged.weights.at("head.weight").to_vector<float>());
  CHECK_FALSE(load(nullptr));  // a run without an average leaves it
  save(nullptr);
  CHECK(load(back.get()));
  CHECK(back->updates() == 0);
  CHECK(back->state().at("head.weight").to_vector<float>() == raw.weights.at("head.weight").to_vector<float>());
  CHECK_THROWS_WITH(load_model(path, WeightsKind::ema), Contains("has no moving average"));
}

TEST_CASE("checkpoint: the same state writes the same bytes into any folder") {
  const TemporaryFolder folder;
  const auto at = [&](const char* name) { return (folder.path() / name).string(); };
  Parts a(config_of({"output=here"})), b(config_of({"output=there"}));
  a.save(at("a"), {}), b.save(at("b"), {});
  for (const char* file : {"/model.safetensors", "/state.safetensors", "/state.json", "/manifest.json"})
    CHECK(read_text(at("a") + file) == read_text(at("b") + file));
  CHECK(load_model(at("a")).class_names == std::vector<std::string>{"a", "b", "c", "d"});
}

TEST_CASE("checkpoint: another model, a bare file of weights and things that are no checkpoint are refused") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts small(config_of()), wide(config_of({"model.width=48"})), deep(config_of({"model.depth=2"}));
  small.save(path, {});
  CHECK_THAT(error_of([&] { wide.load(path); }), Contains("another model") && Contains("24]") && Contains("48]"));
  CHECK_THAT(error_of([&] { deep.load(path); }), Contains("missing blocks.1.norm1.weight") && Contains("missing blocks.1.mlp.fc2.bias"));
  CHECK_THAT(error_of([&] { small.load(path + "/model.safetensors"); }), Contains("file of weights"));
  CHECK_THAT(error_of([&] { load_model(folder.path().string()); }), Contains("neither a checkpoint"));
  CHECK_THAT(error_of([&] { find_checkpoint("absent", "run", no_warning); }), Contains("no checkpoint at absent"));
  CHECK(find_checkpoint("auto", (folder.path() / "absent").string(), no_warning).empty());
  CHECK(find_checkpoint("", "run", no_warning).empty());
}

TEST_CASE("checkpoint: reading one removes nothing beside it") {
  const TemporaryFolder folder;
  const std::string run = (folder.path() / "run").string();
  Parts parts(config_of());
  parts.save(run + "/checkpoints/last", {});
  const std::vector<std::string> others{"run.old", "run.tmp", "run/checkpoints/last.tmp", "run/checkpoints/best.tmp"};
  for (const std::string& name : others) folder.write(name + "/file", {1});
  CHECK(resolve_checkpoint(run, "best") == run + "/checkpoints/last");
  load_model(run);
  for (const std::string& name : others) CHECK(fs::exists(folder.path() / name / "file"));
}

TEST_CASE("checkpoint: truncated at every 64th part and with any bit flipped it is refused, never read") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  parts.save(path, {});
  for (const std::string file : {"/model.safetensors", "/state.safetensors", "/state.json", "/manifest.json"}) {
    const std::string whole = read_text(path + file);
    for (size_t i = 0; i < 64; ++i) {
      std::string cut = whole.substr(0, whole.size() * i / 64), flipped = whole;
      flipped[whole.size() * i / 64] ^= static_cast<char>(1 << (i % 8));
      for (const std::string& damaged : {cut, flipped}) {
        OutputFile out(path + file);
        out.write(damaged);
        out.close();
        CHECK_THROWS_AS(parts.load(path), Error);
      }
    }
    OutputFile out(path + file);
    out.write(whole);
    out.close();
  }
  CHECK_NOTHROW(parts.load(path));
}

TEST_CASE("checkpoint: changed keys are told apart from harmless ones") {
  const RunConfig then = config_of();
  CHECK(changed_keys(then, config_of({"output=x", "data.workers=7", "train.log_interval=3"})).empty());
  const auto changed = changed_keys(then, config_of({"train.epochs=77", "optimizer.lr=0.5", "storage=[{match: \"*\", codec: bf16}]"}));
  REQUIRE(changed.size() == 3);
  CHECK(changed[0] == std::pair<std::string, std::string>("train.epochs", "10"));
  CHECK(changed[1].first == "optimizer.lr");
  CHECK(changed[2] == std::pair<std::string, std::string>("storage", "exact"));
  LoadedRun loaded{{}, then};
  CHECK_NOTHROW(describe_changes(loaded, config_of({"seed=6"})));
  loaded.state.batch = 1;
  CHECK_THROWS_AS(describe_changes(loaded, config_of({"seed=6"})), UsageError);
}

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
