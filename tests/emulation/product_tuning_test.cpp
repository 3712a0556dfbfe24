// The choice among a library's algorithms for products.
#include "../../src/train/product_tuning.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "../../kernels/cuda/cublaslt_plan.h"
#include "cublaslt_descriptors.h"
#include "emulator.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/base/files.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/files.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/trainer.h"
#include "streams.h"
#include "support/data_files.h"
#include "support/random.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;
using emulation::algorithm_uses;
using std::chrono::microseconds;

namespace {

/// What each algorithm takes while this lives, as nothing else takes any time, and how often it ran since.
struct Delays {
  explicit Delays(std::array<int, 3> all) {
    for (size_t i = 0; i < all.size(); ++i) algorithm_uses[i] = {microseconds(all[i]), 0};
  }
  ~Delays() {
    for (auto& use : algorithm_uses) use = {};
    kernels::tune_products(false);
  }
  static std::array<int, 3> runs() {
    std::array<int, 3> out{};
    for (size_t i = 0; i < out.size(); ++i) out[i] = std::exchange(algorithm_uses[i].runs, 0);
    return out;
  }
  emulation::ToldTime time;
};

Tensor on_gpu(const Tensor& host) { return to(host, kCuda); }
std::vector<double> numbers_of(const Tensor& t) { return to(t, kCpu).to_vector<double>(); }

/// c = a b + bias.
struct Product {
  Tensor a = on_gpu(normal_tensor({24, 16}, "a", DType::f32)), b = on_gpu(normal_tensor({16, 8}, "b", DType::f32)),
         bias = on_gpu(normal_tensor({8}, "bias", DType::f32)), c = Tensor::zeros({24, 8}, DType::f32, kCuda);
  std::vector<double> operator()(const Tensor& addend = {}) const {
    kernels::matmul(a, b, c, bias, addend);
    return numbers_of(c);
  }
};

/// As Delays, for products with an epilogue.
struct Epilogues {
  explicit Epilogues(const emulation::EpilogueUse& use) { emulation::epilogue_use = use; }
  ~Epilogues() { emulation::epilogue_use = {}; }
};

/// The text of an algorithm with another number: the upper half of its fifth word.
std::string numbered(const std::string& algorithm, uint64_t number) {
  std::istringstream words(algorithm);
  std::string out;
  uint64_t word = 0;
  for (int i = 0; words >> word; ++i) out += concat(i > 0 ? " " : "", i == 4 ? (word & 0xffffffffu) | number << 32 : word);
  return out;
}

}  // namespace

TEST_CASE("tuning: the fastest algorithm of each form is found once, and then runs alone", "[emulation]") {
  const Product product;
  const std::vector<double> want = product();
  const Delays delays({2000, 0, 2000});
  kernels::tune_products(true);
  CHECK(kernels::product_choices().empty());
  CHECK(product() == want);
  const auto first = Delays::runs();
  CHECK((first[0] > 1 && first[1] > first[0] && first[2] == first[0]));
  for (int i = 0; i < 3; ++i) CHECK(product() == want);
  CHECK(Delays::runs() == std::array{0, 3, 0});
  CHECK(kernels::product_choices().size() == 1);

  Product other;  // of another form
  other.a = on_gpu(normal_tensor({40, 16}, "a", DType::f32)), other.c = Tensor::zeros({40, 8}, DType::f32, kCuda);
  other();
  CHECK(Delays::runs()[1] > 1);
  CHECK(kernels::product_choices().size() == 2);

  kernels::tune_products(false);
  CHECK(product() == want);
  CHECK(Delays::runs() == std::array{1, 0, 0});
}

TEST_CASE("tuning: the library's first suggestion stays unless another is clearly faster", "[emulation]") {
  using kernels::cuda::blas::clearly_fastest;
  CHECK(clearly_fastest({1e-3}) == 0);
  CHECK(clearly_fastest({1e-3, 0.99e-3, 0.97e-3, 0.975e-3}) == 2);
  CHECK(clearly_fastest({1e-3, 0.985e-3, 2e-3}) == 0);
  CHECK(clearly_fastest({5e-6, 4.5e-6}) == 0);  // 10 %, but half a microsecond
  CHECK(clearly_fastest({5e-6, 3.5e-6}) == 1);
}

TEST_CASE("tuning: algorithms that do not run are left out, and that none does is an error with its reason", "[emulation]") {
  const Product product;
  const std::vector<double> want = product();
  Delays delays({2000, 0, 1000});
  algorithm_uses[1].fails = true;
  kernels::tune_products(true);
  CHECK(product() == want);
  Delays::runs(), product();
  CHECK(Delays::runs() == std::array{0, 0, 1});
  for (auto& use : algorithm_uses) use.fails = true;
  kernels::tune_products(true);
  CHECK_THROWS_WITH(product(), Catch::Contains("multiplying"));
  for (auto& use : algorithm_uses) use.fails = false;
  CHECK(product() == want);  // nothing of it stays
}

TEST_CASE("products: an algorithm that the library takes back is replaced by its next, an epilogue by a pass of its own", "[emulation]") {
  const Product product;
  const std::vector<double> want = product();
  const Delays delays({0, 0, 0});
  kernels::tune_products(false);  // nothing is known
  algorithm_uses[0].fails = true;
  CHECK(product() == want);
  CHECK(product() == want);
  CHECK(Delays::runs() == std::array{1, 2, 0});  // and is not tried again
  kernels::tune_products(false);
  for (auto& use : algorithm_uses) use.fails = true;
  CHECK_THROWS_WITH(product(), Catch::Contains("multiplying"));
  const auto all = Delays::runs();
  CHECK((all[0] == 2 && all[1] == 2 && all[2] == 2));  // with the bias and without
}

TEST_CASE("products: an algorithm whose sums some versions of cuBLAS get wrong is not taken", "[emulation]") {
  const Product product;  // 16 long
  const Delays delays({0, 0, 0});
  const auto taken = [&](int configuration, int parts) {
    algorithm_uses[0].configuration = configuration, algorithm_uses[0].parts = parts;
    kernels::tune_products(false);
    product();
    return Delays::runs() == std::array{1, 0, 0};
  };
  CHECK(taken(66, 4));
  CHECK(taken(65, 3));
  CHECK_FALSE(taken(66, 3));
  algorithm_uses[0].reduction_scheme = 1;  // in place
  CHECK_FALSE(taken(0, 1));
}

TEST_CASE("products: nor is it where an earlier process has chosen it", "[emulation]") {
  const Product product;
  const Delays delays({0, 2000, 2000});
  kernels::tune_products(true);
  product();
  const auto choices = kernels::product_choices();
  REQUIRE(choices.size() == 1);
  const auto taken = [&] {
    kernels::tune_products(true, choices);
    Delays::runs();
    product();
    return Delays::runs() == std::array{1, 0, 0};
  };
  CHECK(taken());
  algorithm_uses[0].configuration = 66, algorithm_uses[0].parts = 3;
  CHECK_FALSE(taken());
}

TEST_CASE("products: sums that leave most of the GPU idle are had apart", "[emulation]") {
  const Tensor dy = on_gpu(normal_tensor({48, 8}, "dy", DType::f32)), x = on_gpu(normal_tensor({48, 16}, "x", DType::f32));
  const auto passes = [&](float waves) {
    const Epilogues use({.waves = waves});
    kernels::tune_products(false);
    const auto summed = [] {
      int64_t started = 0;
      for (const auto& [name, times] : emulation::launches()) started += name.starts_with("sum_") ? times : 0;
      return started;
    };
    const int64_t before = summed();
    const Tensor dw = Tensor::empty({8, 16}, DType::f32, kCuda), db = Tensor::empty({8}, DType::f32, kCuda);
    kernels::matmul_weight_grad(dy, x, dw, false, db, false);
    double want = 0;
    const std::vector<double> rows = numbers_of(dy);
    for (size_t row = 0; row < 48; ++row) want += rows[8 * row];
    CHECK(std::abs(numbers_of(db)[0] - want) < 1e-5);
    return summed() - before;
  };
  CHECK(passes(1) == 0);
  CHECK(passes(0.6f) == 0);
  CHECK(passes(0.3f) == 1);
  kernels::tune_products(false);
}

TEST_CASE("products: a profile has those that ran, not what the library has no algorithm for", "[emulation]") {
  const Product product;
  const std::vector<double> want = product();
  const emulation::ToldTime time;
  kernels::tune_products(false);  // nothing is known
  emulation::epilogue_use.algorithms = 0;
  cuda::start_profile();
  CHECK(product() == want);
  CHECK(product() == want);
  const std::vector<cuda::ProfileRow> rows = cuda::end_profile();
  emulation::epilogue_use = {};
  emulation::epilogue_use.delay = microseconds(3000);
  kernels::tune_products(false);
  cuda::start_profile();
  product(), product();
  const std::vector<cuda::ProfileRow> slow = cuda::end_profile();
  emulation::epilogue_use = {};
  REQUIRE(!slow.empty());
  CHECK_THAT(slow[0].name, Catch::StartsWith("product: "));
  CHECK(slow[0].calls == 2);
  CHECK(slow[0].ms == Approx(6));
  kernels::tune_products(false);
  std::map<std::string, int64_t> calls;
  for (const cuda::ProfileRow& row : rows) calls[row.name.substr(0, row.name.find(", aligned"))] = row.calls;
  CHECK(calls == std::map<std::string, int64_t>{{"product: fp32 24x16/16 * fp32 16x8/8 = fp32 24x8/8", 2}, {"add_rows", 2}});
}

TEST_CASE("tuning: the sums of a weight's gradient get a pass of their own where that is faster", "[emulation]") {
  const Tensor dy = on_gpu(normal_tensor({24, 8}, "dy", DType::f32)), x = on_gpu(normal_tensor({24, 16}, "x", DType::f32));
  const Tensor dw = Tensor::zeros({8, 16}, DType::f32, kCuda), db = Tensor::zeros({8}, DType::f32, kCuda);
  const auto gradients = [&] {
    kernels::fill(dw, -1), kernels::fill(db, -1);
    kernels::matmul_weight_grad(dy, x, dw, false, db, false);
    std::vector<double> all = numbers_of(dw), sums = numbers_of(db);
    all.insert(all.end(), sums.begin(), sums.end());
    return all;
  };
  const auto check = [&](const std::vector<double>& want) {
    const std::vector<double> got = gradients();
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < got.size(); ++i) CHECK(std::fabs(got[i] - want[i]) <= 1e-5 * std::max(1.0, std::fabs(want[i])));
  };
  const std::vector<double> want = gradients();
  const Delays delays({0, 0, 0});
  std::map<std::string, std::string> choices;
  for (const int algorithms : {1, 3}) {
    const Epilogues slow({microseconds(10000), algorithms});
    kernels::tune_products(true);
    check(want), check(want);
    choices = kernels::product_choices();
    REQUIRE(choices.size() == 2);  // with sums, and without
    CHECK(std::count_if(choices.begin(), choices.end(), [](const auto& c) { return c.second == "apart"; }) == 1);
  }
  Delays::runs();
  kernels::tune_products(true, choices);  // as a run that is resumed
  check(want);
  const auto runs = Delays::runs();
  CHECK(runs[0] + runs[1] + runs[2] == 1);
  CHECK(kernels::product_choices() == choices);
}

TEST_CASE("tuning: what is added to in its place is added once, and no choice is made there", "[emulation]") {
  const Product product;
  const std::vector<double> once = product();
  const Delays delays({2000, 0, 2000});
  kernels::tune_products(true);
  const std::vector<double> twice = product(product.c);
  for (size_t i = 0; i < once.size(); ++i) CHECK(std::fabs(twice[i] - 2 * once[i]) <= 1e-5 * std::max(1.0, std::fabs(once[i])));
  CHECK(Delays::runs() == std::array{1, 0, 0});
  CHECK(kernels::product_choices().empty());
  const Tensor residual = on_gpu(normal_tensor({24, 8}, "residual", DType::f32));
  const std::vector<double> sum = product(residual), r = numbers_of(residual);  // beside it: can be run again
  for (size_t i = 0; i < once.size(); ++i) CHECK(std::fabs(sum[i] - once[i] - r[i]) <= 1e-5 * std::max(1.0, std::fabs(sum[i])));
  CHECK(kernels::product_choices().size() == 1);
  Delays::runs();
  product(product.c);  // of the same form, so by the same algorithm
  CHECK(Delays::runs() == std::array{0, 1, 0});
}

TEST_CASE("tuning: sums beside a weight gradient are right, and recorded work is not timed", "[emulation]") {
  const Tensor dy = on_gpu(normal_tensor({32, 8}, "dy", DType::f32)), x = on_gpu(normal_tensor({32, 16}, "x", DType::f32));
  const Tensor dw = Tensor::zeros({8, 16}, DType::f32, kCuda), db = Tensor::zeros({8}, DType::f32, kCuda);
  kernels::matmul_weight_grad(dy, x, dw, false, db, false);
  const std::vector<double> want_w = numbers_of(dw), want_b = numbers_of(db);
  const Delays delays({2000, 2000, 0});
  kernels::tune_products(true);
  cuda::begin_recording();
  kernels::matmul_weight_grad(dy, x, dw, false, db, false);
  const cuda::Recording record = cuda::end_recording();
  CHECK(Delays::runs() == std::array{1, 0, 0});
  kernels::fill(dw, 0), kernels::fill(db, 0);
  cuda::run(record);
  CHECK(numbers_of(dw) == want_w);
  kernels::fill(dw, 0), kernels::fill(db, 0);
  kernels::matmul_weight_grad(dy, x, dw, false, db, false);
  CHECK(numbers_of(dw) == want_w);
  CHECK(numbers_of(db) == want_b);
  kernels::matmul_weight_grad(dy, x, dw, true, db, true);
  for (size_t i = 0; i < want_b.size(); ++i) CHECK(numbers_of(db)[i] == Approx(2 * want_b[i]));
  CHECK(numbers_of(dw)[5] == Approx(2 * want_w[5]));
}

TEST_CASE("tuning: choices of another process are taken over, and those that fit no product are not", "[emulation]") {
  const Product product;
  const std::vector<double> want = product();
  const Delays delays({2000, 2000, 0});
  kernels::tune_products(true);
  product();
  const auto choices = kernels::product_choices();
  REQUIRE(choices.size() == 1);
  const Delays now({0, 1000, 1000});  // what is slower here is taken all the same
  kernels::tune_products(true, choices);
  CHECK(product() == want);
  CHECK(Delays::runs() == std::array{0, 0, 1});
  const auto& [form, algorithm] = *choices.begin();
  for (const std::string& bad : {std::string(), std::string("fast"), std::string("1 2 3"), "1" + algorithm}) {
    CAPTURE(bad);
    kernels::tune_products(true, {{form, bad}});
    CHECK(product() == want);
    CHECK(Delays::runs()[0] > 1);  // chosen anew
    CHECK(kernels::product_choices().at(form) != algorithm);
  }
}

TEST_CASE("tuning: a run keeps its choices, and goes on with them bit for bit", "[emulation]") {
  const TemporaryFolder folder;
  const auto run = [&](const std::string& name, std::vector<std::string> sets, const std::string& resume = "") {
    sets.insert(sets.begin(), {"device=cuda", "train.autotune=true", "train.epochs=2", "schedule.name=constant"});
    RunConfig config = parse_config(kTinyTraining, "tiny.yaml", sets);
    config.output = (folder.path() / name).string();
    return train(config, {resume, true});
  };
  const auto weights = [&](const std::string& name) {
    std::map<std::string, std::vector<float>> out;
    for (const NamedTensor& t : read_safetensors((folder.path() / name / "checkpoints/last/model.safetensors").string()).tensors)
      out[t.name] = t.tensor.to_vector<float>();
    return out;
  };
  const auto file = [&](const std::string& name) { return (folder.path() / name / "products.json").string(); };
  const Delays counting({0, 0, 0});
  const bool sums_apart = GENERATE(false, true);
  CAPTURE(sums_apart);
  const Epilogues slow({microseconds(sums_apart ? 10000 : 0)});
  REQUIRE(run("run", {"train.steps=3"}) == 0);
  auto kept = nlohmann::json::parse(read_text(file("run")));
  CHECK(kept.at("library").get<std::string>().find("cublasLt") == 0);
  CHECK(kept.at("algorithms").size() > 5);
  int apart = 0;
  for (auto& algorithm : kept.at("algorithms"))
    if (algorithm == "apart")
      ++apart;
    else
      algorithm = numbered(algorithm, 2);  // as if that had been the fastest of each
  CHECK((apart > 0) == sums_apart);
  write_file_atomically(file("run"), kept.dump());
  Delays::runs();
  const auto only_that_ran = [] {  // nothing is timed again
    const auto runs = Delays::runs();
    return runs[0] == 0 && runs[1] == 0 && runs[2] > 0;
  };
  REQUIRE(run("run", {}, "auto") == 0);
  CHECK(only_that_ran());
  CHECK(nlohmann::json::parse(read_text(file("run"))) == kept);
  REQUIRE(run("elsewhere", {"train.epochs=3"}, (folder.path() / "run/checkpoints/last").string()) == 0);  // finds them where it comes from
  CHECK(only_that_ran());
  CHECK(nlohmann::json::parse(read_text(file("elsewhere"))) == kept);
  REQUIRE(run("straight", {}) == 0);  // the emulated algorithms compute the same
  CHECK(weights("run") == weights("straight"));
  if (sums_apart) return;

  int epochs = 2;
  // Choices of another GPU, or a damaged file: chosen anew, and said so.
  for (const std::string& text : {std::string(R"({"library": "cublasLt 1 on another", "algorithms": {}})"), std::string("{")}) {
    write_file_atomically(file("run"), text);
    REQUIRE(run("run", {concat("train.epochs=", ++epochs)}, "auto") == 0);
    CHECK(nlohmann::json::parse(read_text(file("run"))).at("algorithms").size() == kept.at("algorithms").size());  // and written again
    CHECK(read_text((folder.path() / "run/log.txt").string()).find("algorithms are chosen anew") != std::string::npos);
  }
}

TEST_CASE("tuning: each rank goes on with its own choices, and one that has none with those of rank 0", "[emulation]") {
  const TemporaryFolder folder;
  const Product product;
  const std::vector<double> want = product();
  const Delays delays({2000, 2000, 2000});
  // What a rank runs when `fastest` is (if it times anything).
  const auto runs_of = [&](int64_t rank, size_t fastest) {
    std::string warnings;
    ProductTuning tuning(folder.path().string(), "", rank, [&](const std::string& warning) { warnings += warning; });
    algorithm_uses[fastest].delay = microseconds(0);
    product();
    algorithm_uses[fastest].delay = microseconds(2000);
    Delays::runs();
    CHECK(product() == want);
    tuning.keep();
    CHECK(warnings.empty());
    return Delays::runs();
  };
  CHECK(runs_of(1, 2) == std::array{0, 0, 1});
  CHECK(runs_of(0, 1) == std::array{0, 1, 0});
  CHECK(runs_of(1, 0) == std::array{0, 0, 1});
  CHECK(runs_of(2, 0) == std::array{0, 1, 0});
  CHECK(std::filesystem::exists(folder.path() / "products-rank1.json"));
}

TEST_CASE("products: where a result in bf16 is summed in parts, these stay f32", "[emulation]") {
  const Tensor a = Tensor::zeros({32, 512}, DType::bf16, kCuda), b = Tensor::zeros({512, 32}, DType::bf16, kCuda);
  const Tensor c = Tensor::zeros({32, 32}, DType::bf16, kCuda);
  kernels::fill(a, 0.0625), kernels::fill(b, 1);
  kernels::matmul(a, b, c);  // few tiles of a long sum; the emulated library refuses if parts might be rounded
  CHECK(numbers_of(c) == std::vector<double>(32 * 32, 32));
}

TEST_CASE("products: attention's rows of scores begin at multiples of 16 bytes, however many keys there are", "[emulation]") {
  const Delays delays({0, 0, 0});
  kernels::tune_products(true);  // which tells the forms
  const auto tensor = [](const Shape& shape, const char* name) { return on_gpu(normal_tensor(shape, name, DType::bf16)); };
  const Tensor q = tensor({2, 5, 32}, "q"), kv = tensor({2, 7, 64}, "kv"), o = empty_like(q), dq = empty_like(q), dkv = empty_like(kv);
  const auto part = [](const Tensor& t, int i) { return t.narrow(-1, 32 * i, 32); };
  const Tensor lse = Tensor::empty({2, 2, 5}, DType::f32, kCuda);
  kernels::attention(q, part(kv, 0), part(kv, 1), 2, 0.25, o, lse);
  kernels::attention_grad(tensor({2, 5, 32}, "d_o"), {q, {}}, {part(kv, 0), {}}, {part(kv, 1), {}}, o, lse, 2, 0.25, dq, part(dkv, 0),
                          part(dkv, 1));
  std::set<std::string> forms;
  for (const auto& [form, algorithm] : kernels::product_choices()) {
    INFO(form);
    // "bf16 t 5x7/8": the number behind the slash is the distance of rows, in elements.
    int matrices = 0;
    for (const auto& [type, bytes] : {std::pair{"bf16 ", 2}, {"fp32 ", 4}})
      for (size_t at = form.find(type); at != std::string::npos; at = form.find(type, at + 1), ++matrices)
        CHECK(std::stoi(form.substr(form.find('/', at) + 1)) * bytes % 16 == 0);
    CHECK(matrices == 3);
    forms.insert(form.substr(0, form.find(", aligned")));
  }
  CHECK(forms.size() == 3);  // q k^T and dO v^T, P v and dS k, P^T dO and dS^T q
}
