// Which of NVIDIA's libraries this process has found: what is fast in one version may be slow in another.
#include <cublasLt.h>

#include "mesa/base/cuda.h"
#include "mesa/base/error.h"

namespace mesa::kernels::cuda::cudnn {
[[gnu::weak]] std::string version();  // cudnn_graph.cpp; not in a build without cuDNN
}

std::string mesa::cuda::libraries() {
  const size_t v = cublasLtGetVersion();  // 130100
  return concat("cuBLAS ", v / 10000, ".", v / 100 % 100, ".", v % 100, ", cuDNN ",
                kernels::cuda::cudnn::version ? kernels::cuda::cudnn::version() : "not built");
}
