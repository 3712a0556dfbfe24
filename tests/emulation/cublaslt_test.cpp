// The emulated cuBLASLt against double loops.
#include "cublaslt_fixture.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("emulated cuBLASLt: products of every type, transposition, order and batch against a loop", "[emulation]") {
  for (const Kind& kind : kKinds)
    for (const Shape& shape : {Shape{1, 1, 1}, Shape{5, 3, 7}, Shape{40, 70, 33}})
      for (const cublasOperation_t op_a : {CUBLAS_OP_N, CUBLAS_OP_T})
        for (const cublasOperation_t op_b : {CUBLAS_OP_N, CUBLAS_OP_T})
          for (const int32_t order : {CUBLASLT_ORDER_COL, CUBLASLT_ORDER_ROW})
            for (const int32_t batches : {1, 3}) {
              CAPTURE(kind.in, kind.out, shape.m, shape.n, shape.k, op_a, op_b, order, batches);
              Example e(kind, shape, op_a, op_b, order, batches, shape.m % 2 == 0 ? 2 : 0);
              e.call.alpha = 0.5, e.call.beta = batches == 1 ? 0 : -0.25;
              const std::string text = e.call.go();
              CAPTURE(text);
              REQUIRE(e.call.chosen == CUBLAS_STATUS_SUCCESS);
              REQUIRE(e.call.run == CUBLAS_STATUS_SUCCESS);
              check_close(e.c_array.get(), e.want(), kind.tolerance);
            }
}

TEST_CASE("emulated cuBLASLt: a bias for each row, and sums of the inputs", "[emulation]") {
  for (const Kind& kind : kKinds)
    for (const cublasOperation_t op_a : {CUBLAS_OP_N, CUBLAS_OP_T})
      for (const cublasOperation_t op_b : {CUBLAS_OP_N, CUBLAS_OP_T})
        for (const uint32_t epilogue : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
          CAPTURE(kind.in, kind.out, op_a, op_b, epilogue);
          Example e(kind, {6, 10, 9}, op_a, op_b, CUBLASLT_ORDER_COL, 1, 0);
          e.call.epilogue = epilogue, e.call.beta = 1;
          e.call.vector = e.vector.data(), e.call.vector_type = epilogue == CUBLASLT_EPILOGUE_BIAS ? kind.out : -1;
          const std::string text = e.call.go();
          if (kind.out == CUDA_R_64F && epilogue != CUBLASLT_EPILOGUE_BIAS) {
            CHECK(e.call.chosen == CUBLAS_STATUS_NOT_SUPPORTED);
            continue;
          }
          REQUIRE(e.call.run == CUBLAS_STATUS_SUCCESS);
          check_close(e.c_array.get(), e.want(), kind.tolerance);
          std::vector<double> want = e.bias;
          if (epilogue == CUBLASLT_EPILOGUE_BGRADA)
            for (uint64_t i = 0; i < 6; ++i) {
              want[i] = 0;
              for (uint64_t l = 0; l < 9; ++l) want[i] += op(e.a, e.call.a, op_a, 0, i, l);
            }
          if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
            for (uint64_t j = 0; j < 10; ++j) {
              want[j] = 0;
              for (uint64_t l = 0; l < 9; ++l) want[j] += op(e.b, e.call.b, op_b, 0, l, j);
            }
          check_close(e.vector.get(), want, kind.tolerance);
        }
}

TEST_CASE("emulated cuBLASLt: a result beside C, one bias for each matrix, a broadcast operand", "[emulation]") {
  Example e(kKinds[2], {4, 5, 6}, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_ORDER_COL, 2, 0);
  const Array d(CUDA_R_32F, e.c), two_biases(CUDA_R_32F, numbers(8, 9));
  e.call.d_data = d.data();
  e.call.beta = 2;
  e.call.b.distance = 0;
  e.call.epilogue = CUBLASLT_EPILOGUE_BIAS, e.call.vector = two_biases.data(), e.call.vector_distance = 4;
  e.call.go();
  REQUIRE(e.call.run == CUBLAS_STATUS_SUCCESS);
  std::vector<double> want = e.want();
  for (int batch = 0; batch < 2; ++batch)
    for (uint64_t i = 0; i < 4; ++i)
      for (uint64_t j = 0; j < 5; ++j) want[e.call.d.at(batch, i, j)] += two_biases.get()[batch * 4 + i] - e.bias[i];
  check_close(d.get(), want, 1e-6);
  check_close(e.c_array.get(), e.c, 0);
}

TEST_CASE("emulated cuBLASLt: without beta the old result does not count, not even as NaN", "[emulation]") {
  Example e;
  const Array d(CUDA_R_32F, std::vector<double>(e.c.size(), NAN));
  e.call.d_data = d.data(), e.call.c_data = nullptr;
  e.call.go();
  REQUIRE(e.call.run == CUBLAS_STATUS_SUCCESS);
  check_close(d.get(), e.want(), 1e-6);
}

TEST_CASE("emulated cuBLASLt: an algorithm may want a workspace, and spoils it", "[emulation]") {
  Example e(kKinds[0], {16, 16, 1024});
  e.call.most_workspace = 32 << 20;
  SECTION("as much as it asked for") {
    e.call.between = [](Call& call) {
      CHECK(call.workspace == 2048);
      CHECK(cudaMemset(call.workspace_data, 0, call.workspace) == cudaSuccess);
    };
    e.call.go();
    REQUIRE(e.call.run == CUBLAS_STATUS_SUCCESS);
    check_close(e.c_array.get(), e.want(), 1e-5);
  }
  SECTION("less") {
    e.call.between = [](Call& call) { call.workspace -= 1; };
    CHECK_THAT(e.call.go(), Contains("a workspace of 2047 bytes; the algorithm needs 2048"));
    CHECK(e.call.run == CUBLAS_STATUS_INVALID_VALUE);
  }
  SECTION("not aligned") {
    e.call.between = [](Call& call) { call.workspace_data = static_cast<char*>(call.workspace_data) + 16; };
    CHECK_THAT(e.call.go(), Contains("the workspace at") && Contains("256 bytes"));
    CHECK(e.call.run == CUBLAS_STATUS_INVALID_VALUE);
  }
  SECTION("sums of parts in any order") {
    e.call.reduction_schemes |= CUBLASLT_REDUCTION_SCHEME_INPLACE;
    CHECK_THAT(e.call.go(), Contains("in any order"));
    CHECK(e.call.chosen == CUBLAS_STATUS_INVALID_VALUE);
  }
  SECTION("none allowed, none asked for") {
    e.call.most_workspace = 0;
    e.call.between = [](Call& call) { CHECK(call.workspace == 0); };
    e.call.go();
    CHECK(e.call.run == CUBLAS_STATUS_SUCCESS);
  }
}
