// The emulated GPU itself: what its threads, warps and blocks do, and that it notices what a GPU would suffer in silence.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "device_primitives.h"
#include "emulated.h"
#include "support/errors.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using namespace mesa::kernels::cuda;
using Catch::Matchers::Contains;

namespace {

constexpr unsigned kAll = 0xffffffffu;

/// Runs the rest of a test in another order of threads and blocks.
struct InOrder {
  explicit InOrder(emulation::Order order) { emulation::set_order(order); }
  ~InOrder() { emulation::set_order(emulation::Order::forward); }
};
constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::reverse, emulation::Order::shuffled};

__global__ void name_threads(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}

/// out[b] = the sum of block b's 256 values, by way of shared memory, in a tree.
__global__ void tree_sums(const int* x, int* out) {
  __shared__ int part[256];
  const int t = threadIdx.x;
  part[t] = x[blockIdx.x * 256 + t];
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

__global__ void unsynchronized(int* out) {  // a barrier is missing
  __shared__ int value[64];
  value[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  out[threadIdx.x] = value[63 - threadIdx.x];
}

__global__ void shuffles(int* indexed, int* swapped, int* down, int* up, int width) {
  const int t = threadIdx.x;
  indexed[t] = __shfl_sync(kAll, t, 5, width);
  swapped[t] = __shfl_xor_sync(kAll, t, 4, width);
  down[t] = __shfl_down_sync(kAll, t, 3, width);
  up[t] = __shfl_up_sync(kAll, t, 3, width);
}

struct Total {
  float operator()(float a, float b) const { return a + b; }
};
struct Least {
  float operator()(float a, float b) const { return b < a ? b : a; }
};
template <int width, class F>
float by_shuffles(float value, F f) {
  for (int distance = width / 2; distance > 0; distance /= 2) value = f(value, __shfl_xor_sync(kAll, value, distance));
  return value;
}
/// Ten results for each thread: over groups of 32 to 2 lanes, the sum and the least.
__global__ void reductions(const float* x, float* once, float* shuffled) {
  const int t = threadIdx.x;
  const auto of = [&]<int width>(int k) {
    once[t * 10 + k] = warp_reduce<width>(x[t], Total{}), once[t * 10 + k + 1] = warp_reduce<width>(x[t], Least{});
    shuffled[t * 10 + k] = by_shuffles<width>(x[t], Total{}), shuffled[t * 10 + k + 1] = by_shuffles<width>(x[t], Least{});
  };
  of.template operator()<32>(0);
  of.template operator()<16>(2);
  of.template operator()<8>(4);
  of.template operator()<4>(6);
  of.template operator()<2>(8);
}

__global__ void votes(unsigned* out) {
  const int t = threadIdx.x;
  const unsigned odd = __ballot_sync(kAll, t % 2);
  const unsigned low = t < 16 ? __ballot_sync(0xffffu, t < 3) : __ballot_sync(0xffff0000u, t > 30);
  if (t == 0) out[0] = odd, out[1] = low, out[2] = __any_sync(1u, 0), out[3] = __all_sync(1u, 1);
  if (t == 31) out[4] = low;
}

__global__ void count(unsigned* total, int* least, int* most, unsigned long long* wide, unsigned* bits) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(total, 1u);
  atomicMin(least, 7 - i);
  atomicMax(most, i);
  atomicAdd(wide, 1ull << 32);
  atomicOr(bits, 1u << i % 32);
}

}  // namespace

TEST_CASE("emulation: every thread of every block runs once, in any order", "[emulation]") {
  for (const emulation::Order order : kOrders) {
    const InOrder in(order);
    const OnDevice<int> out(std::vector<int>(6 * 24));
    std::vector<int> want(6 * 24);
    for (int b = 0; b < 6; ++b)
      for (int t = 0; t < 24; ++t) want[b * 24 + t] = b * 1000 + t;
    const std::map<std::string, int64_t> before = emulation::launches();
    launch("name_threads", &name_threads, dim3(1, 2, 3), dim3(2, 3, 4), 0, out.data());
    CHECK(out.get() == want);
    std::map<std::string, int64_t> after = before;
    ++after["name_threads"];
    CHECK(emulation::launches() == after);
  }
}

TEST_CASE("emulation: barriers order what threads of a block share", "[emulation]") {
  std::vector<int> values(1024);
  std::iota(values.begin(), values.end(), 0);
  const OnDevice<int> x(values), out{0, 0, 0, 0};
  for (const emulation::Order order : kOrders) {
    const InOrder in(order);
    launch("tree_sums", &tree_sums, 4, 256, 0, x.data(), out.data());
    for (int b = 0; b < 4; ++b) CHECK(out.get()[b] == 256 * (256 * b) + 255 * 128);
  }
}

TEST_CASE("emulation: a missing barrier shows in another order", "[emulation]") {
  const OnDevice<int> forward(std::vector<int>(64)), reverse(std::vector<int>(64));
  launch("unsynchronized", &unsynchronized, 1, 64, 0, forward.data());
  {
    const InOrder in(emulation::Order::reverse);
    launch("unsynchronized", &unsynchronized, 1, 64, 0, reverse.data());
  }
  CHECK(forward.get() != reverse.get());
}

TEST_CASE("emulation: the four shuffles keep to their groups of lanes", "[emulation]") {
  const std::vector<int> zeros(32);
  const OnDevice<int> indexed(zeros), swapped(zeros), down(zeros), up(zeros);
  for (const int width : {32, 16, 8, 4}) {
    launch("shuffles", &shuffles, 1, 32, 0, indexed.data(), swapped.data(), down.data(), up.data(), width);
    for (int t = 0; t < 32; ++t) {
      const int group = t / width * width, end = group + width;
      CAPTURE(width, t);
      CHECK(indexed.get()[t] == group + 5 % width);
      CHECK(swapped.get()[t] == ((t ^ 4) < end ? t ^ 4 : t));  // an earlier group is within reach, a later one is not
      CHECK(down.get()[t] == (t + 3 < end ? t + 3 : t));
      CHECK(up.get()[t] == (t - 3 >= group ? t - 3 : t));
    }
  }
}

TEST_CASE("emulation: a reduction in which the lanes meet once is that by shuffles, bit for bit", "[emulation]") {
  const std::vector<double> normal = normal_values(64, "x");
  std::vector<float> values(normal.begin(), normal.end());
  values[7] = std::numeric_limits<float>::quiet_NaN(), values[40] = -0.0f, values[41] = 0.0f;
  const OnDevice<float> x(values), once(std::vector<float>(10 * 64)), shuffled(std::vector<float>(10 * 64));
  launch("reductions", &reductions, 1, 64, 0, x.data(), once.data(), shuffled.data());
  const std::vector<float> got = once.get(), want = shuffled.get();
  CHECK(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0);
  CHECK((std::isnan(got[0]) && got[320] == got[630] && got[324] == got[394] && got[324] != got[404]));  // of all lanes, of groups of 8
}

TEST_CASE("emulation: votes of whole and of parted warps", "[emulation]") {
  const OnDevice<unsigned> out{0, 0, 0, 0, 0};
  launch("votes", &votes, 1, 32, 0, out.data());
  CHECK(out.get() == std::vector<unsigned>{0xaaaaaaaau, 7u, 0u, 1u, 0x80000000u});
}

TEST_CASE("emulation: atomics of all blocks meet", "[emulation]") {
  const OnDevice<unsigned> total{0}, bits{0};
  const OnDevice<int> least{100}, most{-1};
  const OnDevice<unsigned long long> wide{0};
  launch("count", &count, 4, 32, 0, total.data(), least.data(), most.data(), wide.data(), bits.data());
  CHECK(total.get()[0] == 128);
  CHECK(least.get()[0] == 7 - 127);
  CHECK(most.get()[0] == 127);
  CHECK(wide.get()[0] == 128ull << 32);
  CHECK(bits.get()[0] == kAll);
}

// --- dynamic shared memory and what the tensor cores need ---------------------------------------------------------------------------

namespace {

__global__ void reverse_shared(const float* x, float* out, int n) {
  float* const shared = dynamic_shared<float>();
  const bool fresh = shared[threadIdx.x] != shared[threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = fresh ? shared[n - 1 - static_cast<int>(threadIdx.x)] : -1;
}

/// One warp: out [16, 8] = a [16, 16] b [16, 8] + 1, b given as [8, 16].
__global__ void one_product(const bf16* a, const bf16* b, float* out) {
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
  const auto pair = [](const bf16* p) { return p[0].bits | static_cast<uint32_t>(p[1].bits) << 16; };
  const uint32_t left[4] = {pair(a + row * 16 + column), pair(a + (row + 8) * 16 + column), pair(a + row * 16 + column + 8),
                            pair(a + (row + 8) * 16 + column + 8)};
  const uint32_t right[2] = {pair(b + row * 16 + column), pair(b + row * 16 + column + 8)};
  float d[4] = {1, 1, 1, 1};
  mma_bf16(d, left, right);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}

/// The same through ldmatrix, from shared memory filled by cp.async; b is [16, 8] here and transposed while it is loaded.
__global__ void one_product_from_shared(const bf16* a, const bf16* b, float* out, bool wait) {
  bf16* const shared = dynamic_shared<bf16>();  // a [16, 16], b [16, 8]
  const int lane = threadIdx.x;
  copy_async_16(shared + lane * 8, a + lane * 8);
  if (lane < 16) copy_async_16(shared + 256 + lane * 8, b + lane * 8);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, shared + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4_transposed(right, shared + 256 + lane % 16 * 8);
  float d[4] = {1, 1, 1, 1};
  mma_bf16(d, left, {right[0], right[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct Product {
  std::vector<bf16> left = std::vector<bf16>(256), right = std::vector<bf16>(128), right_transposed = std::vector<bf16>(128);
  std::vector<float> want = std::vector<float>(128, 1.0f);
  Product() {
    for (int i = 0; i < 256; ++i) left[i] = bf16(static_cast<float>(i * 7 % 23 - 11));  // small integers: exact sums
    for (int i = 0; i < 128; ++i) right[i] = bf16(static_cast<float>(i * 5 % 17 - 8));
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) right_transposed[n * 16 + k] = right[k * 8 + n];
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n)
        for (int k = 0; k < 16; ++k) want[m * 8 + n] += left[m * 16 + k] * right[k * 8 + n];
  }
};

__global__ void two_groups(const int* x, int* out) {
  alignas(16) __shared__ int first[4], second[4];
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 4; ++i) first[i] = second[i] = -1;
  copy_async_16(first, x);
  copy_async_commit();
  copy_async_16(second, x + 4);
  copy_async_commit();
  copy_async_wait<1>();
  out[0] = first[3];
  out[1] = second[3];
  copy_async_wait<0>();
  out[2] = second[3];
}

}  // namespace

TEST_CASE("emulation: dynamic shared memory is fresh for each block", "[emulation]") {
  std::vector<float> values(96);
  std::iota(values.begin(), values.end(), 0.0f);
  const OnDevice<float> x(values), out(values);
  launch("reverse_shared", &reverse_shared, 3, 96, 96 * sizeof(float), x.data(), out.data(), 96);
  CHECK(out.get() == std::vector<float>(values.rbegin(), values.rend()));
}

TEST_CASE("emulation: mma_bf16 and both ldmatrix against a loop", "[emulation]") {
  const Product p;
  const OnDevice<bf16> a(p.left), b(p.right), b_transposed(p.right_transposed);
  const OnDevice<float> out(std::vector<float>(128));
  launch("one_product", &one_product, 1, 32, 0, a.data(), b_transposed.data(), out.data());
  CHECK(out.get() == p.want);
  launch("one_product_from_shared", &one_product_from_shared, 1, 32, 384 * sizeof(bf16), a.data(), b.data(), out.data(), true);
  CHECK(out.get() == p.want);
}

TEST_CASE("emulation: cp.async arrives when it is waited for, not before", "[emulation]") {
  const Product p;
  const OnDevice<bf16> a(p.left), b(p.right);
  const OnDevice<float> product(std::vector<float>(128));
  launch("one_product_from_shared", &one_product_from_shared, 1, 32, 384 * sizeof(bf16), a.data(), b.data(), product.data(), false);
  CHECK(std::isnan(product.get()[0]));
  const OnDevice<int> x{0, 1, 2, 3, 4, 5, 6, 7}, out{0, 0, 0};
  launch("two_groups", &two_groups, 1, 32, 0, x.data(), out.data());
  CHECK(out.get() == std::vector<int>{3, -1, 7});
}

// --- what goes wrong ----------------------------------------------------------------------------------------------------------------

namespace {

__global__ void half_at_barrier(int) {
  if (threadIdx.x < 32 || threadIdx.x == 63)
    __syncthreads();
  else
    __shfl_sync(kAll, 1, 0);
}
__global__ void leaves_before_barrier(int) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void two_barriers(int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void outside_mask(int) { __shfl_sync(0xffu, 1, 0); }
__global__ void from_outside_mask(int) {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
__global__ void from_lane_that_left(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), threadIdx.x < 7 ? 6 : 8);  // the others may go on without it
  __shfl_sync(kAll, 1, 7);
}
__global__ void two_operations(int) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __ballot_sync(kAll, 1);
}
__global__ void product_of_half_a_warp(int) {
  float d[4] = {};
  mma_bf16(d, {0, 0, 0, 0}, {0, 0});
}
__global__ void two_reductions(int) {
  if (threadIdx.x < 16)
    warp_reduce(1.0f, Total{});
  else
    warp_reduce<4>(1.0f, Least{});
}
__global__ void reduction_of_half_a_warp(int) { warp_reduce(1.0f, Total{}); }
__global__ void unaligned_copy(int* x) { copy_async_16(dynamic_shared<int>(), x + 1); }
__global__ void odd_width(int) { __shfl_xor_sync(kAll, 1, 1, 12); }
__global__ void throws(int) { check(threadIdx.x != 5, "five"); }
__global__ void starts_another(int) { launch("inner", &throws, 1, 1, 0, 0); }
__global__ void overwrites_shared(int) { dynamic_shared<char>()[100] = 1; }

template <class... P, class... A>
std::string error_in(void (*kernel)(P...), unsigned threads, size_t shared, A... a) {
  return error_of([&] { launch("kernel", kernel, dim3(2), dim3(threads), shared, a...); });
}

}  // namespace

TEST_CASE("emulation: barriers that not every thread reaches", "[emulation]") {
  CHECK_THAT(
      error_in(&half_at_barrier, 64, 0, 0),
      Contains(
          "kernel, block (0, 0, 0): deadlock: 31 of 64 threads wait in __shfl_sync, 33 of 64 threads wait in __syncthreads, 0 have left"));
  CHECK_THAT(error_in(&leaves_before_barrier, 64, 0, 0),
             Contains("63 of 64 threads wait in __syncthreads of line") && Contains("left the kernel"));
  CHECK_THAT(error_in(&two_barriers, 64, 0, 0),
             Contains("thread (32, 0, 0): waits in __syncthreads of line") && Contains("while 32 threads wait"));
}

TEST_CASE("emulation: warp operations that a GPU leaves undefined", "[emulation]") {
  CHECK_THAT(error_in(&outside_mask, 32, 0, 0), Contains("thread (8, 0, 0): takes part in __shfl_sync whose mask leaves it out"));
  CHECK_THAT(error_in(&from_outside_mask, 32, 0, 0), Contains("reads from a lane that takes no part in the shuffle"));
  const OnDevice<int> out(std::vector<int>(32, -1));
  std::vector<int> want(32, 8);
  std::fill(want.begin(), want.begin() + 7, 6);
  want[7] = -1;
  CHECK_THAT(error_in(&from_lane_that_left, 32, 0, out.data()), Contains("reads from a lane that takes no part in the shuffle"));
  CHECK(out.get() == want);
  CHECK_THAT(error_in(&two_operations, 32, 0, 0), Contains("is in __ballot_sync while other lanes wait for it in __syncwarp"));
  CHECK_THAT(error_in(&product_of_half_a_warp, 16, 0, 0), Contains("mma_bf16 needs all 32 lanes"));
  CHECK_THAT(error_in(&two_reductions, 32, 0, 0), Contains("is in another form of warp_reduce than lanes that wait for it"));
  CHECK_THAT(error_in(&reduction_of_half_a_warp, 16, 0, 0), Contains("warp_reduce of lanes that take no part in it"));
  CHECK_THAT(error_in(&odd_width, 32, 0, 0), Contains("width must be a power of two"));
  CHECK_THAT(error_in(&unaligned_copy, 1, 64, out.data()), Contains("cp.async of unaligned addresses"));
}

TEST_CASE("emulation: what a block cannot have", "[emulation]") {
  CHECK_THAT(error_in(&outside_mask, 1025, 0, 0), Contains("blocks of 1025 x 1 x 1 threads"));
  CHECK_THAT(error_in(&outside_mask, 0, 0, 0), Contains("blocks of 0 x 1 x 1 threads"));
  CHECK_THAT(error_in(&outside_mask, 32, (227 << 10) + 1, 0), Contains("232449 bytes of shared memory"));
  CHECK_THAT(error_of([] { launch("kernel", &throws, dim3(1, 65536), 32, 0, 0); }), Contains("a grid of 1 x 65536 x 1 blocks"));
  CHECK_THAT(error_in(&starts_another, 1, 0, 0), Contains("a kernel cannot start another"));
  CHECK_THAT(error_in(&throws, 32, 0, 0), Contains("thread (5, 0, 0): threw: five"));
}

TEST_CASE("emulation: a write beyond dynamic shared memory is noticed", "[emulation]") {
  const End end = end_of([] {
    if (error_in(&overwrites_shared, 1, 100, 0).find("wrote beyond its 100 bytes of dynamic shared memory") != std::string::npos)
      std::_Exit(3);
  });
#ifdef MESA_EMULATION_ASAN
  CHECK_THAT(end.err, Contains("AddressSanitizer: heap-buffer-overflow"));
#else
  CHECK(end.how == "exit 3");
#endif
}
