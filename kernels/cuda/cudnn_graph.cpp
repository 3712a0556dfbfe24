#include "cudnn_graph.h"

#include <algorithm>

#include "mesa/base/error.h"

namespace mesa::kernels::cuda::cudnn {
namespace {

/// What cuDNN says about its last failure, in one line, and is forgotten then: the innermost cause, which comes first of many lines like
/// "Warning: CUDNN_STATUS_NOT_SUPPORTED_SHAPE; Reason: Embedding dim per head for q and k is not less than equal to 256 at: d_qk > 256".
std::string last_message() {
  char text[4096] = "";
  cudnnGetLastErrorString(text, sizeof text);
  const std::string all = text, mark = "Reason: ";
  size_t from = all.find(mark);
  from = from == std::string::npos ? all.find_first_not_of(" \n") : from + mark.size();
  if (from == std::string::npos) return "";
  const std::string line = all.substr(from, all.find('\n', from) - from);
  return line.substr(0, line.find_last_not_of(' ') + 1);
}

std::string describe(cudnnStatus_t status) {
  const std::string message = last_message();
  return message.empty() ? cudnnGetErrorString(status) : concat(cudnnGetErrorString(status), ", ", message);
}

bool lacks_memory(cudnnStatus_t status) { return status == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED; }

}  // namespace

std::string version() {
  const size_t v = cudnnGetVersion();  // 91900
  if (v == 0) return "not found";
  return concat(v / 10000, ".", v / 100 % 100, ".", v % 100, " for CUDA ", cudnnGetCudartVersion() / 1000);
}

void check_status(cudnnStatus_t status, const char* what, const char* name) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  const std::string text = concat(what, " (", name, "): ", describe(status));
  if (lacks_memory(status)) throw OutOfMemory(concat("out of memory on cuda: cuDNN: ", text));
  if (CUDNN_STATUS_CATEGORY(status) == CUDNN_STATUS_NOT_SUPPORTED) throw Unsupported(text);
  fail("cuDNN: ", text);
}

// --- descriptors -----------------------------------------------------------------------------------------------------------------

Descriptor::Descriptor(cudnnBackendDescriptorType_t type, const char* name) : name_(name) {
  check_status(cudnnBackendCreateDescriptor(type, &descriptor_), "creating a descriptor", name_);
}

Descriptor::~Descriptor() {
  if (descriptor_ != nullptr) cudnnBackendDestroyDescriptor(descriptor_);
}

void Descriptor::set(cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type, int64_t count, const void* values) {
  check_status(cudnnBackendSetAttribute(descriptor_, attribute, type, count, values), "setting an attribute", name_);
}

int64_t Descriptor::read(cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type, int64_t count, void* values) const {
  int64_t found = 0;
  check_status(cudnnBackendGetAttribute(descriptor_, attribute, type, count, &found, values), "reading an attribute", name_);
  return found;
}

void Descriptor::finalize() { check_status(cudnnBackendFinalize(descriptor_), "finalizing", name_); }

// --- graphs ----------------------------------------------------------------------------------------------------------------------

Descriptor& Graph::add(cudnnBackendDescriptorType_t type, const char* name) { return descriptors_.emplace_back(type, name); }

Value Graph::tensor(Kind kind, int64_t uid, cudnnDataType_t type, const Extents& dims, const Extents& strides) {
  Descriptor& tensor = add(CUDNN_BACKEND_TENSOR_DESCRIPTOR, "tensor");
  tensor.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid);
  tensor.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
  tensor.set_all(CUDNN_ATTR_TENSOR_DIMENSIONS, dims);
  tensor.set_all(CUDNN_ATTR_TENSOR_STRIDES, strides);
  tensor.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, int64_t{16});
  tensor.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, kind == Kind::intermediate);
  tensor.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, kind == Kind::host);
  tensor.finalize();
  return {tensor.get(), dims, strides};
}

Value Graph::tensor(int64_t uid, cudnnDataType_t type, const Extents& dims, const Extents& strides) {
  return tensor(Kind::memory, uid, type, dims, strides);
}

Value Graph::scalar(int64_t uid) { return tensor(Kind::host, uid, CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}); }

Value Graph::place(const Result& result, const Extents& dims) {
  if (result.memory != nullptr) return *result.memory;
  return tensor(Kind::intermediate, next_uid_++, result.type, dims, {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1});
}

void Graph::finish(Descriptor& operation) {
  operation.finalize();
  operations_.push_back(operation.get());
}

Value Graph::pointwise(cudnnPointwiseMode_t mode, const Value& a, const Value* b, const Result& result) {
  Extents dims = a.dims;
  for (int i = 0; b != nullptr && i < 4; ++i) dims[i] = std::max(dims[i], b->dims[i]);
  const Value y = place(result, dims);

  Descriptor& function = add(CUDNN_BACKEND_POINTWISE_DESCRIPTOR, "pointwise function");
  function.set(CUDNN_ATTR_POINTWISE_MODE, mode);
  function.set(CUDNN_ATTR_POINTWISE_MATH_PREC, kWide);
  function.finalize();

  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "pointwise operation");
  operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, function.get());
  operation.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, a.descriptor);
  if (b != nullptr) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b->descriptor);
  operation.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y.descriptor);
  finish(operation);
  return y;
}

Value Graph::reduce(cudnnReduceTensorOp_t op, const Value& x) {
  const Value y = place(kWide, {x.dims[0], x.dims[1], x.dims[2], 1});

  Descriptor& function = add(CUDNN_BACKEND_REDUCTION_DESCRIPTOR, "reduction");
  function.set(CUDNN_ATTR_REDUCTION_OPERATOR, op);
  function.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, kWide);
  function.finalize();

  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "reduction operation");
  operation.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, function.get());
  operation.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y.descriptor);
  finish(operation);
  return y;
}

Value Graph::matmul(const Value& a, const Value& b, const Result& result) {
  const Value y = place(result, {a.dims[0], a.dims[1], a.dims[2], b.dims[3]});

  Descriptor& function = add(CUDNN_BACKEND_MATMUL_DESCRIPTOR, "matrix product");
  function.set(CUDNN_ATTR_MATMUL_COMP_TYPE, kWide);
  function.finalize();

  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "matrix product operation");
  operation.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, function.get());
  operation.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, y.descriptor);
  finish(operation);
  return y;
}

Value Graph::transpose(const Value& x, cudnnDataType_t type) {
  Extents dims = x.dims, strides = x.strides;
  std::swap(dims[2], dims[3]);
  std::swap(strides[2], strides[3]);
  const Value y = tensor(Kind::intermediate, next_uid_++, type, dims, strides);

  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, "reshape operation");
  operation.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.descriptor);
  finish(operation);
  return y;
}

Descriptor& Graph::convolution(const Sliding& by) {
  using Pair = std::array<int64_t, 2>;
  Descriptor& function = add(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, "convolution");
  function.set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, kWide);
  function.set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_CROSS_CORRELATION);
  function.set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, int64_t{2});
  function.set_all(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, Pair{by.stride, by.stride});
  function.set_all(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, Pair{by.padding, by.padding});
  function.set_all(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, Pair{by.padding, by.padding});
  function.set_all(CUDNN_ATTR_CONVOLUTION_DILATIONS, Pair{by.dilation, by.dilation});
  function.finalize();
  return function;
}

void Graph::convolve(const Value& x, const Value& w, const Value& y, const Sliding& by) {
  const Descriptor& function = convolution(by);
  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR, "convolution operation");
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, function.get());
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, w.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, 1.0f);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, 0.0f);
  finish(operation);
}

void Graph::convolve_data_grad(const Value& dy, const Value& w, const Value& dx, const Sliding& by) {
  const Descriptor& function = convolution(by);
  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR, "gradient of a convolution's data");
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC, function.get());
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY, dy.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W, w.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, dx.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA, 1.0f);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA, 0.0f);
  finish(operation);
}

void Graph::convolve_weight_grad(const Value& dy, const Value& x, const Value& dw, const Sliding& by) {
  const Descriptor& function = convolution(by);
  Descriptor& operation = add(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR, "gradient of a convolution's filter");
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC, function.get());
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY, dy.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X, x.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW, dw.descriptor);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA, 1.0f);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA, 0.0f);
  finish(operation);
}

// --- plans -----------------------------------------------------------------------------------------------------------------------

namespace {

/// A GPU: the one of a handle or, where there is none, one that is only described.
struct Gpu {
  cudnnHandle_t handle = nullptr;
  const Descriptor* properties = nullptr;
};

Descriptor operation_graph(const Graph& graph, cudnnHandle_t handle) {
  last_message();  // of somebody else's calls
  Descriptor operations(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "operation graph");
  if (handle != nullptr) operations.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, handle);
  operations.set_all(CUDNN_ATTR_OPERATIONGRAPH_OPS, graph.operations());
  operations.finalize();
  return operations;
}

/// Engines with their settings, in the order of a heuristic.
std::vector<Descriptor> engine_configs(const Descriptor& operations, const Gpu& gpu, cudnnBackendHeurMode_t mode) {
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "engine heuristics");
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, operations.get());
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, mode);
  if (gpu.properties != nullptr) heuristics.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, gpu.properties->get());
  heuristics.finalize();

  const int64_t offered = heuristics.read(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, nullptr);
  std::vector<Descriptor> configs;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t i = 0; i < offered; ++i)
    raw.push_back(configs.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "engine configuration").get());
  // Of those that were counted, the ones that can take the graph are handed out; it may be none.
  int64_t usable = 0;
  if (offered > 0) usable = heuristics.read(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, offered, raw.data());
  while (static_cast<int64_t>(configs.size()) > usable) configs.pop_back();
  return configs;
}

/// True if the configuration's engine does any of what it must not.
bool does(const Descriptor& config, const std::vector<cudnnBackendNumericalNote_t>& unwanted) {
  if (unwanted.empty()) return false;
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR, "engine");
  cudnnBackendDescriptor_t raw = engine.get();
  config.read(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &raw);
  cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
  const int64_t found = engine.read(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, notes);
  return std::any_of(notes, notes + found, [&](auto note) { return std::find(unwanted.begin(), unwanted.end(), note) != unwanted.end(); });
}

/// The same of the engines that may be, what cuDNN takes for the fastest first. One heuristic may know of none where another does.
std::vector<Descriptor> engine_configs(const Descriptor& operations, const Gpu& gpu, const Engines& engines) {
  std::vector<Descriptor> all;
  std::string refusal;
  const auto add = [&](cudnnBackendHeurMode_t mode) {
    std::vector<Descriptor> offered;
    try {
      offered = engine_configs(operations, gpu, mode);
    } catch (const OutOfMemory&) {
      throw;
    } catch (const std::runtime_error& reason) {  // that this one fails, in whatever way, is no reason not to ask the other
      if (refusal.empty()) refusal = reason.what();
    }
    for (Descriptor& config : offered)
      if (!does(config, engines.without)) all.push_back(std::move(config));
  };
  add(CUDNN_HEUR_MODE_A);
  if (engines.fallback) add(CUDNN_HEUR_MODE_FALLBACK);
  if (all.empty() && !refusal.empty()) throw Unsupported(refusal);
  return all;
}

int64_t workspace_of(const Descriptor& plan) {
  int64_t bytes = 0;
  plan.read(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &bytes);
  return bytes;
}

/// The plan of the first configuration that yields one. For a GPU that is only described its code is compiled but not loaded. `refused`:
/// what the first of those before it wanted that are refused for their workspace.
Descriptor execution_plan(const std::vector<Descriptor>& configs, const Gpu& gpu, const Engines& engines, int64_t& refused) {
  std::string reason;
  for (const Descriptor& config : configs) {
    Descriptor plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, "execution plan");
    plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config.get());
    if (gpu.handle != nullptr) plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, gpu.handle);
    if (gpu.properties != nullptr) plan.set(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, gpu.properties->get());
    const cudnnStatus_t status = cudnnBackendFinalize(plan.get());
    if (lacks_memory(status)) check_status(status, "making a plan", "execution plan");  // of which a slower engine may want less: no reason
    if (status == CUDNN_STATUS_SUCCESS && workspace_of(plan) <= engines.most_workspace) return plan;
    if (gpu.handle == nullptr && status == CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER) return plan;
    reason = status == CUDNN_STATUS_SUCCESS ? concat("a workspace of ", workspace_of(plan), " bytes") : describe(status);
    if (status == CUDNN_STATUS_SUCCESS && refused == 0) refused = workspace_of(plan);
    if (refused > 0 && !engines.slower) break;  // there may be dozens, each compiled
  }
  if (reason.empty()) reason = last_message();
  Unsupported none(reason.empty() ? "no engine takes the graph" : reason);
  none.wanted = refused;
  throw none;
}

}  // namespace

Plan::Plan(Graph graph, cudnnHandle_t handle, const Engines& engines)
    : graph_(std::move(graph)),
      operations_(operation_graph(graph_, handle)),
      configs_(engine_configs(operations_, {handle, nullptr}, engines)),
      plan_(execution_plan(configs_, {handle, nullptr}, engines, faster_wants_)),
      workspace_bytes_(workspace_of(plan_)) {}

void Plan::check_support(const Graph& graph, const std::string& device_properties, const Engines& engines) {
  Descriptor properties(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, "device properties");
  properties.set_all(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, device_properties);
  properties.finalize();
  const Descriptor operations = operation_graph(graph, nullptr);
  int64_t refused = 0;
  execution_plan(engine_configs(operations, {nullptr, &properties}, engines), {nullptr, &properties}, engines, refused);
}

void Plan::run(cudnnHandle_t handle, const Memory& memory, void* workspace) const {
  std::vector<int64_t> uids;
  std::vector<void*> addresses;
  for (const auto& [uid, address] : memory) uids.push_back(uid), addresses.push_back(address);
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, "variant pack");
  pack.set_all(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, uids);
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<int64_t>(addresses.size()), addresses.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  pack.finalize();
  check_status(cudnnBackendExecute(handle, plan_.get(), pack.get()), "running", "execution plan");
}

Library& Library::get() {
  static Library& library = *new Library;
  return library;
}

cudnnHandle_t Library::handle_on(void* stream) {
  if (handle == nullptr) check_status(cudnnCreate(&handle), "starting", "handle");
  check_status(cudnnSetStream(handle, static_cast<cudaStream_t>(stream)), "choosing the stream", "handle");
  return handle;
}

}  // namespace mesa::kernels::cuda::cudnn
