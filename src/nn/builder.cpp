#include "mesa/nn/builder.h"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {

Param& ParamStore::add(Param param) {
  for (const Param& other : params_) check(other.name != param.name, "two parameters are named ", param.name);
  params_.push_back(std::move(param));
  return params_.back();
}

ModelBuffer& ParamStore::add(ModelBuffer buffer) {
  for (const ModelBuffer& other : buffers_) check(other.name != buffer.name, "two buffers are named ", buffer.name);
  buffers_.push_back(std::move(buffer));
  return buffers_.back();
}

Param& ParamStore::at(const std::string& name) {
  std::vector<std::string> names;
  for (Param& param : params_) {
    if (param.name == name) return param;
    names.push_back(param.name);
  }
  fail("there is no parameter ", name, "; the nearest is ", nearest(name, names));
}

int64_t ParamStore::count() const {
  int64_t n = 0;
  for (const Param& param : params_) n += param.value.numel();
  return n;
}

int64_t ParamStore::lay_out(int64_t parts, const std::function<void(Param&, int64_t)>& place) {
  constexpr int64_t kLine = 16, kPack = 4;  // elements: every parameter starts on a cache line, every part on 16 bytes
  const int64_t unit = std::lcm(kLine, kPack * parts);
  int64_t at = 0;
  for (auto param = params_.rbegin(); param != params_.rend(); ++param) {
    if (!param->trainable) continue;
    place(*param, at);
    at += (param->value.numel() + unit - 1) / unit * unit;
  }
  return at;
}

void ParamStore::allocate_gradients(int64_t parts) {
  if (params_.empty()) return;
  for (Param& param : params_) param.grad = Tensor(), param.grad_written = false;
  const Tensor& first = params_.front().value;
  const Tensor arena = Tensor::empty({lay_out(parts, [](Param&, int64_t) {})}, first.dtype(), first.device(), MemoryKind::gradients);
  if (parts > 1) clear(arena);  // what lies between gradients is added up, too
  lay_out(parts, [&](Param& param, int64_t at) { param.grad = arena.narrow(0, at, param.value.numel()).reshape(param.value.shape()); });
}

void ParamStore::gather_values(int64_t parts) {
  if (params_.empty()) return;
  const Tensor& first = params_.front().value;
  const Tensor arena = Tensor::empty({lay_out(parts, [](Param&, int64_t) {})}, first.dtype(), first.device(), MemoryKind::parameters);
  clear(arena);
  lay_out(parts, [&](Param& param, int64_t at) {
    const Tensor view = arena.narrow(0, at, param.value.numel()).reshape(param.value.shape());
    kernels::copy(param.value, view);
    param.value = view;
  });
}

void ParamStore::clear_gradients() {
  for (Param& param : params_) param.grad_written = false;
}

void ParamStore::gather_buffers() {
  constexpr int64_t kAlign = 16;  // elements: every buffer starts on a cache line
  const auto room = [](const ModelBuffer& b) { return (b.value.numel() + kAlign - 1) / kAlign * kAlign; };
  int64_t total = 0;
  for (const ModelBuffer& b : buffers_) total += room(b);
  const Tensor& first = buffers_.front().value;
  buffer_arena_ = Tensor::empty({total}, first.dtype(), first.device(), MemoryKind::parameters);
  remembered_ = Tensor::empty({total}, first.dtype(), first.device(), MemoryKind::parameters);
  kernels::fill(buffer_arena_, 0);
  int64_t at = 0;
  for (ModelBuffer& b : buffers_) {
    const Tensor view = buffer_arena_.narrow(0, at, b.value.numel()).reshape(b.value.shape());
    kernels::copy(b.value, view);
    at += room(b);
    b.value = view;
  }
}

void ParamStore::remember_buffers() {
  if (buffers_.empty()) return;
  if (!buffer_arena_.defined()) gather_buffers();
  kernels::copy(buffer_arena_, remembered_);
}

void ParamStore::restore_buffers() {
  if (remembered_.defined()) kernels::copy(remembered_, buffer_arena_);
}

std::vector<Param*> ParamStore::matching(const std::string& glob, const char* consequence) {
  std::vector<Param*> out;
  for (Param& param : params_)
    if (fnmatch(glob.c_str(), param.name.c_str(), FNM_EXTMATCH) == 0) out.push_back(&param);
  check(!out.empty(), "no parameter matches '", glob, "', so ", consequence);
  return out;
}

void ParamStore::freeze(const std::string& glob) {
  for (Param* param : matching(glob, "nothing can be frozen by it")) param->trainable = false;
}

void ParamStore::thaw(const std::string& glob) {
  for (Param* param : matching(glob, "nothing learns by it")) param->trainable = true;
}

void ParamStore::spare_decay(const std::string& glob) {
  for (Param* param : matching(glob, "nothing is spared weight decay by it")) param->decay = false;
}

namespace {

double draw(RandomStream& random, const Init& init) {
  switch (init.kind) {
    case Init::Kind::constant: return init.value;
    case Init::Kind::normal: return init.value * random.normal();
    case Init::Kind::uniform: return random.uniform(-init.value, init.value);
    case Init::Kind::truncated_normal:
      for (;;) {
        const double x = init.value * random.normal();
        if (x > -2 && x < 2) return x;
      }
  }
  return 0;
}

/// The values of one stream, one after the other. Where each takes as much of it, all threads draw.
std::vector<float> draw_all(RandomKey key, const Init& init, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  const bool cut = init.kind == Init::Kind::truncated_normal && std::fabs(init.value) * RandomStream::kFarthest >= 2;  // drawn again then
  const int64_t of_a_block = init.kind == Init::Kind::uniform ? 2 : 1, chunk = cut ? std::max<int64_t>(count, 1) : 8192;
#pragma omp parallel for if (count > chunk)
  for (int64_t first = 0; first < count; first += chunk) {
    RandomStream random(key, static_cast<uint64_t>(first / of_a_block));
    const int64_t end = std::min(count, first + chunk);
    for (int64_t i = first; i < end; ++i) values[static_cast<size_t>(i)] = static_cast<float>(draw(random, init));
  }
  return values;
}

}  // namespace

Param& Builder::param(const std::string& name, const Shape& shape, Init init, bool decay) const {
  Param param;
  param.name = Scope::join(name);
  param.decay = decay;
  param.value = Tensor::empty(shape, master_, device_, MemoryKind::parameters);
  if (device_.kind != DeviceKind::meta) {
    const Tensor drawn = Tensor::empty(shape, master_);
    kernels::copy(Tensor::from<float>(shape, draw_all(RandomKey::of(seed_, param.name, 0), init, shape.numel())), drawn);
    transfer(drawn, param.value);
  }
  return store_.add(std::move(param));
}

ModelBuffer& Builder::buffer(const std::string& name, const Shape& shape, double value) const {
  const Tensor values = Tensor::empty(shape, master_, device_, MemoryKind::parameters);
  kernels::fill(values, value);
  return store_.add(ModelBuffer{Scope::join(name), values});
}

}  // namespace mesa
