// The cuBLASLt functions that Mesa calls, on emulated memory. What the library documents as wrong or unsupported is refused with the same
// status, mistakes with the reason on stderr: descriptors that contradict each other, misaligned or misplaced memory, an algorithm that was
// chosen for another product, a workspace smaller than it asked for. Memory is checked more strictly than the library does.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "cublaslt_descriptors.h"
#include "device_memory.h"
#include "mesa/base/error.h"
#include "streams.h"

namespace mesa::emulation {
namespace {

// --- what fits together -----------------------------------------------------------------------------------------------------------

/// Thrown where a call is wrong; the functions of the library turn it into their status.
struct Refused {
  cublasStatus_t status;
  std::string why;
};
template <class... Parts>
void require(bool ok, cublasStatus_t status, const Parts&... why) {
  if (!ok) throw Refused{status, concat(why...)};
}
constexpr cublasStatus_t kInvalid = CUBLAS_STATUS_INVALID_VALUE, kUnsupported = CUBLAS_STATUS_NOT_SUPPORTED;

thread_local std::string reason;

template <class F>
cublasStatus_t answer(const char* function, F&& f) {
  try {
    f();
    return CUBLAS_STATUS_SUCCESS;
  } catch (const Refused& refused) {
    reason = refused.why;
    // That something is not supported is an answer; the rest are mistakes.
    if (refused.status != kUnsupported) std::fprintf(stderr, "emulation: %s: %s\n", function, reason.c_str());
    return refused.status;
  }
}

void check_layout(const char* name, const Layout& layout, bool may_repeat) {
  require(layout.rows > 0 && layout.columns > 0, kInvalid, name, " has ", layout.rows, " rows and ", layout.columns, " columns");
  require(layout.type == CUDA_R_16BF || layout.type == CUDA_R_32F || layout.type == CUDA_R_64F, kUnsupported, name, " is of type ",
          static_cast<int>(layout.type));
  require(layout.row_major == CUBLASLT_ORDER_COL || layout.row_major == CUBLASLT_ORDER_ROW, kUnsupported, name, " is of order ",
          layout.row_major);
  const uint64_t least = layout.row_major ? layout.columns : layout.rows;
  require((may_repeat && layout.leading == 0) || (layout.leading > 0 && static_cast<uint64_t>(layout.leading) >= least), kInvalid, name,
          " has a leading dimension of ", layout.leading, ", but ", layout.row_major ? "rows of " : "columns of ", least, " elements");
  require(layout.batches > 0, kInvalid, name, " has a batch count of ", layout.batches);
  require(layout.distance >= 0, kUnsupported, name, " has a negative batch offset");
}

void check_types(const Operation& o, const Product& p) {
  const bool wide = o.compute_type == CUBLAS_COMPUTE_64F || o.compute_type == CUBLAS_COMPUTE_64F_PEDANTIC;
  const bool tf32 = o.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32;
  require(wide || tf32 || o.compute_type == CUBLAS_COMPUTE_32F || o.compute_type == CUBLAS_COMPUTE_32F_PEDANTIC, kUnsupported,
          "compute type ", o.compute_type);
  require(o.scale_type == (wide ? CUDA_R_64F : CUDA_R_32F), kUnsupported, "scale type ", o.scale_type, " with compute type ",
          o.compute_type);
  require(p.a.type == p.b.type, kUnsupported, "A is of type ", static_cast<int>(p.a.type), " and B of type ", static_cast<int>(p.b.type));
  const bool fits = wide ? p.a.type == CUDA_R_64F && p.d.type == CUDA_R_64F
                         : (p.a.type == CUDA_R_32F && p.d.type == CUDA_R_32F) ||
                               (p.a.type == CUDA_R_16BF && !tf32 && (p.d.type == CUDA_R_32F || p.d.type == CUDA_R_16BF));
  require(fits, kUnsupported, "inputs of type ", static_cast<int>(p.a.type), " and a result of type ", static_cast<int>(p.d.type),
          " with compute type ", o.compute_type);
}

void check_extents(const Operation& o, const Product& p) {
  for (const int32_t transpose : {o.transposed_a, o.transposed_b})
    require(transpose == CUBLAS_OP_N || transpose == CUBLAS_OP_T || transpose == CUBLAS_OP_C, kInvalid, "transposition ", transpose);
  require(o.transposed_c == CUBLAS_OP_N, kUnsupported, "a transposed C");
  require(o.fill_mode == CUBLAS_FILL_MODE_FULL, kUnsupported, "fill mode ", o.fill_mode);
  const uint64_t a_rows = p.transposed_a ? p.a.columns : p.a.rows, a_columns = p.transposed_a ? p.a.rows : p.a.columns;
  const uint64_t b_rows = p.transposed_b ? p.b.columns : p.b.rows, b_columns = p.transposed_b ? p.b.rows : p.b.columns;
  require(a_columns == b_rows && a_rows == p.d.rows && b_columns == p.d.columns, kInvalid, "op(A) is ", a_rows, " x ", a_columns,
          ", op(B) is ", b_rows, " x ", b_columns, " and D is ", p.d.rows, " x ", p.d.columns);
  require(p.c.type == p.d.type && p.c.row_major == p.d.row_major && p.c.rows == p.d.rows && p.c.columns == p.d.columns &&
              p.c.batches == p.d.batches,
          kInvalid, "C and D differ in type, order, extents or batch count");
  require(p.a.batches == p.d.batches && p.b.batches == p.d.batches, kInvalid, "batch counts of A, B and D: ", p.a.batches, ", ",
          p.b.batches, ", ", p.d.batches);
  require(p.d.batches == 1 || p.d.distance > 0, kInvalid, "the matrices of D's batch lie on each other");
}

void check_epilogue(const Operation& o, const Product& p) {
  if (p.epilogue == Epilogue::none) return;
  require(p.d.row_major == 0, kUnsupported, "epilogue ", o.epilogue, " with a row-major D");
  require(p.vector_type == p.d.type, kUnsupported, "a bias of type ", static_cast<int>(p.vector_type), " beside a result of type ",
          static_cast<int>(p.d.type));
  require(p.epilogue == Epilogue::bias || (p.d.batches == 1 && p.d.type != CUDA_R_64F), kUnsupported,
          "bias gradients of a batch, or in double precision");
}

Epilogue epilogue_of(uint32_t epilogue) {
  switch (epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT: return Epilogue::none;
    case CUBLASLT_EPILOGUE_BIAS: return Epilogue::bias;
    case CUBLASLT_EPILOGUE_BGRADA: return Epilogue::sums_of_a;
    case CUBLASLT_EPILOGUE_BGRADB: return Epilogue::sums_of_b;
    default: throw Refused{kUnsupported, concat("epilogue ", epilogue)};
  }
}

/// The product that descriptors speak of, or a refusal.
Product described(cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                  cublasLtMatrixLayout_t d) {
  require(operation != nullptr && a != nullptr && b != nullptr && d != nullptr, kInvalid, "a descriptor is missing");
  const Operation& o = operation_of(operation);
  Product p;
  p.a = layout_of(a), p.b = layout_of(b), p.d = layout_of(d), p.c = c ? layout_of(c) : p.d;
  p.transposed_a = o.transposed_a != CUBLAS_OP_N, p.transposed_b = o.transposed_b != CUBLAS_OP_N;
  p.epilogue = epilogue_of(o.epilogue);
  p.vector = o.vector;
  p.vector_type = o.vector_type == -1 ? p.d.type : static_cast<cudaDataType>(o.vector_type);
  p.vector_distance = o.vector_distance;
  check_layout("A", p.a, false);
  check_layout("B", p.b, false);
  check_layout("C", p.c, true);
  check_layout("D", p.d, false);
  check_extents(o, p);
  check_types(o, p);
  check_epilogue(o, p);
  return p;
}

// --- algorithms -------------------------------------------------------------------------------------------------------------------

/// What an algorithm was chosen for, and what it needs.
struct Algorithm {
  uint64_t product;  // a hash of its description
  uint64_t workspace;
  uint32_t alignment[4], vector_alignment;
  uint32_t number;  // of algorithms that compute the same
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

uint32_t alignment_of(const void* p, uint32_t most) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return address == 0 ? most : static_cast<uint32_t>(std::min<uintptr_t>(most, address & (~address + 1)));
}

uint64_t hash_of(const Operation& o, const Product& p) {
  uint64_t hash = 0xCBF29CE484222325ull;
  const auto take = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001B3ull; };
  for (const int64_t value :
       {int64_t{o.compute_type}, int64_t{p.transposed_a}, int64_t{p.transposed_b}, int64_t{o.epilogue}, int64_t{p.vector_type}})
    take(static_cast<uint64_t>(value));
  for (const Layout& l : {p.a, p.b, p.c, p.d}) {
    take(static_cast<uint64_t>(l.type)), take(static_cast<uint64_t>(l.row_major)), take(l.rows), take(l.columns);
    take(static_cast<uint64_t>(l.leading)), take(static_cast<uint64_t>(l.batches)), take(static_cast<uint64_t>(l.distance));
  }
  return hash;
}

/// Like the library, an algorithm that sums over K in parts wants a workspace: where K is long and D has few tiles, if it is allowed one.
size_t wanted_workspace(const Product& p, size_t most) {
  const int64_t tiles = (p.m() + 127) / 128 * ((p.n() + 127) / 128) * p.d.batches;
  const size_t part = static_cast<size_t>(p.m() * p.n() * p.d.batches) * (p.d.type == CUDA_R_64F ? 8 : 4);
  return tiles < 132 && p.k() >= 256 && 2 * part <= most ? 2 * part : 0;
}

Algorithm choose(const Operation& o, const Product& p, const Preference& preference) {
  Algorithm out{hash_of(o, p), wanted_workspace(p, preference.workspace), {}, alignment_of(p.vector, 16), 0};
  const Layout* const layouts[] = {&p.a, &p.b, &p.c, &p.d};
  for (int i = 0; i < 4; ++i) {
    const uint32_t alignment = preference.alignment[i];
    require(alignment > 0 && (alignment & (alignment - 1)) == 0, kInvalid, "a minimum alignment of ", alignment, " bytes");
    require(alignment >= size_of(layouts[i]->type), kUnsupported, "a minimum alignment of ", alignment, " bytes, less than an element");
    out.alignment[i] = std::min(alignment, 256u);
  }
  return out;
}

// --- memory -----------------------------------------------------------------------------------------------------------------------

void check_memory(const char* name, const void* data, size_t bytes, uint32_t alignment) {
  require(data != nullptr, kInvalid, name, " is null");
  require(reinterpret_cast<uintptr_t>(data) % alignment == 0, kInvalid, name, " at ", data, " is not aligned to the ", alignment,
          " bytes that the algorithm was chosen for");
  require(allocated_on_device(data, bytes), CUBLAS_STATUS_EXECUTION_FAILED, name, ": ", bytes, " bytes from ", data,
          on_device(data, 1) ? " are not all allocated" : " are not on the device");
}

void check_matrix(const char* name, const Layout& layout, const void* data, uint32_t alignment) {
  const int64_t last = layout.at(layout.batches - 1, static_cast<int64_t>(layout.rows) - 1, static_cast<int64_t>(layout.columns) - 1);
  check_memory(name, data, static_cast<size_t>(last + 1) * size_of(layout.type), alignment);
}

void check_operands(const Product& p, const Algorithm& algorithm) {
  check_matrix("A", p.a, p.a_data, algorithm.alignment[0]);
  check_matrix("B", p.b, p.b_data, algorithm.alignment[1]);
  if (p.beta != 0) check_matrix("C", p.c, p.c_data, algorithm.alignment[2]);
  check_matrix("D", p.d, p.d_data, algorithm.alignment[3]);
  if (p.c_data == p.d_data)
    require(p.c.leading == p.d.leading && p.c.distance == p.d.distance, kInvalid, "C and D are one matrix in two layouts");
  else
    require(p.beta == 0 || !overlap(p.d, p.d_data, p.c, p.c_data), kInvalid, "D overlaps C");
  require(!overlap(p.d, p.d_data, p.a, p.a_data), kInvalid, "D overlaps A");
  require(!overlap(p.d, p.d_data, p.b, p.b_data), kInvalid, "D overlaps B");
  if (p.epilogue == Epilogue::none) return;
  const int64_t length = p.epilogue == Epilogue::sums_of_b ? p.n() : p.m();
  const size_t bytes = static_cast<size_t>(length + (p.d.batches - 1) * p.vector_distance) * size_of(p.vector_type);
  check_memory("the bias", p.vector, bytes, std::max<uint32_t>(algorithm.vector_alignment, static_cast<uint32_t>(size_of(p.vector_type))));
}

double scalar(const Operation& o, const void* value) {
  require(value != nullptr, kInvalid, "alpha or beta is null");
  require(o.pointer_mode == CUBLASLT_POINTER_MODE_HOST || o.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE, kUnsupported, "pointer mode ",
          o.pointer_mode);
  const bool device = o.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
  require(device == on_device(value, 1), kInvalid, "alpha or beta is not where the pointer mode says");
  const DeviceAccess access;
  return o.scale_type == CUDA_R_64F ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
}

}  // namespace

const std::string& why_refused() { return reason; }

std::array<AlgorithmUse, kAlgorithms> algorithm_uses;
EpilogueUse epilogue_use;

}  // namespace mesa::emulation

using namespace mesa::emulation;

extern "C" {

// --- products ---------------------------------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
                                              int* count) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  return answer("cublasLtMatmulAlgoGetHeuristic", [&] {
    require(wanted > 0 && results != nullptr && count != nullptr && preference != nullptr, kInvalid,
            "no place for results, or no preference");
    *count = 0;
    const Product p = described(operation, a, b, c, d);
    Algorithm chosen = choose(operation_of(operation), p, preference_of(preference));
    // In the library some of those that sum in parts round the parts, if nothing is said against it.
    const uint32_t schemes = preference_of(preference).reduction_schemes;
    require(chosen.workspace == 0 || p.d.type != CUDA_R_16BF || !(schemes & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE), kInvalid,
            "parts of a sum may be rounded to bf16");
    require(chosen.workspace == 0 || !(schemes & CUBLASLT_REDUCTION_SCHEME_INPLACE), kInvalid, "parts of a sum may be added in any order");
    const int suggested = p.epilogue == Epilogue::none ? kAlgorithms : epilogue_use.algorithms;
    for (; *count < std::min(wanted, suggested); ++*count) {
      chosen.number = static_cast<uint32_t>(*count);
      results[*count] = {};
      std::memcpy(&results[*count].algo, &chosen, sizeof chosen);
      results[*count].workspaceSize = chosen.workspace;
      results[*count].state = CUBLAS_STATUS_SUCCESS;
      results[*count].wavesCount = p.epilogue == Epilogue::none ? 1 : epilogue_use.waves;
    }
  });
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo, cublasLtMatmulAlgoConfigAttributes_t name,
                                                    void* value, size_t bytes, size_t* written) {
  return answer("cublasLtMatmulAlgoConfigGetAttribute", [&] {
    require(algo != nullptr && value != nullptr && bytes == sizeof(int32_t), kInvalid, "no algorithm, or no place for an int32_t");
    Algorithm given;
    std::memcpy(&given, algo, sizeof given);
    const AlgorithmUse& use = algorithm_uses[given.number % kAlgorithms];
    const std::map<int, int> values{{CUBLASLT_ALGO_CONFIG_ID, use.configuration},
                                    {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, use.parts},
                                    {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, use.reduction_scheme}};
    require(values.count(name) == 1, kUnsupported, "attribute ", int{name});
    const int32_t answer = values.at(name);
    std::memcpy(value, &answer, sizeof answer);
    if (written != nullptr) *written = sizeof answer;
  });
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* result) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  return answer("cublasLtMatmulAlgoCheck", [&] {
    require(algo != nullptr && result != nullptr, kInvalid, "no algorithm, or no place for the result");
    const Product p = described(operation, a, b, c, d);
    Algorithm given;
    std::memcpy(&given, algo, sizeof given);
    require(given.product == hash_of(operation_of(operation), p) && given.number < kAlgorithms, kUnsupported,
            "the algorithm was chosen for another product");
    *result = {};  // but for its algorithm, which the library leaves as it is
    result->workspaceSize = given.workspace;
    result->state = CUBLAS_STATUS_SUCCESS;
  });
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a_data,
                              cublasLtMatrixLayout_t a, const void* b_data, cublasLtMatrixLayout_t b, const void* beta, const void* c_data,
                              cublasLtMatrixLayout_t c, void* d_data, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  return answer("cublasLtMatmul", [&] {
    Product p = described(operation, a, b, c, d);
    const Operation& o = operation_of(operation);
    Preference preference = fresh_preference();  // without an algorithm the library chooses one for these very operands
    preference.workspace = workspace_bytes;
    const void* const data[] = {a_data, b_data, c_data, d_data};
    for (int i = 0; i < 4; ++i) preference.alignment[i] = alignment_of(data[i], 256);
    Algorithm algorithm = choose(o, p, preference);
    if (algo != nullptr) {
      const uint64_t wanted = algorithm.product;
      std::memcpy(&algorithm, algo, sizeof algorithm);
      require(algorithm.product == wanted, kInvalid, "the algorithm was chosen for another product");
    }
    p.alpha = scalar(o, alpha), p.beta = scalar(o, beta);
    p.a_data = a_data, p.b_data = b_data, p.c_data = c_data, p.d_data = d_data;
    check_operands(p, algorithm);
    require(workspace_bytes >= algorithm.workspace, kInvalid, "a workspace of ", workspace_bytes, " bytes; the algorithm needs ",
            algorithm.workspace);
    if (workspace_bytes > 0) check_memory("the workspace", workspace, workspace_bytes, 256);
    AlgorithmUse& use = algorithm_uses[algorithm.number];
    ++use.runs;
    require(!use.fails, kUnsupported, "the algorithm is out of order");
    const auto delay = use.delay + (p.epilogue == Epilogue::none ? std::chrono::microseconds(0) : epilogue_use.delay);
    const auto work = [p, workspace, bytes = algorithm.workspace, delay] {
      const DeviceAccess access;
      pass(delay);
      multiply(p);
      if (bytes > 0) std::memset(workspace, 0xff, bytes);  // whoever keeps something there shall notice
    };
    if (record(work)) return;
    finish_stream(stream);
    work();
  });
}

}  // extern "C"
