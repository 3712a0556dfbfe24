// Matrix products through cuBLASLt. For each form of operands an algorithm is chosen once: the library's first suggestion that it does not
// take back or, with tune_products, the fastest of several.
#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <map>
#include <mutex>

#include "cublaslt_plan.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"

namespace mesa::kernels::cuda {
namespace {

using blas::Algorithm;
using blas::alignment_of;
using blas::Batch;
using blas::Form;
using blas::matrix_of;
using blas::Plan;

/// What the whole process has found out about products. Locked while a product is handed to the library: a plan's descriptor is changed
/// before it is run.
struct Products {
  std::mutex mutex;
  std::map<Form, Plan> plans;
  bool tuning = false;
  std::map<std::string, std::string> choices;  // with `tuning`: algorithms by forms
};
Products& products() {
  static Products& all = *new Products;  // plans may outlive cuBLASLt's own statics
  return all;
}

constexpr int kCandidates = 8;
const std::string kApart = "apart";  // the choice for a product with sums: another product, and a pass for the sums

/// A product's operands, and the vector of its epilogue.
struct Operands {
  const void *a, *b, *c;
  void *d, *bias;
  bool accumulate;
};

cublasStatus_t multiply(const Form& form, const Plan& plan, const Algorithm& algorithm, const Operands& x) {
  const Tensor workspace =
      algorithm.workspace > 0 ? Tensor::empty({static_cast<int64_t>(algorithm.workspace)}, DType::u8, kCuda) : Tensor();
  const double one = 1, beta = x.accumulate ? 1 : 0;
  const float one_f = 1, beta_f = static_cast<float>(beta);
  const bool wide = form.c.dtype == DType::f64;
  const void *alpha = wide ? static_cast<const void*>(&one) : &one_f, *keep = wide ? static_cast<const void*>(&beta) : &beta_f;
  return cublasLtMatmul(blas::handle(), plan.operation.get(), alpha, x.b, plan.left.get(), x.a, plan.right.get(), keep, x.c,
                        plan.result.get(), x.d, plan.result.get(), &algorithm.value, workspace.defined() ? workspace.raw() : nullptr,
                        algorithm.workspace, static_cast<cudaStream_t>(mesa::cuda::stream()));
}

/// Seconds that each of several ways takes, by the best of a few rounds in turns.
std::vector<double> seconds_of(const std::vector<std::function<void()>>& ways) {
  constexpr int kRounds = 3, kRuns = 10;
  std::vector<double> best(ways.size(), std::numeric_limits<double>::infinity());
  for (int round = 0; round < kRounds; ++round)
    for (size_t i = 0; i < ways.size(); ++i) {
      const auto runs = [&] {
        for (int run = 0; run < kRuns; ++run) ways[i]();
      };
      best[i] = std::min(best[i], mesa::cuda::seconds_of(runs) / kRuns);
    }
  return best;
}

/// Leaves the plan those of its algorithms that work, the fastest first, by a few runs of each on these operands.
void settle(const Form& form, Plan& plan, const Operands& x) {
  std::vector<Algorithm> working;
  cublasStatus_t first = CUBLAS_STATUS_SUCCESS;
  for (const Algorithm& algorithm : plan.algorithms) {  // also to warm up
    cublasStatus_t status = CUBLAS_STATUS_ALLOC_FAILED;
    try {
      status = multiply(form, plan, algorithm, x);
    } catch (const OutOfMemory&) {  // of its workspace
    }
    if (status == CUBLAS_STATUS_SUCCESS)
      working.push_back(algorithm);
    else if (first == CUBLAS_STATUS_SUCCESS)
      first = status;
  }
  if (working.empty() && (!form.bias || first != CUBLAS_STATUS_NOT_SUPPORTED)) blas::check_status(first, "multiplying");
  plan.algorithms = working;
  plan.open = false;
  if (working.empty()) return;
  std::vector<std::function<void()>> ways;
  for (const Algorithm& algorithm : working)
    ways.push_back([&] { blas::check_status(multiply(form, plan, algorithm, x), "timing an algorithm"); });
  std::swap(plan.algorithms[0], plan.algorithms[blas::clearly_fastest(seconds_of(ways))]);
  products().choices[to_string(form)] = to_text(plan.algorithms[0]);
}

/// True if the library has an algorithm that sums beside the product, but one that leaves more of the GPU idle than a pass of its own is
/// worth: it may not split a long k among blocks then, where a weight gradient has few tiles.
bool idles_for_sums(const Form& form, const Plan& plan) {
  if (!form.row_sums || plan.algorithms.empty()) return false;
  Form alone = form;
  alone.bias.reset(), alone.row_sums = false, alone.aligned.bias = alignment_of(nullptr);
  const Plan other = make_plan(alone, nullptr, 1);
  return !other.algorithms.empty() && plan.waves < 0.5f * std::min(1.0f, other.waves);
}

Plan& plan_of(const Form& form, const void* bias) {
  Products& all = products();
  if (auto found = all.plans.find(form); found != all.plans.end()) return found->second;
  Plan plan = make_plan(form, bias, kCandidates);
  if (!all.tuning && idles_for_sums(form, plan)) plan.algorithms.clear();
  plan.open = all.tuning && plan.algorithms.size() > (form.row_sums ? 0 : 1);  // the sums may also be had apart
  if (const auto choice = all.choices.find(to_string(form)); choice != all.choices.end()) {
    if (choice->second == kApart)
      plan.algorithms.clear(), plan.open = false;
    else if (const auto algorithm = from_text(form, plan, choice->second))
      plan.algorithms.insert(plan.algorithms.begin(), *algorithm), plan.open = false;
  }
  return all.plans.emplace(form, std::move(plan)).first->second;
}

Form aligned(Form form, const Operands& x) {
  form.aligned = {alignment_of(x.a), alignment_of(x.b), std::min(alignment_of(x.c), alignment_of(x.d)), alignment_of(x.bias)};
  return form;
}

/// By the first of the plan's algorithms that works: what the library suggested it may still refuse. False if it has none for an epilogue,
/// which there is another way for. That operands are invalid for all of them is our mistake.
bool run_by_first(const Form& form, Plan& plan, const Operands& x) {
  if (plan.algorithms.empty()) return false;
  const mesa::cuda::Timed timed(mesa::cuda::profiling() ? "product: " + to_string(form) : "");
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  while (!plan.algorithms.empty()) {
    status = multiply(form, plan, plan.algorithms[0], x);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) break;
    if (plan.algorithms.size() == 1 && (!form.bias || status == CUBLAS_STATUS_INVALID_VALUE)) break;
    plan.algorithms.erase(plan.algorithms.begin());
  }
  if (plan.algorithms.empty()) return false;
  blas::check_status(status, "multiplying");
  return true;
}

/// d <- a b (+ c) (+ bias), or with `row_sums` also bias <- sums; false if cuBLASLt has no algorithm for it.
bool run(const Form& any, const Operands& x) {
  const std::lock_guard lock(products().mutex);
  const Form form = aligned(any, x);
  Plan& plan = plan_of(form, x.bias);
  if (x.bias != nullptr) set_bias(plan, x.bias);
  if (plan.open && mesa::cuda::recording()) {  // which keeps what it has, and so does a run that is resumed
    plan.open = false;
    products().choices[to_string(form)] = to_text(plan.algorithms[0]);
  }
  // What is added to in its own place changes with each run.
  if (plan.open && (!x.accumulate || x.c != x.d)) settle(form, plan, x);
  if (!run_by_first(form, plan, x)) return false;
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize("a product by cuBLASLt");
  return true;
}

bool is_open(const Form& form, const Operands& x) {
  const std::lock_guard lock(products().mutex);
  return plan_of(aligned(form, x), x.bias).open && !mesa::cuda::recording();
}

/// The leading axes of a, b and c as one batch, if each has one constant distance; otherwise the longer of the last two, and the caller
/// loops over the other: heads of packed q, k and v, not images.
struct Batches {
  int64_t outer = 1;              // loops
  Batch inner;                    // one call
  std::array<int64_t, 3> step{};  // of a, b, c from loop to loop, where there are two leading axes
};

Batches batches_of(const Tensor& a, const Tensor& b, const Tensor& c) {
  Batches out;
  if (c.rank() == 2) return out;
  out.inner = {c.dim(-3), a.strides()[-3], b.strides()[-3], c.strides()[-3]};
  if (c.rank() == 3) return out;
  const auto joins = [](const Tensor& t) { return t.strides()[-4] == t.strides()[-3] * t.dim(-3); };
  if (c.dim(-3) == 1)
    out.inner = {c.dim(-4), a.strides()[-4], b.strides()[-4], c.strides()[-4]};
  else if (joins(a) && joins(b) && joins(c))
    out.inner.count *= c.dim(-4);
  else if (c.dim(-4) > c.dim(-3))
    out.inner = {c.dim(-4), a.strides()[-4], b.strides()[-4], c.strides()[-4]}, out.outer = c.dim(-3),
    out.step = {a.strides()[-3], b.strides()[-3], c.strides()[-3]};
  else
    out.outer = c.dim(-4), out.step = {a.strides()[-4], b.strides()[-4], c.strides()[-4]};
  return out;
}

void* moved(const Tensor& t, int64_t elements) { return static_cast<char*>(t.raw()) + elements * size_of(t.dtype()); }

}  // namespace

void product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& addend) {
  const Batches batches = batches_of(a, b, c);
  Form form{matrix_of(a), matrix_of(b), matrix_of(c), batches.inner, {}, false, {}};
  check(!form.c.transposed || !bias.defined(), "a biased product into a transposed matrix of shape ", c.shape());
  if (form.c.transposed)
    return product(b.transpose(-1, -2), a.transpose(-1, -2), c.transpose(-1, -2), bias,
                   addend.defined() ? addend.transpose(-1, -2) : addend);
  const Tensor& plus = addend.defined() ? addend : c;  // beta is 0 where nothing is added
  const auto try_with = [&](const Tensor& with) {
    form.bias = with.defined() ? std::optional(with.dtype()) : std::nullopt;
    for (int64_t i = 0; i < batches.outer; ++i)
      if (!run(form, {moved(a, i * batches.step[0]), moved(b, i * batches.step[1]), moved(plus, i * batches.step[2]),
                      moved(c, i * batches.step[2]), with.defined() ? with.raw() : nullptr, addend.defined()}))
        return false;  // the first already: all have one form
    return true;
  };
  if (bias.defined()) {
    Tensor with = bias;
    if (bias.dtype() != c.dtype()) {  // the epilogue wants the bias in the result's type (cublasLt.h, BIAS_DATA_TYPE)
      with = empty_like(bias, c.dtype());
      kernels::copy(bias, with);
    }
    if (try_with(with)) return;
  }
  check(try_with(Tensor()), "cublasLt has no product of ", a.shape(), " ", to_string(a.dtype()), " and ", b.shape(), " into ",
        to_string(c.dtype()));
  if (bias.defined()) kernels::add_rows(c, bias, c);
}

bool product_and_row_sums(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const Tensor& db) {
  const Tensor a = dy.transpose(0, 1);
  const Form form{matrix_of(a), matrix_of(x), matrix_of(dw), {}, db.dtype(), true, {}};
  if (form.c.transposed || dy.dim(0) == 0 || dw.numel() == 0) return false;
  const Operands operands{a.raw(), x.raw(), dw.raw(), dw.raw(), db.raw(), accumulate};
  const bool first = !accumulate && is_open(form, operands);
  if (!run(form, operands)) return false;
  if (!first) return true;
  const auto together = [&] { run(form, operands); };
  const auto apart = [&] {
    product(a, x, dw, Tensor(), Tensor());
    kernels::sum_rows(dy, db, false);
  };
  apart();  // to settle that product, too
  if (blas::clearly_fastest(seconds_of({together, apart})) == 1) {
    const std::lock_guard lock(products().mutex);
    plan_of(aligned(form, operands), db.raw()).algorithms.clear();
    products().choices[to_string(aligned(form, operands))] = kApart;
  }
  return true;
}

void tune_products(bool on, const std::map<std::string, std::string>& choices) {
  Products& all = products();
  const std::lock_guard lock(all.mutex);
  all.tuning = on, all.choices = on ? choices : std::map<std::string, std::string>();
  all.plans.clear();
}

std::map<std::string, std::string> product_choices() {
  const std::lock_guard lock(products().mutex);
  return products().choices;
}

std::string product_library() { return blas::library(); }

}  // namespace mesa::kernels::cuda
