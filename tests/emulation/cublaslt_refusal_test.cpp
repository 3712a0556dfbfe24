// Each use of cuBLASLt that the library refuses, as the emulated one does.
#include "cublaslt_fixture.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

/// What is said when a good example is spoiled before an algorithm is chosen.
std::string refused(cublasStatus_t status, const std::function<void(Call&)>& spoil) {
  Example e;
  e.call.epilogue = CUBLASLT_EPILOGUE_BIAS, e.call.vector = e.vector.data();
  spoil(e.call);
  const std::string text = e.call.go();
  CAPTURE(text);
  CHECK(e.call.chosen == status);
  return text;
}
/// The same between the choice and its use.
std::string refused_later(cublasStatus_t status, const std::function<void(Call&)>& spoil) {
  Example e;
  e.call.epilogue = CUBLASLT_EPILOGUE_BIAS, e.call.vector = e.vector.data();
  e.call.between = spoil;
  const std::string text = e.call.go();
  CAPTURE(text);
  CHECK(e.call.chosen == CUBLAS_STATUS_SUCCESS);
  CHECK(e.call.run == status);
  check_close(e.c_array.get(), e.c, 0);
  return text;
}

constexpr cublasStatus_t kInvalid = CUBLAS_STATUS_INVALID_VALUE, kUnsupported = CUBLAS_STATUS_NOT_SUPPORTED;

}  // namespace

TEST_CASE("emulated cuBLASLt: descriptors that contradict each other", "[emulation]") {
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.a.columns = 5; }), Contains("op(A) is 8 x 5, op(B) is 4 x 12 and D is 8 x 12"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.op_b = CUBLAS_OP_T; }), Contains("op(B) is 12 x 4"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.a.leading = 7; }), Contains("A has a leading dimension of 7, but columns of 8 elements"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.b.order = CUBLASLT_ORDER_ROW; }),
             Contains("B has a leading dimension of 4, but rows of 12"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.d.rows = 0; }), Contains("D has 0 rows"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.c.columns = 11; }), Contains("C and D differ"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.c.type = CUDA_R_16BF; }), Contains("C and D differ"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.c.order = CUBLASLT_ORDER_ROW, c.c.leading = 12; }), Contains("C and D differ"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.a.batches = 2; }), Contains("batch counts of A, B and D: 2, 1, 1"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.a.batches = c.b.batches = c.c.batches = c.d.batches = 2; }), Contains("lie on each other"));
  CHECK_THAT(refused(kInvalid, [](Call& c) { c.alignment[1] = 12; }), Contains("a minimum alignment of 12 bytes"));
}

TEST_CASE("emulated cuBLASLt: what the library has no algorithm for", "[emulation]") {
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.a.type = CUDA_R_16BF; }), Contains("A is of type 14 and B of type 0"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.c.type = c.d.type = CUDA_R_16BF; }),
             Contains("inputs of type 0 and a result of type 14"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.compute = CUBLAS_COMPUTE_64F; }), Contains("scale type 0 with compute type 70"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.compute = CUBLAS_COMPUTE_16F; }), Contains("compute type 64"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.a.type = c.b.type = c.c.type = c.d.type = CUDA_R_16F; }), Contains("A is of type 2"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.epilogue = CUBLASLT_EPILOGUE_GELU; }), Contains("epilogue 32"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.vector_type = CUDA_R_16BF; }), Contains("a bias of type 14 beside a result of type 0"));
  CHECK_THAT(refused(kUnsupported,
                     [](Call& c) {
                       for (Matrix* m : {&c.a, &c.b, &c.c, &c.d})
                         m->order = CUBLASLT_ORDER_ROW, m->leading = static_cast<int64_t>(m->columns);
                     }),
             Contains("epilogue 4 with a row-major D"));
  CHECK_THAT(refused(kUnsupported, [](Call& c) { c.alignment[0] = 2; }), Contains("less than an element"));
  const Kind& bf16_result = kKinds[3];
  Example e(bf16_result);
  e.call.epilogue = CUBLASLT_EPILOGUE_BIAS, e.call.vector = e.vector.data(), e.call.vector_type = CUDA_R_32F;
  CHECK_THAT(e.call.go(), Contains("a bias of type 0 beside a result of type 14"));
  CHECK(e.call.chosen == kUnsupported);
}

TEST_CASE("emulated cuBLASLt: memory that does not fit", "[emulation]") {
  const auto moved = [](const void* p, int bytes) { return static_cast<const char*>(p) + bytes; };
  CHECK_THAT(refused_later(kInvalid, [&](Call& c) { c.a_data = moved(c.a_data, 4); }),
             Contains("A at") && Contains("not aligned to the 16 bytes"));
  CHECK_THAT(refused_later(kInvalid, [&](Call& c) { c.vector = const_cast<char*>(moved(c.vector, 4)); }), Contains("the bias at"));
  CHECK_THAT(refused_later(kInvalid, [](Call& c) { c.vector = nullptr; }), Contains("the bias is null"));
  CHECK_THAT(refused_later(kInvalid, [](Call& c) { c.b_data = nullptr; }), Contains("B is null"));
  CHECK_THAT(refused_later(CUBLAS_STATUS_EXECUTION_FAILED, [&](Call& c) { c.b_data = moved(c.b_data, 16); }),
             Contains("B: 192 bytes from") && Contains("not all allocated"));
  alignas(256) static float host[96];
  CHECK_THAT(refused_later(CUBLAS_STATUS_EXECUTION_FAILED, [&](Call& c) { c.a_data = host; }),
             Contains("A: 128 bytes from") && Contains("not on the device"));
  CHECK_THAT(refused_later(kInvalid,
                           [](Call& c) {
                             c.op_a = CUBLAS_OP_C;
                             c.a.rows = 4;
                             c.a.columns = 8;
                           }),
             Contains("chosen for another product"));
  Example packed(kKinds[0], {4, 4, 4});  // A and D side by side in one buffer, row by row
  const Array buffer(CUDA_R_32F, numbers(32, 5));
  packed.call.a_data = buffer.data(), packed.call.a.leading = 8;
  packed.call.d_data = buffer.data(4), packed.call.d.leading = 8;
  packed.call.go();
  CHECK(packed.call.run == CUBLAS_STATUS_SUCCESS);
  packed.call.d_data = buffer.data(2), packed.call.alignment[3] = 4;
  CHECK_THAT(packed.call.go(), Contains("D overlaps A"));
}

TEST_CASE("emulated cuBLASLt: attributes and their sizes", "[emulation]") {
  cublasLtMatmulDesc_t operation = nullptr;
  REQUIRE(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
  const int32_t transposed = CUBLAS_OP_T;
  CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) == CUBLAS_STATUS_SUCCESS);
  CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, 8) == kInvalid);
  CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, nullptr, 4) == kInvalid);
  int32_t value = -1;
  size_t written = 0;
  CHECK(cublasLtMatmulDescGetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &value, 4, &written) == CUBLAS_STATUS_SUCCESS);
  CHECK(value == CUBLAS_OP_T);
  CHECK(written == 4);
  CHECK(cublasLtMatmulDescGetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr, 0, &written) == CUBLAS_STATUS_SUCCESS);
  CHECK(written == 8);
  CHECK(cublasLtMatmulDescGetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &value, 4, nullptr) == CUBLAS_STATUS_SUCCESS);
  CHECK(value == -1);
  CHECK(cublasLtMatmulDescDestroy(operation) == CUBLAS_STATUS_SUCCESS);
  cublasLtMatrixLayout_t layout = nullptr;
  REQUIRE(cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, 2, 3, 2) == CUBLAS_STATUS_SUCCESS);
  uint64_t columns = 0;
  CHECK(cublasLtMatrixLayoutGetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &columns, 8, &written) == CUBLAS_STATUS_SUCCESS);
  CHECK(columns == 3);
  CHECK(cublasLtMatrixLayoutDestroy(layout) == CUBLAS_STATUS_SUCCESS);
  cublasLtMatmulPreference_t preference = nullptr;
  REQUIRE(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
  uint32_t alignment = 0;
  CHECK(cublasLtMatmulPreferenceGetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, 4, &written) ==
        CUBLAS_STATUS_SUCCESS);
  CHECK(alignment == 256);
  CHECK(cublasLtMatmulPreferenceDestroy(preference) == CUBLAS_STATUS_SUCCESS);
  cublasLtMatmulDescOpaque_t small{};
  CHECK(cublasLtMatmulDescInit_internal(&small, 8, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_ALLOC_FAILED);
  CHECK(std::string(cublasLtGetStatusString(kUnsupported)) == "the requested functionality is not supported");
  CHECK(cublasLtGetVersion() >= 130000);
}
