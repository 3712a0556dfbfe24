// Decoding: y = fma(q, step[g], offset[g]).
#include "codec_span.h"

namespace mesa::kernels::MESA_ISA {
namespace {

struct Job {
  const uint8_t* codes;
  GroupLayout layout;  // of groups, or of periods if the tables are by element
  int bits;
  const float *step, *offset;
};

inline void dequantize_run(const uint8_t* __restrict q, int64_t n, float step, float offset, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = dequantize_value(q[i], step, offset);
}

inline void dequantize_elements(const uint8_t* __restrict q, int64_t n, const float* __restrict step, const float* __restrict offset,
                                float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = dequantize_value(q[i], step[i], offset[i]);
}

template <bool by_element, class T>
void dequantize_chunk(const Job& job, int64_t begin, int64_t end, T* __restrict y) {
  alignas(64) float buffer[kPiece];
  alignas(64) CodeBuffer unpacked;
  for (int64_t from = begin; from < end; from += kPiece) {
    const int64_t n = std::min(kPiece, end - from);
    const uint8_t* q = job.codes + from * job.bits / 8;
    if (job.bits != 8) {
      unpack_codes(q, n, job.bits, unpacked);
      q = unpacked.byte;
    }
    float* out = buffer;
    if constexpr (std::is_same_v<T, float>) out = y + from;
    for_runs(job.layout, from, n, [&](int64_t g, int64_t within, int64_t first, int64_t count) {
      if constexpr (by_element) dequantize_elements(q + first, count, job.step + within, job.offset + within, out + first);
      else dequantize_run(q + first, count, job.step[g], job.offset[g], out + first);
    });
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t i = 0; i < n; ++i) y[from + i] = static_cast<T>(buffer[i]);
    }
  }
}

template <bool by_element>
void dequantize_all(const Job& job, const Tensor& y) {
  const int64_t n = y.numel(), chunks = (n + kChunk - 1) / kChunk;
  dispatch_float(y.dtype(), [&](auto tag) {
    auto* out = y.data<decltype(tag)>();
#pragma omp parallel for schedule(static) if (chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) dequantize_chunk<by_element>(job, c * kChunk, std::min(n, (c + 1) * kChunk), out);
  });
}

}  // namespace

void dequantize(const Tensor& codes, GroupLayout layout, int bits, const Tensor& step, const Tensor& offset, const Tensor& y) {
  check_layout(y, layout);
  check(y.is_contiguous(), "decoding writes contiguous tensors");
  const Job job{code_bytes(codes, y.numel(), bits), layout, bits, per_group(step, layout), per_group(offset, layout)};
  if (y.numel() == 0) return;
  if (!is_elementwise(layout)) return dequantize_all<false>(job, y);
  const GroupLayout walk = period_layout(layout);
  std::vector<float> steps(walk.inner), offsets(walk.inner);
  for (int64_t i = 0; i < walk.inner; ++i) {
    const int64_t g = i / layout.inner % layout.groups;
    steps[i] = job.step[g];
    offsets[i] = job.offset[g];
  }
  dequantize_all<true>({job.codes, walk, bits, steps.data(), offsets.data()}, y);
}

}  // namespace mesa::kernels::MESA_ISA
