// cuBLASLt as it is, not its stand-in: what Mesa calls of it is passed on. No GPU is needed for most of it.
#include <catch2/catch.hpp>

#include "../../kernels/cuda/cublaslt_plan.h"
#include "../../kernels/cuda/shared_library.h"
#include "mesa/base/cuda.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using namespace mesa::kernels::cuda;
using Catch::Matchers::Contains;

TEST_CASE("cublasLt: it is opened when it is first needed, and is said to be missing where it is") {
  const std::string missing = mesa::cuda::detail::find_products();
  if (!missing.empty()) {
    WARN(missing);
    CHECK_THAT(missing, Contains("cuBLAS was not found (libcublasLt.so.") && Contains("LD_LIBRARY_PATH"));
    return;
  }
  blas::Form form{};
  form.a = {DType::bf16, false, 64, 32, 32}, form.b = {DType::bf16, true, 48, 32, 32}, form.c = {DType::bf16, false, 64, 48, 48};
  form.batch = {3, 64 * 32, 32 * 48, 64 * 48};
  form.aligned = {256, 256, 256, 256};
  size_t algorithms = 1;
  const std::string error = error_of([&] { algorithms = blas::make_plan(form, nullptr, 1).algorithms.size(); });
  CHECK(algorithms == 1);
  if (mesa::cuda::available())
    CHECK(error == "");
  else if (!error.empty())  // no GPU, or one that Mesa has no use for: all else is described by then. In the library's own words
    CHECK_THAT(error, Contains("cublasLt: starting the library: ") && Contains("initialized"));
  CHECK_THAT(error_of([] { blas::check_status(CUBLAS_STATUS_NOT_SUPPORTED, "trying"); }),
             Contains("cublasLt: trying: ") && Contains("support"));
}

TEST_CASE("a library that is not there has no functions, and a reason") {
  const SharedLibrary none("libmesa-lacks-this.so.1");
  CHECK((none.handle == nullptr && none.find<int()>("anything") == nullptr));
  CHECK_THAT(none.why, Contains("libmesa-lacks-this.so.1"));
  const SharedLibrary libc("libc.so.6");
  CHECK((libc.why == "" && libc.find<int(const char*)>("atoi")("42") == 42 && libc.find<int()>("no_such_function") == nullptr));
}
