// What training minimizes: mixed labels, independent classes, and a teacher, against formulas in double.
#include "mesa/train/objective.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/plan.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/device.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

constexpr const char* kStudent =
    "model: {name: vit, image_size: 16, patch_size: 8, width: 12, depth: 1, heads: 3, classes: 4, distilled: true}\n"
    "data: {kind: shapes}\n";

RunConfig config_of(const std::vector<std::string>& sets) { return parse_config(kStudent, "student.yaml", sets); }

/// A teacher in a file, without and with the config of the run that made it.
struct SavedTeacher {
  TemporaryFolder folder;
  ParamStore params;
  RunConfig config =
      parse_config("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 2, classes: 4}\n", "t.yaml");
  Net net{Builder(params, 3), model_config(config, 4)};
  std::string path(const char* name) const { return (folder.path() / name).string(); }
  std::string save(const char* name, const std::map<std::string, std::string>& metadata) const {
    std::vector<NamedTensor> weights;
    for (const Param& p : params.params()) weights.push_back({p.name, p.value});
    write_safetensors(path(name), weights, metadata);
    return path(name);
  }
  std::string with_config() const { return save("teacher.safetensors", {{"mesa.config", to_yaml(config)}}); }
};

struct Batch2 {
  Tensor images = to(normal_tensor({4, 3, 16, 16}, "images", DType::f32), test_device());
  Tensor labels = to(Tensor::from<int64_t>({4}, {0, 3, 1, 3}), test_device());
  Tensor mixing = to(Tensor::from<float>({4, 6}, {1, 0, 0, 0, 0, 1, .5f, 0, 0, 16, 16, .5f, 0, 0, 0, 8, 8, .75f, .5f, 0, 0, 16, 16, .5f}),
                     test_device());
};

/// The student with its heads' logits.
struct Student {
  RunConfig config;
  BuiltModel built;
  std::vector<double> cls, dist;
  Student(const RunConfig& c, const Batch2& batch) : config(c), built(config, model_config(config, 4), test_device()) {
    const std::vector<Var> heads = built.net.heads(batch.images);
    cls = to(heads.front().value(), kCpu).to_vector<double>(), dist = to(heads.back().value(), kCpu).to_vector<double>();
  }
  double loss(const Batch2& batch) {
    const Objective objective(config, built.net.input(), test_device());
    const Targets targets = objective.targets({batch.images, batch.labels, batch.mixing});
    return to(objective(built.net, batch.images, targets).value(), kCpu).to_vector<double>()[0];
  }
};

std::vector<double> log_softmax(const std::vector<double>& x, double temperature, int64_t K = 4) {
  std::vector<double> out(x.size());
  for (size_t row = 0; row < x.size(); row += K) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += std::exp(x[row + k] / temperature);
    for (int64_t k = 0; k < K; ++k) out[row + k] = x[row + k] / temperature - std::log(sum);
  }
  return out;
}

/// Labels 0, 3, 1, 3 mixed by Batch2's shares, smoothed.
std::vector<double> soft_targets(double smoothing) {
  const double shares[] = {1, 0.5, 0.75, 0.5};
  const int labels[] = {0, 3, 1, 3};
  std::vector<double> t(16, smoothing / 4);
  for (int b = 0; b < 4; ++b) {
    t[b * 4 + labels[b]] += (1 - smoothing) * shares[b];
    t[b * 4 + labels[b ^ 1]] += (1 - smoothing) * (1 - shares[b]);
  }
  return t;
}

double soft_cross_entropy(const std::vector<double>& x, const std::vector<double>& t) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum -= t[i] * log_softmax(x, 1)[i] / 4;
  return sum;
}

}  // namespace

TEST_CASE("objective: mixed labels and independent classes") {
  INFO(seed_note());
  const Batch2 batch;
  Student mixed(config_of({"data.mixup=0.8", "train.label_smoothing=0.1"}), batch);
  std::vector<double> mean;
  for (size_t i = 0; i < 16; ++i) mean.push_back((mixed.cls[i] + mixed.dist[i]) / 2);
  CHECK(mixed.loss(batch) == Approx(soft_cross_entropy(mean, soft_targets(0.1))).epsilon(1e-5));
  Student binary(config_of({"train.loss=bce", "data.cutmix=1"}), batch);
  double want = 0;
  const std::vector<double> t = soft_targets(0);
  for (size_t i = 0; i < 16; ++i) want += (std::log1p(std::exp(mean[i])) - t[i] * mean[i]) / 16;
  CHECK(binary.loss(batch) == Approx(want).epsilon(1e-5));
  Student sharp(config_of({"train.loss=bce", "data.cutmix=1", "train.bce_threshold=0.3"}), batch);
  want = 0;
  for (size_t i = 0; i < 16; ++i) want += (std::log1p(std::exp(mean[i])) - (t[i] > 0.3 ? mean[i] : 0)) / 16;
  CHECK(sharp.loss(batch) == Approx(want).epsilon(1e-5));
}

TEST_CASE("objective: a teacher's choices, or its probabilities at a temperature") {
  INFO(seed_note());
  const Batch2 batch;
  const SavedTeacher teacher;
  const std::string from = "distill.teacher=" + teacher.with_config();
  ParamStore there;
  const Net net(Builder(there, 3, DType::f32, DType::f32, test_device()), model_config(teacher.config, 4));
  const std::vector<double> says = to(net(batch.images).value(), kCpu).to_vector<double>();

  Student hard(config_of({"distill.kind=hard", from, "distill.alpha=0.3", "data.mixup=1"}), batch);
  double imitated = 0;
  for (int b = 0; b < 4; ++b)
    imitated -= log_softmax(hard.dist, 1)[b * 4 + (std::max_element(&says[b * 4], &says[b * 4] + 4) - &says[b * 4])] / 4;
  CHECK(hard.loss(batch) == Approx(0.7 * soft_cross_entropy(hard.cls, soft_targets(0)) + 0.3 * imitated).epsilon(1e-5));

  Student soft(config_of({"distill.kind=soft", from, "distill.alpha=0.6", "distill.tau=3", "data.mixup=1"}), batch);
  const std::vector<double> log_p = log_softmax(says, 3), log_q = log_softmax(soft.dist, 3);
  double divergence = 0;  // DeiT's losses.py: kl_div(.., reduction='sum') T^2 / numel
  for (size_t i = 0; i < 16; ++i) divergence += std::exp(log_p[i]) * (log_p[i] - log_q[i]) * 9 / 16;
  CHECK(soft.loss(batch) == Approx(0.4 * soft_cross_entropy(soft.cls, soft_targets(0)) + 0.6 * divergence).epsilon(1e-4));
}

TEST_CASE("objective: a teacher is not trained, keeps nothing, and is in the plan") {
  const Batch2 batch;
  const SavedTeacher teacher;
  const RunConfig config = config_of({"distill.kind=soft", "distill.teacher=" + teacher.with_config()});
  Student student(config, batch);
  const auto planned = [&](std::vector<std::string> sets) {
    const RunConfig c = config_of(sets);
    return plan_run(c, model_config(c, 4)).peak;
  };
  const MemoryUse with = planned({"distill.kind=soft", "distill.teacher=" + teacher.with_config()}), without = planned({});
  CHECK(with.peak_kind[static_cast<int>(MemoryKind::parameters)] - without.peak_kind[static_cast<int>(MemoryKind::parameters)] ==
        4 * teacher.params.count());
  student.built.params.allocate_gradients();
  const Objective objective(config, student.built.net.input(), test_device());
  const int64_t none = Allocator::of(test_device()).use().of(MemoryKind::activations);
  const Targets targets = objective.targets({batch.images, batch.labels, {}});
  CHECK(Allocator::of(test_device()).use().of(MemoryKind::activations) == none);
  const int64_t before = Allocator::of(test_device()).use().of(MemoryKind::activations);
  StoragePolicy policy = make_policy(reference_storage());
  Tape tape(policy);
  const Var loss = objective(student.built.net, batch.images, targets);
  CHECK(Allocator::of(test_device()).use().of(MemoryKind::activations) > before);
  tape.backward(loss);
  for (const Param& p : student.built.params.params()) CHECK(p.grad_written);
}

TEST_CASE("objective: what does not go together is refused at its key") {
  const SavedTeacher teacher;
  const std::string good = teacher.with_config(), bare = teacher.save("bare.safetensors", {});
  const auto make = [](std::vector<std::string> sets) {
    const RunConfig config = config_of(sets);
    const Objective objective(config, model_config(config, 4).input(), kCpu);
  };
  CHECK_THROWS_WITH(make({"distill.kind=hard"}), Contains("distill.teacher") && Contains("is empty"));
  CHECK_THROWS_WITH(make({"distill.teacher=x"}), Contains("--set distill.teacher") && Contains("soft or hard"));
  CHECK_THROWS_WITH(make({"distill.alpha=0.9"}), Contains("--set distill.alpha") && Contains("no effect"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.tau=2"}), Contains("--set distill.tau") && Contains("hard"));
  CHECK_THROWS_WITH(make({"train.bce_threshold=0"}), Contains("--set train.bce_threshold") && Contains("cross_entropy"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=/nowhere"}), Contains("--set distill.teacher") && Contains("/nowhere"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + bare}), Contains("distill.model"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + bare, "distill.model=vit"}), Contains("belongs to another model"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + good, "model.classes=5"}), Contains("4 classes") && Contains("of 5"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + good, "model.image_size=32"}), Contains("16 x 16") && Contains("32"));
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + good, "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"}),
                    Contains("another data.mean or data.std"));
  for (const char* one : {"[0, 0.5, 0.5]", "[0.5, 0.5, 0.4]"}) {  // the mean alone, the deviation alone
    const std::string mean = one[1] == '0' && one[2] == ',' ? one : "[0.5, 0.5, 0.5]", std = mean == one ? "[0.5, 0.5, 0.5]" : one;
    CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + good, "data.mean=" + mean, "data.std=" + std}),
                      Contains("another data.mean or data.std"));
  }
  CHECK_NOTHROW(make({"distill.kind=hard", "distill.teacher=" + good, "data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"}));
  CHECK_NOTHROW(make({"distill.kind=hard", "distill.teacher=" + good}));
  SavedTeacher broken;
  broken.params.at("blocks.0.mlp.fc1.weight").value.data<float>()[2] = std::nanf("");
  CHECK_THROWS_WITH(make({"distill.kind=hard", "distill.teacher=" + broken.with_config()}),
                    Contains("distill.teacher") && Contains("not finite") && Contains("blocks.0.mlp.fc1.weight (element 2)"));
  const RunConfig odd = config_of({"data.mixup=1", "train.batch_size=7"});
  CHECK_THROWS_WITH(make_loader_options(odd, true, kCpu), Contains("train.batch_size") && Contains("7 is odd"));
}
