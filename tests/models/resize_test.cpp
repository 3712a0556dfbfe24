// Resized position embeddings against PyTorch's (tests/golden/generate.py).
#include "mesa/models/resize.h"

#include <catch2/catch.hpp>
#include <cstdio>

#include "mesa/train/safetensors.h"
#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("resize: bicubic grids are PyTorch's within 1e-5") {
  const SafetensorsFile file = read_safetensors(source_dir() + "/tests/golden/resize.safetensors");
  int seen = 0;
  for (const NamedTensor& t : file.tensors) {
    int from[2], to[2];
    if (std::sscanf(t.name.c_str(), "from/%dx%dto%dx%d", &from[0], &from[1], &to[0], &to[1]) != 4) continue;
    INFO(t.name);
    const Tensor got = resize_bicubic(t.tensor, from[0], from[1], to[0], to[1]);
    const Numbers want = file.find("to/" + t.name.substr(5))->to_vector<double>();
    REQUIRE(got.shape() == Shape{to[0] * to[1], 2});
    CHECK(largest_difference(got.to_vector<double>(), want) <= 1e-5);
    ++seen;
  }
  CHECK(seen == 6);
  CHECK_THAT(error_of([] {
               resize_bicubic(Tensor::zeros({6, 2}, DType::f32), 2, 2, 3, 3);
             }),
             Contains("cannot resize [6, 2] as a grid of 2 x 2"));
}
