#include "mesa/train/version.h"

#include "mesa/base/cuda.h"
#include "mesa/base/device.h"
#include "mesa/base/error.h"
#include "mesa/kernels/matmul.h"

namespace mesa {

namespace {

std::string cuda_text(bool of_gpu) {
  if (!cuda::built()) return "not built";
  const std::string built = "built for CUDA " + cuda::toolkit_version();
  if (!of_gpu) return built;
  return cuda::available() ? concat(cuda::describe_device(), ", ", cuda::libraries()) : concat(built, ", but ", cuda::unavailable());
}

}  // namespace

std::string version_text(bool of_gpu) {
#ifdef __clang__
  const std::string compiler = "Clang " __clang_version__;
#else
  const std::string compiler = "GCC " __VERSION__;
#endif
  const char* const bf16 = kernels::native_bf16() ? "native bf16" : "no native bf16";
  return concat("mesa ", MESA_VERSION, " (commit ", MESA_COMMIT, ")\ncompiler  ", compiler, "\ncpu       ", to_string(cpu_isa()), ", ",
                bf16, "\nmatmul    ", kernels::matmul_backend(), "\ncuda      ", cuda_text(of_gpu));
}

std::string version_number() { return MESA_VERSION; }
std::string version_date() { return MESA_DATE; }

}  // namespace mesa
