#include "support/gradcheck.h"

#include <algorithm>
#include <cmath>
#include <deque>

namespace mesa::testing {
namespace {

Numbers draw(const Input& input, RandomStream& random) {
  Numbers values(input.shape.numel());
  int sign = 1;
  for (double& v : values) {
    v = random.normal();
    if (input.fill == Input::Fill::spread) v = 0.5 * v + 1.5 * (sign = -sign);
    if (input.fill == Input::Fill::away_from_zero) v += v < 0 ? -0.1 : 0.1;
    if (input.fill == Input::Fill::distribution) v = std::exp(v);
  }
  if (input.fill == Input::Fill::distinct) {
    Numbers sorted = values;
    std::sort(sorted.begin(), sorted.end());
    const double middle = static_cast<double>(values.size() / 2);
    for (double& v : values) v = (static_cast<double>(std::lower_bound(sorted.begin(), sorted.end(), v) - sorted.begin()) - middle) / 64;
  }
  if (input.fill == Input::Fill::distribution) {
    const int64_t n = input.shape[-1];
    for (size_t row = 0; row < values.size(); row += n) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += values[row + i];
      for (int64_t i = 0; i < n; ++i) values[row + i] /= sum;
    }
  }
  return values;
}

Tensor on_device(const Shape& shape, const Numbers& values, DType dtype, Device device, MemoryKind kind) {
  return device.kind == DeviceKind::meta ? Tensor::empty(shape, dtype, device, kind)
                                         : to(tensor_of(shape, values, dtype, kind), device, kind);
}

/// <r, y> as an op of its own: its closure holds r only, so that nothing but the row's own ops decides what stays alive.
Var project(const std::vector<Var>& ys, const std::vector<Tensor>& r, double* loss) {
  const Op op("project", ys);
  for (size_t i = 0; i < ys.size() && !ys[i].value().is_meta(); ++i) {
    const Numbers y = ys[i].value().to_vector<double>(), d = r[i].to_vector<double>();
    for (size_t j = 0; j < y.size(); ++j) *loss += y[j] * d[j];
  }
  const Tensor result = Tensor::empty({1}, DType::f64, ys[0].value().device());
  return op.record(result, [r](const Tensor&) -> Grads { return r; });
}

/// Forward only as far as the tape; every exact value dies with this function unless the tape keeps it.
Var forward(const Case& row, const Values& values, std::deque<Param>& params, const RunOptions& options, RunResult& result) {
  std::vector<Var> v;
  for (size_t i = 0; i < row.inputs.size(); ++i) {
    const Input& input = row.inputs[i];
    if (input.role == Input::Role::constant)
      v.push_back(on_device(input.shape, values.inputs[i], options.dtype, options.device, MemoryKind::inputs));
    else if (input.role == Input::Role::weight || input.role == Input::Role::frozen || options.leaves)
      v.push_back(params[i]);
    else
      v.push_back(scale(params[i], 1.0));
  }
  const std::vector<Var> ys = row.run(v).vars;
  std::vector<Tensor> r;
  for (size_t i = 0; i < ys.size(); ++i) {
    if (values.projections.size() <= i)
      values.projections.push_back(normal_values(ys[i].value().numel(), row.title() + " projection " + std::to_string(i)));
    r.push_back(on_device(ys[i].shape(), values.projections[i], ys[i].dtype(), options.device, MemoryKind::workspace));
    if (options.device.kind != DeviceKind::meta) result.outputs.push_back(ys[i].value().to_vector<double>());
  }
  return project(ys, r, &result.loss);
}

bool clear_of_kinks(const Case& row, const Values& values) {
  if (!row.kinked) return true;
  std::vector<Var> v;
  for (size_t i = 0; i < row.inputs.size(); ++i) v.push_back(Var(tensor_of(row.inputs[i].shape, values.inputs[i], DType::f64)));
  const Numbers x = row.kinked(v).value().to_vector<double>();
  return std::all_of(x.begin(), x.end(), [](double value) { return std::abs(value) > 0x1p-4; });
}

}  // namespace

Values draw_values(const Case& row, DType representable) {
  for (uint64_t attempt = 0;; ++attempt) {
    Values values;
    RandomStream random(RandomKey::of(test_seed(), row.title(), attempt));
    for (const Input& input : row.inputs)
      values.inputs.push_back(tensor_of(input.shape, draw(input, random), representable).to_vector<double>());
    if (clear_of_kinks(row, values)) return values;
  }
}

RunResult run_case(const Case& row, const Values& values, StoragePolicy& policy, const RunOptions& options) {
  RunResult result;
  std::deque<Param> params;
  for (size_t i = 0; i < row.inputs.size(); ++i) {
    const Input& input = row.inputs[i];
    Param& param = params.emplace_back();
    param.name = "input" + std::to_string(i);
    param.trainable = input.role != Input::Role::frozen;
    const bool is_parameter = input.role == Input::Role::weight || input.role == Input::Role::frozen;
    const bool wide = options.dtype == DType::bf16 && is_parameter;  // masters are f32
    param.value = on_device(input.shape, values.inputs[i], wide ? DType::f32 : options.dtype, options.device, MemoryKind::parameters);
  }
  Allocator& memory = Allocator::of(options.device);
  memory.reset_peak();
  const MemoryUse before = memory.use();
  for (int pass = 0; pass < options.passes; ++pass) {
    result.outputs.clear();
    Tape tape(policy, 7, options.step);
    tape.inspect(options.inspection);
    const Var loss = forward(row, values, params, options, result);
    result.kept = memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations);
    result.steps = tape.steps();
    tape.backward(loss);
    result.left = memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations);
  }
  result.peak = memory.use().peak - before.total;
  for (size_t i = 0; i < params.size(); ++i) {
    const bool wanted = row.inputs[i].role != Input::Role::constant && options.device.kind != DeviceKind::meta && params[i].grad.defined();
    result.gradients.push_back(wanted ? params[i].grad.to_vector<double>() : Numbers());
  }
  return result;
}

StoragePolicy one_codec(const std::string& codec, const CodecOptions& options) { return StoragePolicy(codec, {{"*", codec, options, ""}}); }

double norm(const Numbers& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

double relative_error(const Numbers& a, const Numbers& b) {
  check(a.size() == b.size(), a.size(), " and ", b.size(), " numbers cannot be compared");
  Numbers difference(a.size());
  for (size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  const double scale = norm(b);
  return norm(difference) / (scale > 0 ? scale : 1);
}

double largest(const Numbers& x) {
  double most = 0;
  for (double v : x) most = std::max(most, std::isnan(v) ? INFINITY : std::abs(v));
  return most;
}

double largest_difference(const Numbers& a, const Numbers& b) {
  check(a.size() == b.size(), a.size(), " and ", b.size(), " numbers cannot be compared");
  Numbers difference(a.size());
  for (size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  return largest(difference);
}

}  // namespace mesa::testing
