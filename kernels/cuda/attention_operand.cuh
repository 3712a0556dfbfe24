// How the fused attention reads its operands: heads of rows in global memory, given as bf16 values or as codes, become bf16 tiles in shared
// memory; and how it writes rows back.
#pragma once
#include "divider.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/codec_scalar.h"

namespace mesa::kernels::cuda {
namespace {

/// Rows of a tile in shared memory lie head + 8 elements apart: eight rows at one column then lie in different banks.
template <int head>
inline constexpr int kPitch = head + 8;

/// One of q, k, v, o and their gradients, [B, N or M, C], as the kernels see it.
struct Operand {
  bf16* values = nullptr;  ///< rows `stride` elements apart; null: codes
  int64_t stride = 0;

  const uint8_t* codes = nullptr;
  const float *step = nullptr, *offset = nullptr;
  int bits = 0;
  int64_t channels = 0;
  int64_t group_stride = 0;  ///< of rows, in the number that is divided into groups: 0 where each row has the same groups
  int64_t inner = 1, groups = 1;
  Divider by_inner, by_groups;
  bool wide = false;     ///< elements beyond the Divider's 2^31
  bool by_items = true;  ///< groups begin and end at multiples of kItem
};

/// Codes are decoded by runs of this many elements; heads are multiples of it.
inline constexpr int kItem = 16;

/// A tensor [batch, tokens, channels] whose rows can be moved 16 bytes at a time.
inline Operand values_operand(const Tensor& x, int64_t batch, int64_t tokens, int64_t channels, const char* what) {
  check(x.rank() == 3 && x.shape() == Shape({batch, tokens, channels}), "fused attention: ", what, " is ", x.shape(), ", not [", batch,
        ", ", tokens, ", ", channels, "]");
  check(x.has_uniform_rows(), "fused attention: the rows of ", what, " do not lie at one distance");
  Operand out;
  out.values = x.data<bf16>();
  out.stride = x.row_stride();
  check(out.stride % 8 == 0 && aligned(out.values, 16), "fused attention: the rows of ", what,
        " must begin at multiples of 16 bytes; they lie ", out.stride, " elements apart",
        aligned(out.values, 16) ? "" : ", the first elsewhere");
  return out;
}

inline Operand coded_operand(const Coded& x, int64_t batch, int64_t tokens, int64_t channels, const char* what) {
  const int64_t n = batch * tokens * channels;
  const GroupLayout& layout = x.layout;
  const int64_t whole = layout.outer * layout.groups * layout.inner;
  check(x.bits == 8 || x.bits == 4 || x.bits == 2, "codes have 8, 4 or 2 bits, not ", x.bits);
  check(layout.consecutive ? layout.outer == 1 && whole >= n && whole - layout.inner < n : whole == n, "fused attention: groups [",
        layout.outer, ", ", layout.groups, ", ", layout.inner, "] do not cover the ", n, " elements of ", what);
  check(x.codes.is_contiguous() && x.codes.numel() == n * x.bits / 8 && aligned(x.codes.raw(), 16), "fused attention: ", n, " codes of ",
        x.bits, " bits do not fill ", x.codes.shape(), " from a multiple of 16 bytes");
  for (const Tensor& t : {x.step, x.offset})
    check(t.is_contiguous() && t.numel() >= layout.groups, layout.groups, " groups need as many numbers, not ", t.shape());
  Operand out;
  out.codes = x.codes.data<uint8_t>();
  out.step = x.step.data<float>();
  out.offset = x.offset.data<float>();
  out.bits = x.bits;
  out.channels = channels;
  const bool rows_alike = layout.groups == 1 || channels % (layout.groups * layout.inner) == 0;
  out.group_stride = rows_alike ? 0 : channels;
  out.inner = layout.inner;
  out.groups = layout.groups;
  out.by_inner = Divider(layout.inner);
  out.by_groups = Divider(layout.groups);
  out.wide = !rows_alike && n >= int64_t{1} << 31;
  out.by_items = layout.groups == 1 || layout.inner % kItem == 0;
  return out;
}

/// Tokens that attend, and those that they attend to.
struct Tokens {
  int64_t queries, keys;
};

/// What blocks know of each token of a window must fit shared memory.
inline constexpr int64_t kMostWindowed = 1024;

/// The sizes of a call, checked.
struct Sizes {
  int64_t batch, channels, heads, head;
  Tokens image;
  int64_t sequences;  ///< that attend to keys of their own: images, or windows
  Tokens sequence;

  Operand queries(const AttentionOperand& x, const char* what) const { return operand(x, image.queries, what); }
  Operand keys(const AttentionOperand& x, const char* what) const { return operand(x, image.keys, what); }
  void check_lines(const Tensor& x, const char* what) const {
    check(x.is_contiguous() && x.numel() == sequences * heads * sequence.queries, "fused attention: ", what, " is ", x.shape(), ", not [",
          sequences, ", ", heads, ", ", sequence.queries, "]");
  }

 private:
  Operand operand(const AttentionOperand& x, int64_t tokens, const char* what) const {
    return x.values.defined() ? values_operand(x.values, batch, tokens, channels, what)
                              : coded_operand(x.coded, batch, tokens, channels, what);
  }
};

/// Of queries [B, N, C] and keys [B, M, C], or their gradients.
inline Sizes sizes_of(const Tensor& q, const Tensor& k, int64_t heads, double scale, const WindowBias& windows) {
  check(q.rank() == 3 && heads > 0 && q.dim(2) % heads == 0, "fused attention: ", heads, " heads in a tensor of shape ", q.shape());
  check(k.rank() == 3 && k.dim(1) > 0, "fused attention: no keys in a tensor of shape ", k.shape());
  const Tokens image{q.dim(1), k.dim(1)};
  Sizes n{q.dim(0), q.dim(2), heads, q.dim(2) / heads, image, q.dim(0), image};
  check(n.head == 32 || n.head == 64, "fused attention: heads of 32 or 64 channels, not ", n.head);
  if (windows.defined()) {
    windows.windows.validate(image.queries);
    check(image.keys == image.queries, "fused attention in windows: ", image.queries, " queries and ", image.keys, " keys");
    check(n.head == 32, "fused attention in windows: heads of 32 channels, not ", n.head);
    check(windows.table.is_contiguous() && windows.table.shape() == Shape({windows.windows.distances(), heads}),
          "fused attention: a table of biases ", windows.table.shape());
    n.sequences *= windows.windows.count();
    const int64_t length = windows.windows.length();
    check(length <= kMostWindowed, "fused attention: at most ", kMostWindowed, " tokens in a window, not ", length);
    n.sequence = {length, length};
  }
  check(scale > 0, "fused attention: the scale is ", scale, " but must be positive");
  return n;
}

// --- tiles ------------------------------------------------------------------------------------------------------------------------

__device__ inline int64_t group_of(const Operand& x, int64_t element) {
  if (x.wide) return element / x.inner % x.groups;
  return x.by_groups.remainder(x.by_inner.quotient(static_cast<uint32_t>(element)));
}

/// 16 codes of one group as they are read, with what decodes them.
struct Item {
  uint32_t words[4];  ///< as many as the codes take
  float step, offset;
};
__device__ inline Item fetch_item(const Operand& x, int row, int column) {
  const uint8_t* codes = x.codes + (static_cast<int64_t>(row) * x.channels + column) * x.bits / 8;
  const int64_t group = group_of(x, row * x.group_stride + column);
  Item item{{}, __ldg(x.step + group), __ldg(x.offset + group)};
  if (x.bits == 8) {
    const uint4 four = *reinterpret_cast<const uint4*>(codes);
    item.words[0] = four.x, item.words[1] = four.y, item.words[2] = four.z, item.words[3] = four.w;
  } else if (x.bits == 4) {
    const uint2 two = *reinterpret_cast<const uint2*>(codes);
    item.words[0] = two.x, item.words[1] = two.y;
  } else {
    item.words[0] = *reinterpret_cast<const uint32_t*>(codes);
  }
  return item;
}
/// The bf16 values that dequantize gives.
template <int bits>
__device__ inline void decode_item(const Item& item, bf16* to) {
  constexpr int per_word = 32 / bits;
#pragma unroll
  for (int half = 0; half < kItem; half += 8) {
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = item.words[(half + i) / per_word] >> (half + i) % per_word * bits;
      y[i] = dequantize_value(static_cast<uint8_t>(word & ((1 << bits) - 1)), item.step, item.offset);
    }
    // An assignment nvcc takes apart into elements in places, and lanes 32 bytes apart then wait for each other.
    store_shared(to + half, uint4{pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7])});
  }
}
__device__ inline void decode_item(const Item& item, int bits, bf16* to) {
  if (bits == 8)
    decode_item<8>(item, to);
  else if (bits == 4)
    decode_item<4>(item, to);
  else
    decode_item<2>(item, to);
}
/// 16 codes, whatever their groups are.
__device__ inline void decode_codes(const Operand& x, int row, int column, bf16* to) {
  if (x.by_items) return decode_item(fetch_item(x, row, column), x.bits, to);
  const uint8_t* codes = x.codes + (static_cast<int64_t>(row) * x.channels + column) * x.bits / 8;
  const int64_t first = row * x.group_stride + column;
#pragma unroll 1
  for (int i = 0; i < kItem; ++i) {
    const int64_t group = group_of(x, first + i);
    const int q = codes[i * x.bits / 8] >> i * x.bits % 8 & ((1 << x.bits) - 1);
    store(to + i, dequantize_value(static_cast<uint8_t>(q), __ldg(x.step + group), __ldg(x.offset + group)));
  }
}

/// Where the tokens of a sequence lie among all B N rows: one after the other,
struct Consecutive {
  int row;
  __device__ int operator[](int r) const { return row + r; }
  __device__ Consecutive from(int token) const { return {row + token}; }
};
/// or anywhere, by a list.
struct Listed {
  const int* rows;
  __device__ int operator[](int r) const { return rows[r]; }
  __device__ Listed from(int token) const { return {rows + token}; }
};

/// The rows at `place` and column.. of x -> `rows` rows of the tile, zeros from the `valid`th on: padding must not hold a NaN. The values
/// arrive in the background (copy_async_wait). All threads of the block take part.
template <int head, class Place>
__device__ inline void load_values(bf16* tile, const Operand& x, Place place, int column, int valid, int rows) {
  constexpr int lanes = head / 8;
  const int first = threadIdx.x / lanes, step = blockDim.x / lanes, c = threadIdx.x % lanes * 8;
  bf16* to = tile + first * kPitch<head> + c;
#pragma unroll 1
  for (int r = first; r < rows; r += step, to += step * kPitch<head>) {
    if (r < valid)
      copy_async_16(to, x.values + place[r] * x.stride + column + c);
    else
      *reinterpret_cast<uint4*>(to) = uint4{};
  }
}
/// The same for values or codes.
template <int head, class Place>
__device__ inline void load_operand(bf16* tile, const Operand& x, Place place, int column, int valid, int rows) {
  if (x.values != nullptr) return load_values<head>(tile, x, place, column, valid, rows);
  constexpr int items = head / kItem;
  const int first = threadIdx.x / items, step = blockDim.x / items, c = threadIdx.x % items * kItem;
#pragma unroll 1
  for (int r = first; r < rows; r += step) {
    bf16* to = tile + r * kPitch<head> + c;
    if (r < valid)
      decode_codes(x, place[r], column + c, to);
    else
      reinterpret_cast<uint4*>(to)[0] = reinterpret_cast<uint4*>(to)[1] = uint4{};
  }
}
/// The same for two operands, whose tiles lie `second` elements apart. Codes are all fetched before the first is decoded: nothing else
/// hides how long they take.
template <int head, class Place>
__device__ inline void load_operands(bf16* tile, const Operand& x, const Operand& y, int second, Place place, int column, int valid,
                                     int rows) {
  if (x.values != nullptr || y.values != nullptr || !x.by_items || !y.by_items) {
    load_operand<head>(tile, x, place, column, valid, rows);
    load_operand<head>(tile + second, y, place, column, valid, rows);
    return;
  }
  constexpr int items = head / kItem, kRows = 2;  // rows of a thread at once
  const int first = threadIdx.x / items, step = blockDim.x / items, c = threadIdx.x % items * kItem;
#pragma unroll 1
  for (int from = first; from < rows; from += kRows * step) {
    Item of_x[kRows]{}, of_y[kRows]{};  // zeros decode to zeros, for padding
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (const int r = from + i * step; r < min(valid, rows))
        of_x[i] = fetch_item(x, place[r], column + c), of_y[i] = fetch_item(y, place[r], column + c);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (const int r = from + i * step; r < rows) {
        bf16* to = tile + r * kPitch<head> + c;
        decode_item(of_x[i], x.bits, to);
        decode_item(of_y[i], y.bits, to + second);
      }
  }
}

/// This warp's 16 rows of the tile, the first `valid` of them, -> the rows at `place` and column.. of x.
template <int head, class Place>
__device__ inline void store_rows(const bf16* tile, const Operand& x, Place place, int column, int valid) {
  constexpr int lanes = head / 8;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 16 * lanes; i += kWarp) {
    const int r = (i + lane) / lanes, c = lane % lanes * 8;
    if (r < valid)
      *reinterpret_cast<uint4*>(x.values + place[r] * x.stride + column + c) = *reinterpret_cast<const uint4*>(tile + r * kPitch<head> + c);
  }
}

}  // namespace
}  // namespace mesa::kernels::cuda
