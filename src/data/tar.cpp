// POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) interchange formats, and GNU tar's long names and base-256 sizes.
#include "mesa/data/tar.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstring>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "mesa/base/error.h"

namespace mesa {

namespace {
constexpr uint64_t kBlock = 512;
constexpr uint64_t kMaxHeaderText = 1 << 20;  // of a long name or a pax header

/// A header block, by its fields (offset, bytes).
struct Block {
  std::array<uint8_t, kBlock> bytes;

  std::string_view field(size_t at, size_t length) const {
    const std::string_view all(reinterpret_cast<const char*>(bytes.data()) + at, length);
    return all.substr(0, all.find('\0'));
  }
  bool empty() const {
    return std::all_of(bytes.begin(), bytes.end(), [](uint8_t b) { return b == 0; });
  }
  /// Octal digits with blanks around them; nothing else.
  std::optional<uint64_t> octal(size_t at, size_t length) const {
    std::string_view text = field(at, length);
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
    uint64_t x = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), x, 8);
    if (text.empty() || code != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return x;
  }
  bool checksum_fits() const {
    uint64_t sum = 0;
    for (size_t i = 0; i < kBlock; ++i) sum += i >= 148 && i < 156 ? ' ' : bytes[i];
    return octal(148, 8) == sum;
  }
  /// GNU writes sizes of 8 GiB and more in binary, marked by the highest bit.
  std::optional<uint64_t> size() const {
    if ((bytes[124] & 0x80) == 0) return octal(124, 12);
    uint64_t x = 0;
    for (size_t i = 124; i < 136; ++i) {
      const uint8_t digit = i == 124 ? bytes[i] & 0x7F : bytes[i];
      if (x >> 56 != 0) return std::nullopt;
      x = x << 8 | digit;
    }
    return x;
  }
  char type() const { return bytes[156] == 0 ? '0' : static_cast<char>(bytes[156]); }
  std::string name() const {
    const bool posix = std::memcmp(bytes.data() + 257, "ustar\0", 6) == 0;
    const std::string_view prefix = posix ? field(345, 155) : "";
    return prefix.empty() ? std::string(field(0, 100)) : concat(prefix, "/", field(0, 100));
  }
};

class TarReader {
 public:
  TarReader(const ReadAt& read, uint64_t size, const std::string& name) : read_(read), size_(size), name_(name) {}

  std::vector<TarFile> list() {
    check(size_ > 0, name_, ": is empty");
    refuse_gzip();
    std::vector<TarFile> files;
    for (;;) {
      check(size_ - at_ >= kBlock, name_, ": is truncated: the archive does not end at ", size_, " bytes; fetch or write it again");
      read_(at_, block_.bytes.data(), kBlock);
      if (block_.empty()) break;
      take_entry(files);
    }
    check_end();
    return files;
  }

 private:
  void refuse_gzip() const {
    std::array<uint8_t, 2> magic{};
    if (size_ >= 2) read_(0, magic.data(), 2);
    check(!(magic[0] == 0x1F && magic[1] == 0x8B), name_,
          ": is compressed with gzip, which can only be read from its begin; unpack it (gunzip): pictures are compressed already");
  }

  void take_entry(std::vector<TarFile>& files) {
    check(block_.checksum_fits(), name_, ": is damaged or not a tar archive: wrong checksum of the header at ", at_);
    const char type = block_.type();
    const auto own_size = block_.size();
    check(own_size.has_value(), name_, ": the header at ", at_, " has no readable size");
    const bool content = type == '0' || type == '7';
    const uint64_t size = content ? next_size_.value_or(*own_size) : *own_size, from = at_ + kBlock;
    check(size <= size_ - from, name_, ": is truncated: the entry at ", at_, " has ", size, " bytes, of which ", size_ - from,
          " are there");
    if (type == 'L')
      next_name_ = cut(text(from, size));
    else if (type == 'x')
      read_pax(text(from, size));
    else if (type != 'g' && type != 'K')
      take_file(type, {next_name_.value_or(block_.name()), from, size}, files);
    at_ = from + size;
    at_ += std::min((kBlock - size % kBlock) % kBlock, size_ - at_);  // a cut in the padding shows as a missing end
  }

  void take_file(char type, TarFile file, std::vector<TarFile>& files) {
    next_name_.reset();
    next_size_.reset();
    check(!file.name.empty(), name_, ": the entry at ", at_, " has no name");
    if (type == '5') return;
    check(type == '0' || type == '7', name_, ": ", file.name, " is a link, a sparse or a special file; shards hold plain files only");
    files.push_back(std::move(file));
  }

  std::string text(uint64_t from, uint64_t size) const {
    check(size <= kMaxHeaderText, name_, ": the header at ", at_, " claims a name of ", size, " bytes");
    std::string out(size, '\0');
    read_(from, reinterpret_cast<uint8_t*>(out.data()), size);
    return out;
  }
  static std::string cut(const std::string& text) { return text.substr(0, text.find('\0')); }

  /// Records "LENGTH KEY=VALUE\n", the length being that of the whole record.
  void read_pax(const std::string& records) {
    std::string_view left = records;
    while (!left.empty()) {
      size_t length = 0;
      const auto [end, code] = std::from_chars(left.data(), left.data() + left.size(), length);
      const auto digits = static_cast<size_t>(end - left.data());
      const bool whole = code == std::errc{} && length > digits + 1 && length <= left.size() && *end == ' ' && left[length - 1] == '\n';
      check(whole, name_, ": the pax header at ", at_, " is damaged");
      const std::string_view record = left.substr(digits + 1, length - digits - 2);
      left.remove_prefix(length);
      const size_t equals = record.find('=');
      check(equals != std::string_view::npos, name_, ": the pax header at ", at_, " is damaged");
      take_pax(record.substr(0, equals), record.substr(equals + 1));
    }
  }

  void take_pax(std::string_view key, std::string_view value) {
    if (key == "path") next_name_ = cut(std::string(value));
    check(!key.starts_with("GNU.sparse"), name_, ": the file after ", at_, " is sparse; shards hold plain files only");
    if (key != "size") return;
    uint64_t size = 0;
    const auto [end, code] = std::from_chars(value.data(), value.data() + value.size(), size);
    check(code == std::errc{} && end == value.data() + value.size(), name_, ": the pax header at ", at_, " has an unreadable size");
    next_size_ = size;
  }

  /// Behind the end there is padding; anything else is an archive that was appended and would be lost.
  void check_end() {
    check(!next_name_ && !next_size_, name_, ": is damaged: a header of a long name or pax stands before nothing");
    for (std::vector<uint8_t> part; at_ < size_; at_ += part.size()) {
      part.resize(std::min<uint64_t>(size_ - at_, 1 << 16));
      read_(at_, part.data(), part.size());
      const bool zero = std::all_of(part.begin(), part.end(), [](uint8_t b) { return b == 0; });
      check(zero, name_, ": has data behind the archive's end; if archives were joined, keep them as files of their own");
    }
  }

  const ReadAt& read_;
  const uint64_t size_;
  const std::string& name_;
  uint64_t at_ = 0;
  Block block_;
  std::optional<std::string> next_name_;
  std::optional<uint64_t> next_size_;
};

/// "train/0001.jpg": the key "train/0001" and the ending "jpg", in small letters.
struct SplitName {
  std::string key, ending;
  explicit SplitName(const std::string& name) {
    const size_t base = name.rfind('/') == std::string::npos ? 0 : name.rfind('/') + 1, dot = name.find('.', base);
    if (dot == base || dot == std::string::npos) return;  // hidden, or without an ending
    key = name.substr(0, dot);
    ending = name.substr(dot + 1);
    for (char& c : ending) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  bool is_picture() const { return ending == "jpg" || ending == "jpeg" || ending == "png"; }
};

int64_t read_label(const ReadAt& read, const TarFile& file, const std::string& shard) {
  constexpr uint64_t kMaxText = 32;
  std::string text(std::min(file.size, kMaxText), '\0');
  read(file.offset, reinterpret_cast<uint8_t*>(text.data()), text.size());
  const auto blank = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  while (!text.empty() && blank(text.back())) text.pop_back();
  size_t from = 0;
  while (from < text.size() && blank(text[from])) ++from;
  int64_t label = -1;
  const auto [end, code] = std::from_chars(text.data() + from, text.data() + text.size(), label);
  check(file.size <= kMaxText && code == std::errc{} && end == text.data() + text.size(), shard, ": ", file.name,
        " does not hold a label, a number as text");
  check(label >= 0 && label < kMaxClasses, shard, ": ", file.name, " has label ", label, ", but labels go from 0 to ", kMaxClasses - 1);
  return label;
}
}  // namespace

std::vector<TarFile> list_tar(const ReadAt& read, uint64_t size, const std::string& name) { return TarReader(read, size, name).list(); }

std::vector<ShardSample> index_shard(const ReadAt& read, uint64_t size, const std::string& name) {
  std::vector<ShardSample> samples;
  std::unordered_map<std::string, int64_t> labels;
  for (TarFile& file : list_tar(read, size, name)) {
    const SplitName split(file.name);
    if (split.ending == "cls")
      check(labels.emplace(split.key, read_label(read, file, name)).second, name, ": ", file.name, " comes twice");
    else if (split.is_picture())
      samples.push_back({std::move(file.name), file.offset, file.size, 0});
  }
  check(!samples.empty(), name, ": holds no .jpg, .jpeg or .png file");
  constexpr int64_t kTaken = -1;
  for (ShardSample& sample : samples) {
    const auto label = labels.find(SplitName(sample.name).key);
    check(label != labels.end(), name, ": ", sample.name, " has no label; a file ", SplitName(sample.name).key,
          ".cls with its number is needed");
    check(label->second != kTaken, name, ": ", sample.name, " is the second picture of its key");
    sample.label = std::exchange(label->second, kTaken);
  }
  const auto alone = std::find_if(labels.begin(), labels.end(), [](const auto& label) { return label.second != kTaken; });
  check(alone == labels.end(), name, ": ", alone == labels.end() ? "" : alone->first, ".cls has no picture beside it");
  return samples;
}

}  // namespace mesa
