// What every communicator must do, checked on each of its ranks.
#pragma once
#include <catch2/catch.hpp>

#include "mesa/dist/communicator.h"

namespace mesa::testing {

/// 1 + i + 1000 rank, which sums to n + n i + 500 n (n - 1).
template <class T>
Tensor numbers(int64_t count, int64_t rank, Device device) {
  std::vector<T> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<T>(1 + i % 1000 + 1000 * rank);
  return to(Tensor::from<T>({count}, values), device);
}
template <class T>
T sum_at(int64_t i, int64_t n) {
  return static_cast<T>(n + n * (i % 1000) + 500 * n * (n - 1));
}

template <class T>
void check_collectives(Communicator& comm, DType dtype, int64_t count) {
  const int64_t n = comm.size(), rank = comm.rank();
  const Device device = comm.device();
  CAPTURE(to_string(dtype), count, n, rank);
  const Tensor sum = numbers<T>(count, rank, device), whole = numbers<T>(count * n, rank, device);
  const Tensor part = Tensor::empty({count}, dtype, device), shared = numbers<T>(count, rank, device);
  const Tensor places = Tensor::zeros({n, count}, dtype);
  for (int64_t i = 0; i < count; ++i) places.select(0, rank).template data<T>()[i] = static_cast<T>(rank * 7 + i % 100);
  const Tensor gathered = to(places, device), own = gathered.select(0, rank);
  const Tensor again = numbers<T>(count * n, rank, device), own_place = again.narrow(0, rank * count, count);
  comm.all_reduce(sum);  // all begin before the first is waited for
  comm.reduce_scatter(whole, part);
  comm.reduce_scatter(again, own_place);
  comm.all_gather(own, gathered);
  comm.broadcast(shared, n - 1);
  comm.finish();
  const Tensor sums = to(sum, kCpu), parts = to(part, kCpu), in_place = to(own_place, kCpu), shares = to(shared, kCpu),
               all = to(gathered, kCpu);
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    wrong += sums.data<T>()[i] != sum_at<T>(i, n);
    wrong += parts.data<T>()[i] != sum_at<T>(rank * count + i, n);
    wrong += in_place.data<T>()[i] != sum_at<T>(rank * count + i, n);
    wrong += shares.data<T>()[i] != static_cast<T>(1 + i % 1000 + 1000 * (n - 1));
    for (int64_t r = 0; r < n; ++r) wrong += all.data<T>()[r * count + i] != static_cast<T>(r * 7 + i % 100);
  }
  CHECK(wrong == 0);
}

/// Small numbers, whose sums bf16 holds exactly, and one that it rounds.
inline void check_bf16(Communicator& comm, int64_t count) {
  const int64_t n = comm.size();
  const Tensor mine = Tensor::empty({n, count}, DType::bf16);
  for (int64_t i = 0; i < n * count; ++i) mine.data<bf16>()[i] = bf16(static_cast<float>(comm.rank() + i % 16));
  const Tensor x = Tensor::empty(mine.shape(), DType::bf16, comm.device()), sum = Tensor::empty(mine.shape(), DType::bf16, comm.device());
  transfer(mine, x), transfer(mine, sum);
  const Tensor part = x.select(0, comm.rank());
  const Tensor odd = to(Tensor::from<bf16>({1}, {bf16(comm.rank() == 0 ? 256.0f : 1.0f)}), comm.device());
  comm.all_reduce(sum);
  comm.reduce_scatter(x, part);
  comm.all_reduce(odd);
  comm.finish();
  const Tensor sums = to(sum, kCpu), own = to(part, kCpu), rounded = to(odd, kCpu);
  int64_t wrong = 0;
  const auto want = [&](int64_t i) { return static_cast<float>(n * (n - 1) / 2 + n * (i % 16)); };
  for (int64_t i = 0; i < n * count; ++i) wrong += float(sums.data<bf16>()[i]) != want(i);
  for (int64_t i = 0; i < count; ++i) wrong += float(own.data<bf16>()[i]) != want(comm.rank() * count + i);
  CHECK(wrong == 0);
  CHECK(float(rounded.data<bf16>()[0]) >= 256);  // 257 is 256 in bf16
  CHECK(float(rounded.data<bf16>()[0]) <= 260);
}

}  // namespace mesa::testing
