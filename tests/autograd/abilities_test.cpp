// What ops do on their way back to spare passes over memory: values rebuilt beside gradients, gradients added in place and copied.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"
#include "support/worst.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// x + fc2(gelu(fc1(norm(x)))), as a block of a transformer has it, in bf16 between the residuals.
struct ResidualMlp {
  Param x = make_param("x", {32, 64}), gamma = make_param("gamma", {64}), beta = make_param("beta", {64}),
        fc1 = make_param("fc1", {128, 64}), b1 = make_param("b1", {128}), fc2 = make_param("fc2", {64, 128}), b2 = make_param("b2", {64});

  std::vector<Param*> params() { return {&x, &gamma, &beta, &fc1, &b1, &fc2, &b2}; }
  Var block(const Var& in, bool more_readers = false) {
    const Var early = scale(in, 0.25);  // whose gradient comes last
    const Var h = layer_norm(in, Var(gamma), Var(beta), 1e-6, DType::bf16);
    const Var g = gelu(linear(h, Var(fc1), Var(b1)));
    const Var out = linear(dropout(g, 0.25), Var(fc2), Var(b2), {}, in);
    return more_readers ? add(add(out, scale(linear(g, Var(fc2), Var(b2), DType::f32), 0.5)), early) : out;
  }
  /// Two blocks' gradients of all parameters.
  std::vector<std::vector<double>> gradients(StoragePolicy& policy, bool inspected, bool more_readers = false,
                                             const std::function<void(Param&)>& ready = {}) {
    for (Param* p : params()) p->grad_written = false;
    Tape tape(policy, 5, 0);
    if (inspected) tape.inspect([](const Tensor&, const std::string&) {});
    const Var y = block(block(scale(Var(x), 1)), more_readers);
    tape.backward({y}, {normal_tensor(y.shape(), "dy")}, ready);
    std::vector<std::vector<double>> all;
    for (Param* p : params()) all.push_back(p->grad.to_vector<double>());
    return all;
  }
};

/// Keeps x of gelu and xhat, and rebuilds what linears read from them; or keeps what linears read.
StoragePolicy rebuilding() { return simple_policy({{"*", "exact", {}, ""}, {"*linear*x", "rebuild", {}, ""}}); }

}  // namespace

TEST_CASE("tape: a value that is rebuilt beside its op's gradient is the same, and so are all gradients") {
  INFO(seed_note());
  ResidualMlp mlp;
  for (const bool more_readers : {false, true}) {
    CAPTURE(more_readers);
    StoragePolicy keeping = simple_policy({{"*", "exact", {}, ""}}), rebuilds = rebuilding();
    const auto want = mlp.gradients(keeping, true, more_readers);
    for (const bool inspected : {false, true}) {
      const auto got = mlp.gradients(rebuilds, inspected, more_readers);
      REQUIRE(got.size() == want.size());
      for (size_t i = 0; i < got.size(); ++i) {
        CAPTURE(i, inspected);
        double worst = 0, largest = 0;
        for (size_t k = 0; k < got[i].size(); ++k) {
          worst = worse(worst, std::fabs(got[i][k] - want[i][k]));
          largest = std::max(largest, std::fabs(want[i][k]));
        }
        // What linears read is rounded to bf16 from xhat in bf16, not from x.
        CHECK(worst <= 0.01 * largest);
        CHECK(largest > 0);
      }
    }
    CHECK(mlp.gradients(rebuilds, false, more_readers) == mlp.gradients(rebuilds, false, more_readers));
  }
}

namespace {

/// What an op with abilities met: how often it rebuilt its result alone and beside its gradient, and with what it was told to copy.
struct Met {
  int alone = 0, beside = 0, copies = 0, factors = 0, sums = 0, columns = 0;
};
/// Ten times the sums of dx's columns, so that who makes use of them shows it.
Tensor boast(const Tensor& dx) {
  const Tensor sums = Tensor::empty({2, dx.dim(-1)}, DType::f32);
  for (const int part : {0, 1}) kernels::sum_rows(dx, sums.select(0, part), false);
  kernels::scale(sums, 5, sums);
  return sums;
}
/// 2 x in another dtype, which copies, adds and sums as layer norm does.
Var twice(const Var& x, Met& met, DType out) {
  const Op op("twice", {x});
  const Tensor y = empty_like(x.value(), out);
  kernels::scale(x.value(), 2, y);
  const Saved saved = op.save("x", x);
  const auto again = [saved](const Tensor& to) { kernels::scale(saved.get(), 2, to); };
  const auto formula = [&met, again](const Tensor& dy, const Extras& extras) -> Grads {
    if (extras.y) ++met.beside, again(*extras.y = empty_like(dy));
    const Tensor term = empty_like(dy, dy.dtype() == DType::f64 ? DType::f64 : DType::f32);
    kernels::scale(dy, 2, term);
    if (extras.sum.defined()) ++met.sums, kernels::add(extras.sum, term, term);
    if (extras.dx_copy.defined()) ++met.copies, kernels::copy(term, extras.dx_copy);
    if (extras.copy_factors.defined()) ++met.factors, kernels::scale_rows(term, extras.copy_factors, extras.dx_copy);
    if (extras.dx_sums) ++met.columns, *extras.dx_sums = boast(extras.dx_copy.defined() ? extras.dx_copy : term);
    return {term};
  };
  return op.record(y, formula, {.adds = true, .rebuild = [&met, again](const Tensor& to) { ++met.alone, again(to); }});
}

}  // namespace

TEST_CASE("tape: what is rebuilt, added and copied in one pass is so where it can be, and only there") {
  Param x = make_param("x", {4, 6}), w = make_param("w", {6, 6}), v = make_param("v", {6, 6});
  const auto gradients = [&](StoragePolicy policy, bool leaf, Met& met) {
    for (Param* p : {&x, &w, &v}) p->grad_written = false;
    Tape tape(policy);
    const Var in = linear(scale(Var(x), 1), Var(v), {}, DType::f32, scale(Var(x), 3));  // wants its gradient in f32: x is
    const Var doubled = twice(in, met, DType::f32), weight = leaf ? Var(w) : scale(Var(w), 1);
    const auto behind = [&] {
      const Scope scope("behind");
      return linear(doubled, weight, {}, DType::f32, in);
    };
    const Var low = scale(behind(), 1);
    tape.backward({low}, {normal_tensor(low.shape(), "dy")});
    std::vector<double> all;
    for (Param* p : {&x, &w, &v})
      for (const double g : p->grad.to_vector<double>()) all.push_back(g);
    return all;
  };
  Met kept, waits, at_once;
  const auto want = gradients(simple_policy({{"*", "exact", {}, ""}}), true, kept);
  CHECK((kept.alone == 0 && kept.beside == 0 && kept.sums == 1 && kept.copies == 0));
  const auto close = [&](const std::vector<double>& got) {
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < got.size(); ++i) CHECK(std::fabs(got[i] - want[i]) <= 1e-6 * std::max(1.0, std::fabs(want[i])));
  };
  const auto rebuilds = [] { return simple_policy({{"*", "exact", {}, ""}, {"behind:x", "rebuild", {}, ""}}); };
  close(gradients(rebuilds(), true, waits));
  CHECK((waits.alone == 0 && waits.beside == 1));
  close(gradients(rebuilds(), false, at_once));  // scale goes back before twice does
  CHECK((at_once.alone == 1 && at_once.beside == 0));
}

TEST_CASE("tape: behind a residual the gradient is written in the dtype of products by whoever is the last to add to it") {
  Param x = make_param("x", {4, 6}), w = make_param("w", {6, 6});
  for (const bool late_reader : {false, true}) {
    CAPTURE(late_reader);
    Met met;
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
    w.grad_written = x.grad_written = false;
    Tape tape(policy);
    const Tensor low = empty_like(x.value, DType::bf16);
    kernels::copy(x.value, low);
    const Var in = linear(Var(low), Var(w), {}, DType::f32);  // its products are in bf16, its result in f32
    const Var early = scale(in, 0.5);                         // whose gradient comes last
    const Var y = scale(linear(twice(in, met, DType::bf16), Var(w), {}, {}, in), 1);
    const Tensor dy = normal_tensor(y.shape(), "dy");
    if (late_reader)
      tape.backward({y, early}, {dy, dy});
    else
      tape.backward({y}, {dy});
    CHECK((met.sums == 1 && met.copies == 1));
    // dw = (2 dy W + dy (+ dy / 2))^T x + dy^T 2 in
    const auto d = dy.to_vector<double>(), wv = w.value.to_vector<double>(), xv = x.value.to_vector<double>(),
               iv = in.value().to_vector<double>(), got = w.grad.to_vector<double>();
    for (int o = 0; o < 6; ++o)
      for (int i = 0; i < 6; ++i) {
        double sum = 0, terms = 0;
        for (int n = 0; n < 4; ++n) {
          double of_in = d[n * 6 + o] * (late_reader ? 1.5 : 1), in_terms = std::fabs(of_in);
          for (int k = 0; k < 6; ++k) of_in += 2 * d[n * 6 + k] * wv[k * 6 + o], in_terms += 2 * std::fabs(d[n * 6 + k] * wv[k * 6 + o]);
          sum += of_in * xv[n * 6 + i] + d[n * 6 + o] * 2 * iv[n * 6 + i];
          terms += in_terms * std::fabs(xv[n * 6 + i]) + std::fabs(d[n * 6 + o] * 2 * iv[n * 6 + i]);
        }
        CHECK(std::fabs(got[o * 6 + i] - sum) <= 0.015 * terms);  // a few roundings to bf16
      }
  }
}

TEST_CASE("tape: what is dropped of a branch is dropped of its gradient, by whoever writes that gradient") {
  const int64_t samples = 40, width = 6;
  Param x = make_param("x", {samples, width}), branch = make_param("branch", {samples, width});
  struct Way {
    DType x, branch;
    bool late_reader;  // whose gradient comes last
    int copies;        // written by `twice`, with the factors
  };
  for (const Way& way :
       {Way{DType::f32, DType::bf16, false, 1}, Way{DType::f32, DType::bf16, true, 1}, Way{DType::f32, DType::f32, false, 0},
        Way{DType::f64, DType::f64, false, 0}, Way{DType::bf16, DType::bf16, false, 0}}) {
    CAPTURE(to_string(way.x), to_string(way.branch), way.late_reader);
    Met met;
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
    x.value = Tensor::zeros({samples, width}, way.x), branch.value = Tensor::zeros({samples, width}, way.x);
    kernels::fill(x.value, 2), kernels::fill(branch.value, 3);
    x.grad = branch.grad = Tensor(), x.grad_written = branch.grad_written = false;
    Tape tape(policy, Catch::rngSeed());
    const Tensor narrow = Tensor::zeros({samples, width}, way.branch);
    const Var in = add_drop_path(scale(Var(x), 1), add(Var(narrow), Var(branch)), 0.5), early = scale(in, 0.5);
    const Var y = scale(add(in, scale(twice(in, met, way.x), 1)), 1);
    const std::vector<double> v = in.value().to_vector<double>(), d = normal_values(samples * width, "dy");
    const Tensor dy = tensor_of(y.shape(), d, way.x);
    if (way.late_reader)
      tape.backward({y, early}, {dy, dy});
    else
      tape.backward({y}, {dy});
    CHECK((met.sums == 1 && met.copies == way.copies && met.factors == way.copies));
    const std::vector<double> dx = x.grad.to_vector<double>(), db = branch.grad.to_vector<double>();
    int kept = 0;
    for (size_t i = 0; i < v.size(); ++i) {
      const double of_in = d[i] * (way.late_reader ? 3.5 : 3), factor = (v[i] - 2) / 3;
      kept += factor != 0;
      CHECK((factor == 0 || factor == Approx(2)));
      CHECK(factor == Approx((v[i - i % width] - 2) / 3));  // of the whole sample
      CHECK(dx[i] == Approx(of_in).epsilon(way.x == DType::bf16 ? 0.02 : 1e-6));
      CHECK(db[i] == Approx(factor * of_in).epsilon(way.branch == DType::bf16 ? 0.02 : 1e-6));
    }
    CHECK((kept > 0 && kept < samples * width));
  }
}

TEST_CASE("tape: layer norm masks the gradient of a dropped branch as a pass of its own would") {
  INFO(seed_note());
  Param x = make_param("x", {24, 5, 64}), gamma = make_param("gamma", {64}), beta = make_param("beta", {64}), w = make_param("w", {64, 64}),
        b = make_param("b", {64});
  const auto gradients = [&](const char* storage, bool masked_apart) {
    StoragePolicy policy = simple_policy({{"*", storage, {}, ""}});
    for (Param* p : {&x, &gamma, &beta, &w, &b}) p->grad_written = false;
    Tape tape(policy, Catch::rngSeed());
    Var h = scale(Var(x), 1);
    for (const char* name : {"one", "two"}) {
      const Scope scope(name);
      const Var early = masked_apart ? scale(h, 0) : Var();  // whose gradient comes last, so that layer norm does not mask it
      h = add_drop_path(h, linear(layer_norm(h, Var(gamma), Var(beta), 1e-6, DType::bf16), Var(w), Var(b)), 0.5);
      if (masked_apart) h = add(h, early);
    }
    tape.backward({h}, {normal_tensor(h.shape(), "dy")});
    std::vector<std::vector<double>> all;
    for (Param* p : {&x, &gamma, &beta, &w, &b}) all.push_back(p->grad.to_vector<double>());
    return all;
  };
  for (const char* storage : {"exact", "int8"}) {
    CAPTURE(storage);
    const auto got = gradients(storage, false), want = gradients(storage, true);
    for (size_t i = 0; i < got.size(); ++i) {
      CAPTURE(i);
      double worst = 0, largest = 0;
      for (size_t k = 0; k < got[i].size(); ++k) {
        worst = worse(worst, std::fabs(got[i][k] - want[i][k]));
        largest = std::max(largest, std::fabs(want[i][k]));
      }
      CHECK((largest > 0 && worst <= 1e-3 * largest));
    }
  }
}

TEST_CASE("tape: drop path of an empty batch, and of samples of one number behind layer norm") {
  Param gamma = make_param("gamma", {8}), beta = make_param("beta", {8}), branch = make_param("branch", {8}),
        nobody = make_param("nobody", {0, 3, 8});
  const auto gradient = [&](Param& from, bool inspected) {
    from.grad_written = gamma.grad_written = beta.grad_written = false;
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
    Tape tape(policy);
    if (inspected) tape.inspect([](const Tensor&, const std::string&) {});  // then layer norm copies nothing
    const Var narrow = add(Var(Tensor::zeros(from.value.shape(), DType::bf16)), Var(from));
    const Var y = layer_norm(add_drop_path(Var(Tensor::zeros(from.value.shape(), DType::f32)), narrow, 0.5), Var(gamma), Var(beta), 1e-6);
    tape.backward({y}, {normal_tensor(y.shape(), "dy")});
    return from.grad.to_vector<double>();
  };
  CHECK(gradient(nobody, false).empty());
  const std::vector<double> got = gradient(branch, false);
  CHECK(got == gradient(branch, true));
  const auto dropped = std::count(got.begin(), got.end(), 0.0);
  CHECK((dropped > 0 && dropped < 8));
}

TEST_CASE("tape: layer norm of a value whose op wants its gradient in f32, while the value is bf16") {
  Param x = make_param("x", {4, 8}), gamma = make_param("gamma", {8}), beta = make_param("beta", {8});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Var low = add(Var(Tensor::zeros({4, 8}, DType::bf16)), scale(Var(x), 1));
  REQUIRE(low.dtype() == DType::bf16);
  const Var y = layer_norm(low, Var(gamma), Var(beta), 1e-6);
  CHECK_NOTHROW(tape.backward({y}, {tensor_of(y.shape(), normal_values(32, "dy"), DType::bf16)}));
  double largest = 0;
  for (const double g : x.grad.to_vector<double>()) largest = std::max(largest, std::fabs(g));
  CHECK((largest > 0.01 && std::isfinite(largest)));
}

namespace {

/// x once more, with such sums of its gradient's rows where they are wanted.
Var boasting(const Var& x, int& asked) {
  const Op op("boasting", {x});
  const Tensor y = empty_like(x.value());
  kernels::copy(x.value(), y);
  const auto formula = [&asked](const Tensor& dy, const Extras& extras) -> Grads {
    if (extras.dx_sums) ++asked, *extras.dx_sums = boast(dy);
    return {dy};
  };
  return op.record(y, formula, {});
}

}  // namespace

TEST_CASE("tape: sums of a gradient's rows reach the bias in front where they are all of its gradient, and only there") {
  Param x = make_param("x", {6, 4}), gamma = make_param("gamma", {4}), beta = make_param("beta", {4}), w = make_param("w", {8, 4}),
        b = make_param("b", {8});
  enum Reader { none, early, late };
  struct Met {
    int asked = 0;
    double factor = 0;                 // of the bias's gradient, against the true one
    std::vector<std::string> order{};  // in which parameters were ready
    bool waited() const { return std::find(order.begin(), order.end(), "w") > std::find(order.begin(), order.end(), "gamma"); }
  };
  const auto meet = [&](Reader reader, bool inspected, bool biased, bool waits) {
    for (Param* p : {&x, &gamma, &beta, &w, &b}) p->grad_written = false;
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"*linear*x", waits ? "rebuild" : "exact", {}, ""}});
    Tape tape(policy);
    if (inspected) tape.inspect([](const Tensor&, const std::string&) {});
    const Var h = linear(layer_norm(Var(x), Var(gamma), Var(beta), 1e-6), Var(w), biased ? Var(b) : Var());
    const Tensor dy = normal_tensor(h.shape(), "dy");
    Met met;
    const Var first = reader == late ? add(Var(Tensor::zeros(h.shape(), h.dtype())), h) : Var(), y = boasting(h, met.asked),
              last = reader == early ? scale(h, 1) : Var();
    const auto ready = [&](Param& p) { met.order.push_back(p.name); };
    if (reader == none)
      tape.backward({y}, {dy}, ready);
    else
      tape.backward({y, reader == late ? first : last}, {dy, dy}, ready);
    if (!biased) return met;
    std::vector<double> sums(8);
    for (int i = 0; i < 48; ++i) sums[i % 8] += dy.to_vector<double>()[i];
    const auto largest = std::max_element(sums.begin(), sums.end(), [](double l, double r) { return std::fabs(l) < std::fabs(r); });
    met.factor = b.grad.to_vector<double>()[largest - sums.begin()] / *largest;
    return met;
  };
  for (const bool waits : {false, true}) {
    CAPTURE(waits);
    const Met alone = meet(none, false, true, waits);
    CHECK((alone.asked == 1 && alone.factor == Approx(10) && alone.waited() == waits));
    const Met before = meet(early, false, true, waits), after = meet(late, false, true, waits), seen = meet(none, true, true, waits);
    CHECK((before.asked == 0 && before.factor == Approx(2)));  // the other reader's gradient is there already,
    CHECK((after.asked == 1 && after.factor == Approx(2)));    // or comes afterwards
    CHECK((seen.asked == 0 && seen.factor == Approx(1)));
    CHECK(meet(none, false, false, waits).asked == 0);
  }
}

TEST_CASE("tape: sums of a gradient behind a residual reach the bias of the branch, dropped or scaled or not") {
  INFO(seed_note());
  const int64_t samples = 40, width = 6;
  Param x = make_param("x", {samples, width}), w = make_param("w", {width, width}), b = make_param("b", {width}),
        gamma = make_param("gamma", {width});
  enum Way { added, dropped, scaled };
  // The gradient of the bias against the true one, and how often its sums were wanted.
  const auto meet = [&](Way way, DType branch, bool inspected, int& wanted) {
    for (Param* p : {&x, &w, &b, &gamma}) p->grad_written = false;
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
    Tape tape(policy, 3);
    if (inspected) tape.inspect([](const Tensor&, const std::string&) {});
    Met met;
    const Var h = scale(Var(x), 1), narrow = Var(normal_tensor({samples, width}, "narrow", branch));
    const Var in = way == added    ? linear(narrow, Var(w), Var(b), {}, h)
                   : way == scaled ? scaled_linear(narrow, Var(w), Var(b), Var(gamma), {}, h)
                                   : add_drop_path(h, linear(narrow, Var(w), Var(b)), 0.5);
    const Var y = scale(add(in, scale(twice(in, met, DType::f32), 1)), 1);
    tape.backward({y}, {normal_tensor(y.shape(), "dy")});
    wanted = met.columns;
    std::vector<double> all = b.grad.to_vector<double>();
    if (way == scaled)
      for (const double v : gamma.grad.to_vector<double>()) all.push_back(v);
    return all;
  };
  for (const Way way : {added, dropped, scaled})
    for (const DType branch : {DType::bf16, DType::f32}) {
      CAPTURE(way, to_string(branch));
      int wanted = 0, never = 0;
      const std::vector<double> got = meet(way, branch, false, wanted), want = meet(way, branch, true, never);
      CHECK(never == 0);
      // A gradient that is masked in f32 is masked by a pass of its own: whoever made it has no sums of that.
      const bool passed = way != dropped || branch == DType::bf16;
      CHECK(wanted == (passed ? 1 : 0));
      double largest = 0;
      for (int64_t c = 0; c < width; ++c) {
        largest = std::max(largest, std::fabs(want[c]));
        CHECK(got[c] == Approx((passed ? 10 : 1) * want[c]).epsilon(branch == DType::bf16 ? 0.02 : 1e-5).margin(0.05));
      }
      CHECK(largest > 1);
      if (way == scaled) {  // with nine times more of the bias in it
        const std::vector<double> bias = b.value.to_vector<double>(), g = gamma.value.to_vector<double>();
        for (int64_t c = 0; c < width; ++c)
          CHECK(got[width + c] - want[width + c] == Approx(9 * want[c] / g[c] * bias[c]).epsilon(0.02).margin(0.05));
      }
    }
}

TEST_CASE("tape: a gradient that somebody else holds is not written over") {
  Param x = make_param("x", {4, 8}), w = make_param("w", {8, 8}), gamma = make_param("gamma", {8}), beta = make_param("beta", {8});
  for (const bool norm : {false, true}) {
    CAPTURE(norm);
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"behind:x", "rebuild", {}, ""}});
    Tape tape(policy);
    const Var y = norm ? layer_norm(Var(x), Var(gamma), Var(beta), 1e-6) : gelu(Var(x));
    const Scope scope("behind");
    linear(y, Var(w), {});  // asks for y again, and gets no gradient itself
    const Tensor dy = normal_tensor(y.shape(), "dy");
    const std::vector<double> before = dy.to_vector<double>();
    tape.backward({y}, {dy});
    CHECK(dy.to_vector<double>() == before);
  }
}

TEST_CASE("tape: a parameter is ready when the product that waited for its input is done") {
  ResidualMlp mlp;
  StoragePolicy rebuilds = rebuilding();
  const auto want = mlp.gradients(rebuilds, false);
  std::vector<std::string> order;
  const std::vector<Param*> params = mlp.params();
  for (Param* p : params) kernels::fill(p->grad, std::nan(""));
  mlp.gradients(rebuilds, false, false, [&](Param& p) {
    order.push_back(p.name);
    const auto at = static_cast<size_t>(std::find(params.begin(), params.end(), &p) - params.begin());
    CHECK(p.grad.to_vector<double>() == want[at]);
  });
  std::sort(order.begin(), order.end());
  CHECK(order == std::vector<std::string>{"b1", "b2", "beta", "fc1", "fc2", "gamma", "x"});
}
