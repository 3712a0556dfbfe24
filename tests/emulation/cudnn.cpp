// A stand-in for cuDNN's backend API that interprets operation graphs on host memory: a test tool, in place of the library, where there is
// no GPU. Every operation that Mesa's graphs use, in the order in which they were listed; virtual tensors live for one run.
#include <cudnn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cudnn_troubles.h"
#include "device_memory.h"
#include "mesa/base/dtype.h"

namespace {

struct Object {
  cudnnBackendDescriptorType_t type;
  std::map<int, std::vector<char>> attributes;

  template <class T>
  std::vector<T> all(int attribute) const {
    const auto found = attributes.find(attribute);
    if (found == attributes.end()) return {};
    std::vector<T> values(found->second.size() / sizeof(T));
    std::memcpy(values.data(), found->second.data(), values.size() * sizeof(T));
    return values;
  }
  template <class T>
  T one(int attribute) const {
    return all<T>(attribute).at(0);
  }
  const Object& part(int attribute) const { return *one<const Object*>(attribute); }
};

std::string last_error;

size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_CHAR:
    case CUDNN_TYPE_BOOLEAN: return 1;
    case CUDNN_TYPE_DATA_TYPE:
    case CUDNN_TYPE_POINTWISE_MODE:
    case CUDNN_TYPE_REDUCTION_OPERATOR_TYPE:
    case CUDNN_TYPE_HEUR_MODE:
    case CUDNN_TYPE_FLOAT:
    case CUDNN_TYPE_CONVOLUTION_MODE:
    case CUDNN_TYPE_NUMERICAL_NOTE: return 4;
    default: return 8;
  }
}

/// The memory of each tensor in one run, by uid.
struct Memory {
  std::map<int64_t, char*> given;
  std::map<int64_t, std::vector<char>> intermediate;
  std::map<int64_t, int64_t> alias;  // a reshaped tensor is the same memory

  char* of(const Object& tensor) {
    const int64_t uid = tensor.one<int64_t>(CUDNN_ATTR_TENSOR_UNIQUE_ID);
    if (const auto found = given.find(uid); found != given.end()) return found->second;
    auto& own = intermediate[uid];
    if (own.empty()) {
      int64_t n = 4;
      for (const int64_t d : tensor.all<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS)) n *= d;
      own.resize(n);
    }
    return own.data();
  }
};

struct View {
  char* base;
  std::vector<int64_t> dims, strides;
  cudnnDataType_t type;

  View(Memory& memory, const Object& t)
      : base(memory.of(t)),
        dims(t.all<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS)),
        strides(t.all<int64_t>(CUDNN_ATTR_TENSOR_STRIDES)),
        type(t.one<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE)) {}
  int64_t at(const int64_t (&i)[4]) const {
    int64_t offset = 0;
    for (int a = 0; a < 4; ++a) offset += dims[a] == 1 ? 0 : i[a] * strides[a];
    return offset;
  }
  float get(const int64_t (&i)[4]) const {
    if (type == CUDNN_DATA_BFLOAT16) return reinterpret_cast<const mesa::bf16*>(base)[at(i)];
    return reinterpret_cast<const float*>(base)[at(i)];
  }
  void put(const int64_t (&i)[4], float value) const {
    if (type == CUDNN_DATA_BFLOAT16)
      reinterpret_cast<mesa::bf16*>(base)[at(i)] = mesa::bf16(value);
    else
      reinterpret_cast<float*>(base)[at(i)] = value;
  }
  template <class F>
  void fill(const F& value) const {
    for (int64_t b = 0; b < dims[0]; ++b)
      for (int64_t h = 0; h < dims[1]; ++h)
        for (int64_t r = 0; r < dims[2]; ++r)
          for (int64_t c = 0; c < dims[3]; ++c) {
            const int64_t i[4] = {b, h, r, c};
            put(i, value(i));
          }
  }
};

float apply(cudnnPointwiseMode_t mode, float a, float b) {
  switch (mode) {
    case CUDNN_POINTWISE_ADD: return a + b;
    case CUDNN_POINTWISE_SUB: return a - b;
    case CUDNN_POINTWISE_MUL: return a * b;
    case CUDNN_POINTWISE_DIV: return a / b;
    case CUDNN_POINTWISE_EXP: return std::exp(a);
    case CUDNN_POINTWISE_LOG: return std::log(a);
    default: return NAN;
  }
}

/// f(place in x, in w, in y) for each product that a convolution adds up.
struct Convolution {
  std::vector<int64_t> stride, padding, dilation;

  explicit Convolution(const Object& function)
      : stride(function.all<int64_t>(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES)),
        padding(function.all<int64_t>(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS)),
        dilation(function.all<int64_t>(CUDNN_ATTR_CONVOLUTION_DILATIONS)) {}

  template <class F>
  void each(const View& x, const View& w, const View& y, const F& f) const {
    const int64_t per_group = y.dims[1] / (x.dims[1] / w.dims[1]);
    for (int64_t b = 0; b < y.dims[0]; ++b)
      for (int64_t o = 0; o < y.dims[1]; ++o)
        for (int64_t row = 0; row < y.dims[2]; ++row)
          for (int64_t column = 0; column < y.dims[3]; ++column)
            for (int64_t r = 0; r < w.dims[2]; ++r)
              for (int64_t s = 0; s < w.dims[3]; ++s) {
                const int64_t h = row * stride[0] - padding[0] + r * dilation[0], v = column * stride[1] - padding[1] + s * dilation[1];
                if (h < 0 || h >= x.dims[2] || v < 0 || v >= x.dims[3]) continue;
                for (int64_t c = 0; c < w.dims[1]; ++c) f({b, o / per_group * w.dims[1] + c, h, v}, {o, c, r, s}, {b, o, row, column});
              }
  }
};

/// A result that is summed in f32 and rounded at the end.
struct Sums {
  const View& view;
  std::vector<float> values;
  explicit Sums(const View& view) : view(view), values(static_cast<size_t>(view.dims[0] * view.dims[1] * view.dims[2] * view.dims[3])) {}
  float& at(const int64_t (&i)[4]) { return values[((i[0] * view.dims[1] + i[1]) * view.dims[2] + i[2]) * view.dims[3] + i[3]]; }
  void store() {
    view.fill([&](const int64_t(&i)[4]) { return at(i); });
  }
};

using Place = const int64_t (&)[4];

void convolve(const Object& function, const View& x, const View& w, const View& y) {
  Sums sums(y);
  Convolution(function).each(x, w, y, [&](Place in, Place by, Place out) { sums.at(out) += x.get(in) * w.get(by); });
  sums.store();
}
void convolve_data_grad(const Object& function, const View& dx, const View& w, const View& dy) {
  Sums sums(dx);
  Convolution(function).each(dx, w, dy, [&](Place in, Place by, Place out) { sums.at(in) += dy.get(out) * w.get(by); });
  sums.store();
}
void convolve_weight_grad(const Object& function, const View& x, const View& dw, const View& dy) {
  Sums sums(dw);
  Convolution(function).each(x, dw, dy, [&](Place in, Place by, Place out) { sums.at(by) += dy.get(out) * x.get(in); });
  sums.store();
}

void run(const Object& op, Memory& memory) {
  const auto view = [&](int attribute) { return View(memory, op.part(attribute)); };
  switch (op.type) {
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: {
      const auto mode = op.part(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR).one<cudnnPointwiseMode_t>(CUDNN_ATTR_POINTWISE_MODE);
      const View x = view(CUDNN_ATTR_OPERATION_POINTWISE_XDESC), y = view(CUDNN_ATTR_OPERATION_POINTWISE_YDESC);
      const bool two = op.attributes.count(CUDNN_ATTR_OPERATION_POINTWISE_BDESC) != 0;
      const View b = two ? view(CUDNN_ATTR_OPERATION_POINTWISE_BDESC) : x;
      y.fill([&](const int64_t(&i)[4]) { return apply(mode, x.get(i), b.get(i)); });
      break;
    }
    case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR: {
      const auto mode = op.part(CUDNN_ATTR_OPERATION_REDUCTION_DESC).one<cudnnReduceTensorOp_t>(CUDNN_ATTR_REDUCTION_OPERATOR);
      const View x = view(CUDNN_ATTR_OPERATION_REDUCTION_XDESC), y = view(CUDNN_ATTR_OPERATION_REDUCTION_YDESC);
      y.fill([&](const int64_t(&i)[4]) {
        float all = mode == CUDNN_REDUCE_TENSOR_MAX ? -INFINITY : 0;
        for (int64_t c = 0; c < x.dims[3]; ++c) {
          const float value = x.get({i[0], i[1], i[2], c});
          all = mode == CUDNN_REDUCE_TENSOR_MAX ? std::max(all, value) : all + value;
        }
        return all;
      });
      break;
    }
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR: {
      const View a = view(CUDNN_ATTR_OPERATION_MATMUL_ADESC), b = view(CUDNN_ATTR_OPERATION_MATMUL_BDESC),
                 y = view(CUDNN_ATTR_OPERATION_MATMUL_CDESC);
      y.fill([&](const int64_t(&i)[4]) {
        float sum = 0;
        for (int64_t k = 0; k < a.dims[3]; ++k) sum += a.get({i[0], i[1], i[2], k}) * b.get({i[0], i[1], k, i[3]});
        return sum;
      });
      break;
    }
    case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR: {
      const View x = view(CUDNN_ATTR_OPERATION_RESHAPE_XDESC), y = view(CUDNN_ATTR_OPERATION_RESHAPE_YDESC);
      // y is virtual with x's strides swapped: its own memory would have to span x's, so it is laid out by its dims here.
      View own = y;
      own.strides = {y.dims[1] * y.dims[2] * y.dims[3], y.dims[2] * y.dims[3], y.dims[3], 1};
      own.fill([&](const int64_t(&i)[4]) { return x.get({i[0], i[1], i[3], i[2]}); });
      auto& t = const_cast<Object&>(op.part(CUDNN_ATTR_OPERATION_RESHAPE_YDESC));
      t.attributes[CUDNN_ATTR_TENSOR_STRIDES].assign(reinterpret_cast<char*>(own.strides.data()),
                                                     reinterpret_cast<char*>(own.strides.data() + 4));
      break;
    }
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR:
      return convolve(op.part(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC), view(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X),
                      view(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W), view(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y));
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR:
      return convolve_data_grad(op.part(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC),
                                view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX), view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W),
                                view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY));
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR:
      return convolve_weight_grad(op.part(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC),
                                  view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X), view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW),
                                  view(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY));
    default: break;
  }
}

/// Bytes that a plan of this engine wants.
int64_t workspace_of(const Object& config) {
  const mesa::emulation::CudnnTroubles& troubles = mesa::emulation::cudnn_troubles();
  if (troubles.fallback_wants_none && config.one<int>(CUDNN_ATTR_ENGINEHEUR_MODE) == CUDNN_HEUR_MODE_FALLBACK) return 0;
  if (troubles.workspace_each == 0) return troubles.workspace;
  const Object& op = *config.part(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH).all<const Object*>(CUDNN_ATTR_OPERATIONGRAPH_OPS).at(0);
  const auto x = op.type == CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR         ? CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X
                 : op.type == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR ? CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX
                                                                                           : CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X;
  return troubles.workspace + troubles.workspace_each * op.part(x).all<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS).at(0);
}

}  // namespace

mesa::emulation::CudnnTroubles& mesa::emulation::cudnn_troubles() {
  static CudnnTroubles troubles;
  return troubles;
}

extern "C" {
size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
const char* cudnnGetErrorString(cudnnStatus_t) { return "CUDNN_STATUS"; }
void cudnnGetLastErrorString(char* message, size_t size) { std::strncpy(message, last_error.c_str(), size - 1); }
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  if (!mesa::emulation::cudnn_troubles().handles) return CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED;
  *handle = reinterpret_cast<cudnnHandle_t>(new int);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t, cudaStream_t) { return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* d) {
  *d = new Object{type, {}};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
  delete static_cast<Object*>(d);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d) {
  const Object& object = *static_cast<Object*>(d);
  if (object.type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
    ++mesa::emulation::cudnn_troubles().plans;
    return static_cast<cudnnStatus_t>(mesa::emulation::cudnn_troubles().planning);
  }
  if (object.type != CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
  const auto& failing = mesa::emulation::cudnn_troubles().heuristics;
  const auto found = failing.find(object.one<int>(CUDNN_ATTR_ENGINEHEUR_MODE));
  last_error = found != failing.end() ? "Reason: this heuristic takes no graph" : "";
  return found != failing.end() ? static_cast<cudnnStatus_t>(found->second) : CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                       int64_t n, const void* values) {
  const char* bytes = static_cast<const char*>(values);
  static_cast<Object*>(d)->attributes[name].assign(bytes, bytes + n * size_of(type));
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t,
                                       int64_t wanted, int64_t* n, void* values) {
  if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS) {
    *n = 1;
    if (wanted > 0)
      for (const auto attribute : {CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_ATTR_ENGINEHEUR_MODE})
        static_cast<Object**>(values)[0]->attributes[attribute] = static_cast<Object*>(d)->attributes[attribute];
  } else if (name == CUDNN_ATTR_ENGINECFG_ENGINE) {
    *n = 1;
  } else if (name == CUDNN_ATTR_ENGINE_NUMERICAL_NOTE) {
    const auto& notes = mesa::emulation::cudnn_troubles().notes;
    *n = static_cast<int64_t>(notes.size());
    for (size_t i = 0; i < notes.size(); ++i) static_cast<cudnnBackendNumericalNote_t*>(values)[i] = cudnnBackendNumericalNote_t(notes[i]);
  } else if (name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) {
    *n = 1;
    *static_cast<int64_t*>(values) = workspace_of(static_cast<Object*>(d)->part(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG));
  }
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
  mesa::emulation::CudnnTroubles& troubles = mesa::emulation::cudnn_troubles();
  ++troubles.runs;
  if (troubles.running != 0) return static_cast<cudnnStatus_t>(troubles.running);
  const Object& graph =
      static_cast<Object*>(plan)->part(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG).part(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
  const Object& given = *static_cast<Object*>(pack);
  const auto uids = given.all<int64_t>(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
  const auto addresses = given.all<char*>(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  const auto work = [&graph, uids, addresses] {
    const mesa::emulation::DeviceAccess access;
    Memory memory;
    for (size_t i = 0; i < uids.size(); ++i) memory.given[uids[i]] = addresses[i];
    for (const Object* op : graph.all<const Object*>(CUDNN_ATTR_OPERATIONGRAPH_OPS)) run(*op, memory);
  };
  if (mesa::emulation::record(work)) return CUDNN_STATUS_SUCCESS;
  mesa::emulation::finish_current_stream();
  work();
  return CUDNN_STATUS_SUCCESS;
}
}
