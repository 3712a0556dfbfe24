// Operation graphs of cuDNN's backend API, as far as attention and convolutions need them: an expression adds an operation, and a plan is
// the code that cuDNN makes of the whole graph. No descriptor is handled elsewhere, and the frontend library is not needed.
#pragma once
#include <cudnn.h>

#include <array>
#include <cstdint>
#include <deque>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mesa::kernels::cuda::cudnn {

/// cuDNN has no code for what was asked; the text is its reason. Whoever knows what the graph was for makes an error for people of it.
class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  int64_t wanted = 0;  ///< bytes of workspace, where that is too much
};

/// "9.19.0 for CUDA 13": its name is the same for all CUDAs. "not found" where it is missing.
std::string version();
/// Throws for a status other than success: Unsupported if it says so, OutOfMemory if cuDNN found none for itself, else mesa::Error, with
/// `what`, `name` and cuDNN's last message.
void check_status(cudnnStatus_t status, const char* what, const char* name);

// --- descriptors -----------------------------------------------------------------------------------------------------------------

/// How the API calls a C++ type.
template <class T>
struct AttributeType;
#define MESA_CUDNN_TYPE(type, tag)                  \
  template <>                                       \
  struct AttributeType<type> {                      \
    static constexpr auto value = CUDNN_TYPE_##tag; \
  }
MESA_CUDNN_TYPE(cudnnBackendDescriptor_t, BACKEND_DESCRIPTOR);
MESA_CUDNN_TYPE(cudnnHandle_t, HANDLE);
MESA_CUDNN_TYPE(int64_t, INT64);
MESA_CUDNN_TYPE(char, CHAR);
MESA_CUDNN_TYPE(bool, BOOLEAN);
MESA_CUDNN_TYPE(cudnnDataType_t, DATA_TYPE);
MESA_CUDNN_TYPE(cudnnPointwiseMode_t, POINTWISE_MODE);
MESA_CUDNN_TYPE(cudnnReduceTensorOp_t, REDUCTION_OPERATOR_TYPE);
MESA_CUDNN_TYPE(cudnnBackendHeurMode_t, HEUR_MODE);
MESA_CUDNN_TYPE(cudnnBackendNumericalNote_t, NUMERICAL_NOTE);
MESA_CUDNN_TYPE(cudnnConvolutionMode_t, CONVOLUTION_MODE);
MESA_CUDNN_TYPE(float, FLOAT);
#undef MESA_CUDNN_TYPE

/// One object of the backend API, destroyed with this one. Every call is checked; errors say `name`.
class Descriptor {
 public:
  Descriptor(cudnnBackendDescriptorType_t type, const char* name);
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, nullptr)), name_(other.name_) {}
  Descriptor& operator=(Descriptor&&) = delete;

  cudnnBackendDescriptor_t get() const { return descriptor_; }
  void set(cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type, int64_t count, const void* values);
  /// A handle, a number, an enumerator, a (finalized) descriptor.
  template <class T>
  void set(cudnnBackendAttributeName_t attribute, const T& value) {
    set(attribute, AttributeType<T>::value, 1, &value);
  }
  /// Several of them: a string, a vector, an array.
  template <class Values>
  void set_all(cudnnBackendAttributeName_t attribute, const Values& values) {
    set(attribute, AttributeType<typename Values::value_type>::value, static_cast<int64_t>(values.size()), values.data());
  }
  /// Reads at most `count` values and returns how many there were.
  int64_t read(cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type, int64_t count, void* values) const;
  void finalize();

 private:
  cudnnBackendDescriptor_t descriptor_ = nullptr;
  const char* name_;
};

// --- graphs ----------------------------------------------------------------------------------------------------------------------

using Extents = std::array<int64_t, 4>;

/// A tensor of a graph: in memory, where a run finds it by its uid, or virtual, on its way from one operation to another.
struct Value {
  cudnnBackendDescriptor_t descriptor;
  Extents dims, strides;
};

/// Where a result goes: into a virtual tensor of this type, or into a tensor in memory.
struct Result {
  Result(cudnnDataType_t type) : type(type) {}
  Result(const Value& memory) : type(), memory(&memory) {}
  cudnnDataType_t type;
  const Value* memory = nullptr;
};

/// How a filter slides over a grid, the same in both directions.
struct Sliding {
  int64_t stride, padding, dilation;
};

class Graph {
 public:
  /// `uid` below 1,000; 16-byte aligned.
  Value tensor(int64_t uid, cudnnDataType_t type, const Extents& dims, const Extents& strides);
  /// An f32 that a run reads from host memory.
  Value scalar(int64_t uid);

  // Element by element, in f32; a dimension of 1 is broadcast.
  Value add(const Value& a, const Value& b, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_ADD, a, &b, y); }
  Value sub(const Value& a, const Value& b, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_SUB, a, &b, y); }
  Value mul(const Value& a, const Value& b, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_MUL, a, &b, y); }
  Value div(const Value& a, const Value& b, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_DIV, a, &b, y); }
  Value exp(const Value& x, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_EXP, x, nullptr, y); }
  Value log(const Value& x, const Result& y = kWide) { return pointwise(CUDNN_POINTWISE_LOG, x, nullptr, y); }
  /// Over the last axis, which stays with a dimension of 1.
  Value sum(const Value& x) { return reduce(CUDNN_REDUCE_TENSOR_ADD, x); }
  Value max(const Value& x) { return reduce(CUDNN_REDUCE_TENSOR_MAX, x); }
  /// Of the last two axes, accumulated in f32.
  Value matmul(const Value& a, const Value& b, const Result& y = kWide);
  /// x^T of the last two axes: the same elements, seen and typed anew.
  Value transpose(const Value& x, cudnnDataType_t type);

  /// y <- x * w, dx, or dw, summed in f32: x [B, I, H, W], w [O, I / groups, kh, kw], y [B, O, H', W'], all in memory.
  void convolve(const Value& x, const Value& w, const Value& y, const Sliding& by);
  void convolve_data_grad(const Value& dy, const Value& w, const Value& dx, const Sliding& by);
  void convolve_weight_grad(const Value& dy, const Value& x, const Value& dw, const Sliding& by);

  const std::vector<cudnnBackendDescriptor_t>& operations() const { return operations_; }

 private:
  static constexpr cudnnDataType_t kWide = CUDNN_DATA_FLOAT;
  enum class Kind { memory, host, intermediate };
  Descriptor& add(cudnnBackendDescriptorType_t type, const char* name);
  Value tensor(Kind kind, int64_t uid, cudnnDataType_t type, const Extents& dims, const Extents& strides);
  Value place(const Result& result, const Extents& dims);
  void finish(Descriptor& operation);
  Value pointwise(cudnnPointwiseMode_t mode, const Value& a, const Value* b, const Result& y);
  Value reduce(cudnnReduceTensorOp_t op, const Value& x);
  Descriptor& convolution(const Sliding& by);

  std::deque<Descriptor> descriptors_;  // all that the operations refer to, and they themselves
  std::vector<cudnnBackendDescriptor_t> operations_;
  int64_t next_uid_ = 1000;
};

// --- plans -----------------------------------------------------------------------------------------------------------------------

/// Where each tensor of a graph is, by uid.
using Memory = std::vector<std::pair<int64_t, void*>>;

/// Which engines may make a plan: without those that do what is listed or want more workspace, and perhaps those that cuDNN falls back to
/// behind its first choices.
struct Engines {
  std::vector<cudnnBackendNumericalNote_t> without;
  bool fallback = false;
  int64_t most_workspace = std::numeric_limits<int64_t>::max();
  bool slower = true;  ///< also one that cuDNN takes for slower than an engine that wants more workspace
};

/// Code for a graph on one GPU. Making one compiles and takes about a second; it may then run any number of times, one at a time.
class Plan {
 public:
  /// Throws Unsupported if no engine takes the graph.
  Plan(Graph graph, cudnnHandle_t handle, const Engines& engines = {});
  /// Throws Unsupported if no engine would take the graph on a GPU with these properties (a JSON object as cuDNN writes it). No GPU is
  /// needed, but a libcuda.so.1 is, if only the toolkit's stub: everything is done up to loading the compiled code.
  static void check_support(const Graph& graph, const std::string& device_properties, const Engines& engines = {});

  int64_t workspace_bytes() const { return workspace_bytes_; }
  /// Bytes that an engine wants which cuDNN takes for faster, more than it may have; 0: there is none.
  int64_t faster_wants() const { return faster_wants_; }
  /// Runs on the handle's stream.
  void run(cudnnHandle_t handle, const Memory& memory, void* workspace) const;

 private:
  // Each refers to the one before.
  Graph graph_;
  Descriptor operations_;
  std::vector<Descriptor> configs_;
  int64_t faster_wants_ = 0;
  Descriptor plan_;
  int64_t workspace_bytes_ = 0;
};

/// cuDNN in this process: one handle, one run at a time; a handle serves one thread only, and starting kernels takes microseconds.
struct Library {
  std::mutex mutex;
  cudnnHandle_t handle = nullptr;

  /// Never destroyed: at exit the driver may be gone before.
  static Library& get();
  cudnnHandle_t handle_on(void* stream);
};

}  // namespace mesa::kernels::cuda::cudnn
