#include "onednn.h"

#include <dnnl.hpp>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

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
  if (dims[row] == 1)
    strides[row] = strides[column] == 1 ? dims[column] : 1;
  else if (dims[column] == 1)
    strides[column] = strides[row] == 1 ? dims[row] : 1;
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

// --- convolutions --------------------------------------------------------------------------------------------------------------------

enum class Pass { forward, data, weights };

/// One pass of a convolution of nhwc grids. The engine chooses the layout of the weights or of their gradient.
struct Convolution {
  dnnl::primitive primitive;
  memory::desc x, y, w, chosen_w, bias, scratchpad;
  std::optional<dnnl::reorder> reorder;  // from our weights to the chosen ones, or from the chosen gradient to ours
};

/// The parts that the passes share.
struct ConvParts {
  memory::desc x, y, w, any_w, bias;
  memory::dims strides, dilates, padding;

  ConvParts(const Tensor& tx, const Tensor& tw, const Tensor& tb, const Tensor& ty, const ConvGeometry& g)
      : x(grid(tx, g.height, g.width)),
        y(grid(ty, g.out_height(), g.out_width())),
        strides{g.stride, g.stride},
        dilates{g.dilation - 1, g.dilation - 1},
        padding{g.padding, g.padding} {
    memory::dims dims{tw.dim(0), tw.dim(1), g.kernel_height, g.kernel_width};
    if (g.groups > 1) dims = {g.groups, tw.dim(0) / g.groups, tw.dim(1), g.kernel_height, g.kernel_width};
    w = memory::desc(dims, data_type(tw.dtype()), g.groups > 1 ? memory::format_tag::goihw : memory::format_tag::oihw);
    any_w = memory::desc(dims, data_type(tx.dtype()), memory::format_tag::any);
    if (tb.defined()) bias = memory::desc({tb.dim(0)}, memory::data_type::f32, memory::format_tag::a);
  }
  /// [B, HW, C] as oneDNN's [B, C, H, W].
  static memory::desc grid(const Tensor& t, int64_t height, int64_t width) {
    const int64_t C = t.dim(2);
    return {{t.dim(0), C, height, width}, data_type(t.dtype()), memory::dims{height * width * C, 1, width * C, C}};
  }
};

dnnl::convolution_forward::primitive_desc forward_of(const ConvParts& p, const dnnl::primitive_attr& attributes) {
  constexpr auto kind = dnnl::prop_kind::forward_training;
  constexpr auto by = dnnl::algorithm::convolution_direct;
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), kind, by, p.x, p.any_w, p.bias, p.y, p.strides, p.dilates, p.padding, p.padding, attributes};
#else
  return {{kind, by, p.x, p.any_w, p.bias, p.y, p.strides, p.dilates, p.padding, p.padding}, attributes, engine()};
#endif
}
dnnl::convolution_backward_data::primitive_desc data_grad_of(const ConvParts& p, const dnnl::primitive_attr& attributes) {
  constexpr auto by = dnnl::algorithm::convolution_direct;
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), by, p.x, p.any_w, p.y, p.strides, p.dilates, p.padding, p.padding, forward_of(p, {}), attributes};
#else
  return {{by, p.x, p.any_w, p.y, p.strides, p.dilates, p.padding, p.padding}, attributes, engine(), forward_of(p, {})};
#endif
}
dnnl::convolution_backward_weights::primitive_desc weight_grad_of(const ConvParts& p, const dnnl::primitive_attr& attributes) {
  constexpr auto by = dnnl::algorithm::convolution_direct;
  memory::desc gradient(p.w.dims(), memory::data_type::f32, memory::format_tag::any);
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), by, p.x, gradient, p.y, p.strides, p.dilates, p.padding, p.padding, forward_of(p, {}), attributes};
#else
  return {{by, p.x, gradient, p.y, p.strides, p.dilates, p.padding, p.padding}, attributes, engine(), forward_of(p, {})};
#endif
}

Convolution make(Pass pass, const ConvParts& parts, bool accumulate) {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  Convolution c{{}, parts.x, parts.y, parts.w, {}, parts.bias, {}, {}};
  const auto take = [&](const auto& description, const memory::desc& chosen, auto&& primitive) {
    c.scratchpad = description.scratchpad_desc();
    c.chosen_w = chosen;
    c.primitive = primitive;
  };
  if (pass == Pass::forward) {
    const auto d = forward_of(parts, attributes);
    take(d, d.weights_desc(), dnnl::convolution_forward(d));
  } else if (pass == Pass::data) {
    const auto d = data_grad_of(parts, attributes);
    take(d, d.weights_desc(), dnnl::convolution_backward_data(d));
  } else {
    const auto d = weight_grad_of(parts, attributes);
    take(d, d.diff_weights_desc(), dnnl::convolution_backward_weights(d));
  }
  const bool backward = pass == Pass::weights;
  if (c.chosen_w == c.w && !accumulate) return c;
  dnnl::primitive_attr add;
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    add.set_post_ops(sum);
  }
  c.reorder = dnnl::reorder({engine(), backward ? c.chosen_w : c.w, engine(), backward ? c.w : c.chosen_w, add});
  return c;
}

/// Which tensors a pass is for; x and y stand for their gradients, too.
const Convolution& cached(Pass pass, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, bool accumulate,
                          const ConvGeometry& g) {
  static std::mutex mutex;
  static std::map<Key, Convolution> convolutions;
  const std::lock_guard lock(mutex);
  Key key{static_cast<int64_t>(pass),
          accumulate,
          bias.defined(),
          g.height,
          g.width,
          g.kernel_height,
          g.kernel_width,
          g.stride,
          g.padding,
          g.dilation,
          g.groups,
          x.dim(0),
          x.dim(2),
          y.dim(2)};
  for (const Tensor* t : {&x, &w, &y}) key.push_back(static_cast<int64_t>(t->dtype()));
  auto found = convolutions.find(key);
  if (found == convolutions.end()) found = convolutions.emplace(std::move(key), make(pass, ConvParts(x, w, bias, y, g), accumulate)).first;
  return found->second;
}

void run(Pass pass, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, bool accumulate, const ConvGeometry& g) {
  try {
    const Convolution& c = cached(pass, x, w, bias, y, accumulate, g);
    static thread_local dnnl::stream stream(engine());
    const auto scratch = [](const memory::desc& d) { return Tensor::empty({static_cast<int64_t>(d.get_size())}, DType::u8); };
    const Tensor scratchpad = scratch(c.scratchpad), other_w = c.reorder ? scratch(c.chosen_w) : w;
    memory ours(c.w, engine(), w.raw()), chosen(c.chosen_w, engine(), other_w.raw());
    if (c.reorder && pass != Pass::weights) c.reorder->execute(stream, ours, chosen);
    const bool data = pass == Pass::data, weights = pass == Pass::weights;
    std::unordered_map<int, memory> arguments{{data ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, memory(c.x, engine(), x.raw())},
                                              {weights ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, chosen},
                                              {pass == Pass::forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, memory(c.y, engine(), y.raw())},
                                              {DNNL_ARG_SCRATCHPAD, memory(c.scratchpad, engine(), scratchpad.raw())}};
    if (bias.defined()) arguments.insert({DNNL_ARG_BIAS, memory(c.bias, engine(), bias.raw())});
    c.primitive.execute(stream, arguments);
    if (c.reorder && weights) c.reorder->execute(stream, chosen, ours);
    stream.wait();
  } catch (const dnnl::error& e) {
    fail("oneDNN refused the convolution of ", x.shape(), " ", to_string(x.dtype()), " by ", w.shape(), ": ", e.what());
  }
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
    fail("oneDNN refused the product of ", a.shape(), " ", to_string(a.dtype()), " and ", b.shape(), " ", to_string(b.dtype()), ": ",
         e.what());
  }
}

void conv(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, const ConvGeometry& g) {
  run(Pass::forward, x, w, bias, y, false, g);
}
void conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& g) {
  run(Pass::data, dx, w, Tensor(), dy, false, g);
}
void conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const ConvGeometry& g) {
  run(Pass::weights, x, dw, Tensor(), dy, accumulate, g);
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
