#include "support/tar_files.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace mesa::testing {

namespace {
constexpr size_t kBlock = 512;

std::string octal(uint64_t x, int digits) {
  char text[32];
  std::snprintf(text, sizeof text, "%0*llo", digits, static_cast<unsigned long long>(x));
  return text;
}
}  // namespace

Bytes text_bytes(const std::string& text) { return {text.begin(), text.end()}; }

Bytes joined(const std::vector<Bytes>& parts) {
  Bytes out;
  for (const Bytes& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

void fix_checksum(Bytes& tar, size_t at) {
  std::memset(&tar[at + 148], ' ', 8);
  unsigned sum = 0;
  for (size_t i = 0; i < kBlock; ++i) sum += tar[at + i];
  const std::string text = octal(sum, 6);
  std::memcpy(&tar[at + 148], text.c_str(), 7);
}

Bytes tar_entry_of_size(const std::string& name, const Bytes& content, const std::string& size, char type) {
  Bytes out(kBlock, 0);
  std::memcpy(out.data(), name.data(), std::min<size_t>(name.size(), 100));
  std::memcpy(&out[100], "0000644", 7);
  std::memcpy(&out[124], size.data(), std::min<size_t>(size.size(), 12));
  out[156] = static_cast<uint8_t>(type);
  std::memcpy(&out[257],
              "ustar\0"
              "00",
              8);
  fix_checksum(out, 0);
  out.insert(out.end(), content.begin(), content.end());
  out.resize((out.size() + kBlock - 1) / kBlock * kBlock, 0);
  return out;
}

Bytes tar_entry(const std::string& name, const Bytes& content, char type) {
  return tar_entry_of_size(name, content, octal(content.size(), 11), type);
}

Bytes tar_end() { return Bytes(2 * kBlock, 0); }

Bytes tar_bytes(const NamedFiles& files) {
  std::vector<Bytes> parts;
  for (const auto& [name, content] : files) parts.push_back(tar_entry(name, content));
  parts.push_back(tar_end());
  return joined(parts);
}

}  // namespace mesa::testing
