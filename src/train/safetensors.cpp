#include "mesa/train/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "mesa/train/files.h"

namespace mesa {
namespace {

static_assert(std::endian::native == std::endian::little, "tensor data are copied as they are, and the format is little-endian");

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int kMaxJsonDepth = 3;                   // {name: {shape: [..]}}

/// IEEE 754 binary16 as the f32 of the same value.
float from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent > 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal, or zero
  return sign != 0 ? -small : small;
}

/// From the values of a file, `bytes` of them, to those of a tensor.
using Widen = void (*)(const char* from, size_t bytes, void* to);
template <class From, class To>
To widened(From x) {
  return static_cast<To>(x);
}
template <class From, class To, To (*convert)(From) = widened<From, To>>
void widen(const char* from, size_t bytes, void* to) {
  for (size_t i = 0; i < bytes / sizeof(From); ++i) {
    From x;
    std::memcpy(&x, from + i * sizeof(From), sizeof(From));
    static_cast<To*>(to)[i] = convert(x);
  }
}

struct TypeName {
  const char* name;
  DType dtype;
  int64_t stored = 0;     ///< bytes of a value, where the engine has no such type
  Widen widen = nullptr;  ///< and how it becomes `dtype`, without loss
};
constexpr std::array kTypes{TypeName{"F32", DType::f32},
                            TypeName{"BF16", DType::bf16},
                            TypeName{"F64", DType::f64},
                            TypeName{"U8", DType::u8},
                            TypeName{"I32", DType::i32},
                            TypeName{"I64", DType::i64},
                            TypeName{"F16", DType::f32, 2, widen<uint16_t, float, from_half>},
                            TypeName{"BOOL", DType::u8, 1, widen<uint8_t, uint8_t>},
                            TypeName{"I8", DType::i32, 1, widen<int8_t, int32_t>},
                            TypeName{"I16", DType::i32, 2, widen<int16_t, int32_t>},
                            TypeName{"U16", DType::i32, 2, widen<uint16_t, int32_t>},
                            TypeName{"U32", DType::i64, 4, widen<uint32_t, int64_t>}};

const char* type_name(DType dtype) {
  for (const auto& type : kTypes)
    if (type.dtype == dtype && type.widen == nullptr) return type.name;
  fail("safetensors cannot hold ", to_string(dtype));
}

struct Entry {
  std::string name;
  const TypeName* type;
  Shape shape;
  uint64_t begin, end;
};

struct Header {
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
};

template <class... Parts>
[[noreturn]] void refuse(const std::string& file, const Parts&... parts) {
  throw Error(concat(file, ": ", parts...));
}

// JSON with duplicate keys and deep nesting refused while it is read: nlohmann's parser would keep the last of two keys.
nlohmann::json parse_header_json(std::string_view text, const std::string& file) {
  std::vector<std::set<std::string>> seen;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > kMaxJsonDepth) refuse(file, "the header is nested deeper than the format allows");
    if (event == Event::object_start) seen.emplace_back();
    if (event == Event::object_end) seen.pop_back();
    if (event == Event::key && !seen.back().insert(value.get<std::string>()).second)
      refuse(file, "the header names '", value.get<std::string>(), "' twice");
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& e) {
    refuse(file, "the header is not valid JSON (", std::string(e.what()).substr(0, 300), ")");  // what() quotes the input
  }
}

uint64_t whole_number(const nlohmann::json& value, const std::string& file, const std::string& tensor, const char* what) {
  if (!value.is_number_unsigned()) refuse(file, "tensor '", tensor, "': ", what, " must be whole numbers of at least 0");
  return value.get<uint64_t>();
}

Entry parse_entry(const std::string& name, const nlohmann::json& info, const std::string& file) {
  if (!info.is_object()) refuse(file, "tensor '", name, "' is not described by an object");
  for (const char* field : {"dtype", "shape", "data_offsets"})
    if (!info.contains(field)) refuse(file, "tensor '", name, "' has no ", field);
  const auto& shape = info["shape"];
  const auto& offsets = info["data_offsets"];
  if (!info["dtype"].is_string()) refuse(file, "tensor '", name, "': dtype must be text");
  if (!shape.is_array()) refuse(file, "tensor '", name, "': shape must be a list");
  if (!offsets.is_array() || offsets.size() != 2) refuse(file, "tensor '", name, "': data_offsets must be [begin, end]");

  const auto text = info["dtype"].get<std::string>();
  const TypeName* type = std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeName& t) { return text == t.name; });
  if (type == kTypes.end())
    refuse(file, "tensor '", name, "' has the element type ", text,
           "; F32, F16, BF16, F64, BOOL, U8, I8, U16, I16, U32, I32 and I64 can be read");
  if (shape.size() > Shape::kMaxRank)
    refuse(file, "tensor '", name, "' has ", shape.size(), " axes; at most ", Shape::kMaxRank, " can be read");

  int64_t dims[Shape::kMaxRank] = {};
  // In memory a value takes as many bytes as in the file, or more: what must not overflow is that size.
  const int64_t stored = type->widen != nullptr ? type->stored : size_of(type->dtype);
  int64_t bytes = size_of(type->dtype);
  bool too_large = false, empty = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    const uint64_t extent = whole_number(shape[i], file, name, "the extents of its shape");
    too_large = too_large || extent > INT64_MAX;
    dims[i] = static_cast<int64_t>(extent);
    empty = empty || extent == 0;
    // A zero among the extents does not excuse the others: their product is formed elsewhere too.
    too_large = too_large || (extent != 0 && __builtin_mul_overflow(bytes, dims[i], &bytes));
  }
  if (too_large) refuse(file, "tensor '", name, "': the size of its shape overflows");
  bytes = empty ? 0 : bytes / size_of(type->dtype) * stored;
  Entry entry{name, type, Shape(dims, static_cast<int>(shape.size())), whole_number(offsets[0], file, name, "data_offsets"),
              whole_number(offsets[1], file, name, "data_offsets")};
  if (entry.end < entry.begin) refuse(file, "tensor '", name, "': its data end before they begin");
  if (entry.end - entry.begin != static_cast<uint64_t>(bytes))
    refuse(file, "tensor '", name, "' of shape ", entry.shape, " and type ", text, " needs ", bytes, " bytes but has ",
           entry.end - entry.begin);
  return entry;
}

Header parse_header(std::string_view text, uint64_t data_bytes, const std::string& file) {
  if (text.empty() || text[0] != '{') refuse(file, "the header does not begin with '{'");
  if (text.find('\0') != std::string_view::npos)
    refuse(file, "the header is not valid JSON (a zero byte)");  // it would end the parser's input
  const nlohmann::json json = parse_header_json(text, file);
  Header header;
  for (const auto& [name, info] : json.items()) {
    if (name != "__metadata__") {
      header.entries.push_back(parse_entry(name, info, file));
      continue;
    }
    if (!info.is_object()) refuse(file, "__metadata__ must map text to text");
    for (const auto& [key, value] : info.items()) {
      if (!value.is_string()) refuse(file, "__metadata__: the value of '", key, "' is not text");
      header.metadata[key] = value.get<std::string>();
    }
  }
  std::sort(header.entries.begin(), header.entries.end(),
            [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name); });
  uint64_t expected = 0;
  for (const Entry& entry : header.entries) {
    if (entry.begin < expected) refuse(file, "the data of tensor '", entry.name, "' overlap those before them");
    if (entry.begin > expected) refuse(file, "there is a hole before the data of tensor '", entry.name, "'");
    if (entry.end > data_bytes)
      refuse(file, "is truncated: tensor '", entry.name, "' ends at byte ", entry.end, " of the data, but there are ", data_bytes);
    expected = entry.end;
  }
  if (expected != data_bytes) refuse(file, data_bytes - expected, " bytes after the last tensor belong to none");
  return header;
}

// `read(offset, into, bytes)` copies a part of the file.
using ReadAt = std::function<void(uint64_t offset, void* into, uint64_t bytes)>;

SafetensorsFile load(uint64_t file_bytes, const std::string& file, const ReadAt& read, Device device) {
  if (file_bytes < 8) refuse(file, "is too short (", file_bytes, " bytes) to be a safetensors file");
  uint64_t header_bytes = 0;
  read(0, &header_bytes, 8);
  if (header_bytes > kMaxHeaderBytes)
    refuse(file, "claims a header of ", header_bytes, " bytes; it is not a safetensors file (at most ", kMaxHeaderBytes, " are allowed)");
  if (header_bytes > file_bytes - 8)
    refuse(file, "is truncated: the header needs ", header_bytes, " bytes, but ", file_bytes - 8, " follow");
  std::string text(header_bytes, '\0');
  read(8, text.data(), header_bytes);
  Header header = parse_header(text, file_bytes - 8 - header_bytes, file);
  SafetensorsFile out;
  out.metadata = std::move(header.metadata);
  for (Entry& entry : header.entries) {
    Tensor tensor = Tensor::empty(entry.shape, entry.type->dtype, device, MemoryKind::parameters);
    const uint64_t at = 8 + header_bytes + entry.begin, bytes = entry.end - entry.begin;
    if (device == kCpu && bytes > 0 && entry.type->widen == nullptr) read(at, tensor.raw(), bytes);
    if (device == kCpu && bytes > 0 && entry.type->widen != nullptr) {
      std::string narrow(bytes, '\0');
      read(at, narrow.data(), bytes);
      entry.type->widen(narrow.data(), bytes, tensor.raw());
    }
    out.tensors.push_back({std::move(entry.name), std::move(tensor)});
  }
  return out;
}

struct Layout {
  std::string header;  // the length in front included
  std::vector<const NamedTensor*> order;
};

Layout plan(std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata) {
  Layout layout;
  for (const NamedTensor& t : tensors) {
    check(t.tensor.defined() && t.tensor.device().kind == DeviceKind::cpu, "safetensors: '", t.name, "' is not in host memory");
    check(t.tensor.is_contiguous(), "safetensors: '", t.name, "' is not contiguous");
    check(t.name != "__metadata__", "safetensors: no tensor may be called __metadata__");
    layout.order.push_back(&t);
  }
  std::sort(layout.order.begin(), layout.order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    const int64_t a_size = size_of(a->tensor.dtype()), b_size = size_of(b->tensor.dtype());
    return a_size != b_size ? a_size > b_size : a->name < b->name;  // large elements first: all are aligned without padding
  });
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  std::set<std::string_view> names;
  int64_t offset = 0;
  for (const NamedTensor* t : layout.order) {
    check(names.insert(t->name).second, "safetensors: two tensors are called '", t->name, "'");
    const Shape& shape = t->tensor.shape();
    // push_back of a pair instead of operator[]: that one searches all keys so far
    json.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(
        t->name, nlohmann::ordered_json{{"dtype", type_name(t->tensor.dtype())},
                                        {"shape", std::vector<int64_t>(shape.begin(), shape.end())},
                                        {"data_offsets", std::array{offset, offset + t->tensor.bytes()}}});
    offset += t->tensor.bytes();
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception& e) {
    fail("safetensors: a name or metadata text is not UTF-8 (", e.what(), ")");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  check(text.size() <= kMaxHeaderBytes, "safetensors: the header would have ", text.size(), " bytes, more than the format allows");
  const uint64_t length = text.size();
  layout.header.assign(reinterpret_cast<const char*>(&length), 8);
  layout.header += text;
  return layout;
}

std::string_view bytes_of(const Tensor& tensor) {
  return tensor.bytes() == 0 ? std::string_view()
                             : std::string_view(static_cast<const char*>(tensor.raw()), static_cast<size_t>(tensor.bytes()));
}

}  // namespace

const Tensor* SafetensorsFile::find(std::string_view name) const {
  for (const NamedTensor& t : tensors)
    if (t.name == name) return &t.tensor;
  return nullptr;
}

std::string format_safetensors(std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata) {
  Layout layout = plan(tensors, metadata);
  std::string out = std::move(layout.header);
  for (const NamedTensor* t : layout.order) out += bytes_of(t->tensor);
  return out;
}

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata) {
  const Layout layout = plan(tensors, metadata);
  OutputFile out(path);
  out.write(layout.header);
  for (const NamedTensor* t : layout.order) out.write(bytes_of(t->tensor));
  out.sync();
  out.close();
}

SafetensorsFile parse_safetensors(std::string_view bytes, const std::string& name) {
  return load(
      bytes.size(), name,
      [&](uint64_t offset, void* into, uint64_t count) {
        if (count > 0) std::memcpy(into, bytes.data() + offset, count);
      },
      kCpu);
}

SafetensorsFile read_safetensors(const std::string& path, Device device) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) refuse(path, "cannot be opened: ", std::strerror(errno));
  const std::shared_ptr<void> closer(nullptr, [fd](void*) { ::close(fd); });
  struct stat status {};
  if (::fstat(fd, &status) != 0) refuse(path, "cannot be read: ", std::strerror(errno));
  if (!S_ISREG(status.st_mode)) refuse(path, "is not a file");
  return load(
      static_cast<uint64_t>(status.st_size), path,
      [&](uint64_t offset, void* into, uint64_t count) {
        auto* to = static_cast<char*>(into);
        while (count > 0) {  // one call moves at most 2 GB
          const ssize_t got = ::pread(fd, to, std::min<uint64_t>(count, 1 << 30), static_cast<off_t>(offset));
          if (got < 0 && errno == EINTR) continue;
          if (got < 0) refuse(path, "cannot be read: ", std::strerror(errno));
          if (got == 0) refuse(path, "became shorter while it was read");
          to += got;
          offset += static_cast<uint64_t>(got);
          count -= static_cast<uint64_t>(got);
        }
      },
      device);
}

}  // namespace mesa
