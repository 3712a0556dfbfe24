#include "onednn.h"

#include <dnnl.hpp>
#include <map>
#include <mutex>

namespace mesa::kernels::onednn {
namespace {

using dnnl::memory;

dnnl::engine& engine() {
  static dnnl::engine e = [] {
    // A lowered MESA_CPU lowers oneDNN too, so that one switch tests the whole path. Must precede every other call.
    if (cpu_isa() == Isa::avx2) dnnl::set_max_cpu_isa(dnnl::cpu_isa::avx2);
    if (cpu_isa() == Isa::plain) dnnl::set_max_cpu_isa(dnnl::cpu_isa::sse41);
    return dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return e;
}

memory::data_type data_type(DType dtype) { return dtype == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32; }

memory::desc describe(const Tensor& t) {
  memory::dims dims(t.shape().begin(), t.shape().end()), strides(t.strides().begin(), t.strides().end());
  // The stride of an extent of one means nothing to us but is a leading dimension to oneDNN, which fails when it is too small.
  const size_t row = dims.size() - 2, column = row + 1;
  if (dims[row] == 1) strides[row] = strides[column] == 1 ? dims[column] : 1;
  else if (dims[column] == 1) strides[column] = strides[row] == 1 ? dims[row] : 1;
  return {dims, data_type(t.dtype()), strides};
}

struct Product {
  dnnl::matmul primitive;
  memory::desc a, b, c, bias, scratchpad;
};

Product make(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  Product p;
  p.a = describe(a);
  p.b = describe(b);
  p.c = describe(c);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  if (bias.defined()) {
    memory::dims dims(c.rank(), 1), strides(c.rank(), c.dim(-1));
    dims.back() = c.dim(-1);
    strides.back() = 1;
    p.bias = memory::desc(dims, memory::data_type::f32, strides);
  }
#if DNNL_VERSION_MAJOR >= 3
  const auto description = bias.defined() ? dnnl::matmul::primitive_desc(engine(), p.a, p.b, p.bias, p.c, attributes)
                                          : dnnl::matmul::primitive_desc(engine(), p.a, p.b, p.c, attributes);
#else
  const auto operation = bias.defined() ? dnnl::matmul::desc(p.a, p.b, p.bias, p.c) : dnnl::matmul::desc(p.a, p.b, p.c);
  const dnnl::matmul::primitive_desc description(operation, attributes, engine());
#endif
  p.scratchpad = description.scratchpad_desc();
  p.primitive = dnnl::matmul(description);
  return p;
}

using Key = std::vector<int64_t>;

Key key_of(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  Key key{accumulate, bias.defined(), a.rank()};
  for (const Tensor* t : {&a, &b, &c}) {
    key.push_back(static_cast<int64_t>(t->dtype()));
    key.insert(key.end(), t->shape().begin(), t->shape().end());
    key.insert(key.end(), t->strides().begin(), t->strides().end());
  }
  return key;
}

const Product& cached(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  static std::mutex mutex;
  static std::map<Key, Product> products;
  const std::lock_guard lock(mutex);
  Key key = key_of(a, b, c, bias, accumulate);
  auto found = products.find(key);
  if (found == products.end()) found = products.emplace(std::move(key), make(a, b, c, bias, accumulate)).first;
  return found->second;
}

/// An instruction set of oneDNN is a set of bits; they have no order.
bool reaches(dnnl::cpu_isa isa) {
  engine();
  const auto wanted = static_cast<unsigned>(isa);
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
}

}  // namespace

void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  try {
    const Product& p = cached(a, b, c, bias, accumulate);
    const Tensor scratchpad = Tensor::empty({static_cast<int64_t>(p.scratchpad.get_size())}, DType::u8);
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, memory(p.a, engine(), a.raw())},
                                              {DNNL_ARG_WEIGHTS, memory(p.b, engine(), b.raw())},
                                              {DNNL_ARG_DST, memory(p.c, engine(), c.raw())},
                                              {DNNL_ARG_SCRATCHPAD, memory(p.scratchpad, engine(), scratchpad.raw())}};
    if (bias.defined()) arguments.insert({DNNL_ARG_BIAS, memory(p.bias, engine(), bias.raw())});
    static thread_local dnnl::stream stream(engine());
    p.primitive.execute(stream, arguments);
    stream.wait();
  } catch (const dnnl::error& e) {
    fail("oneDNN refused the product of ", a.shape(), " ", to_string(a.dtype()), " and ", b.shape(), " ", to_string(b.dtype()), ": ", e.what());
  }
}

bool has_bf16() { return cpu_has_bf16() && reaches(dnnl::cpu_isa::avx512_core_bf16); }

bool fast_bf16() {
  static const bool fast = has_bf16() && (!__builtin_cpu_is("intel") || reaches(dnnl::cpu_isa::avx512_core_amx));
  return fast;
}

std::string version() {
  const dnnl_version_t* v = dnnl_version();
  return concat("oneDNN ", v->major, ".", v->minor, ".", v->patch);
}

}  // namespace mesa::kernels::onednn
