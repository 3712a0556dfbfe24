#include "support/many_formats.h"

#include <zlib.h>

#include <array>

namespace mesa::testing {

DataOptions write_photo_folder(const TemporaryFolder& folder, int train, int test) {
  for (const bool training : {true, false})
    for (int i = 0; i < (training ? train : test); ++i) {
      const Image image = test_image(40 + 3 * i, 60 - i, i % 4 == 3 ? 1 : 3);
      const std::string name =
          concat("photos/", training ? "train/" : "val/", std::array{"ant", "bee", "cat"}[i % 3], "/", i + (training ? 10 : 50));
      folder.write(name + (i % 5 == 4 ? ".png" : ".jpg"), i % 5 == 4 ? encode_png(image) : encode_jpeg(image));
    }
  DataOptions options;
  options.kind = "image_folder", options.path = (folder.path() / "photos").string();
  return options;
}

void write_shards(const TemporaryFolder& folder, const std::string& name, const DatasetPair& data, int64_t each, bool beside) {
  std::string classes;
  for (const std::string& c : data.train->class_names()) classes += c + "\n";
  folder.write(name + "/classes.txt", text_bytes(classes));
  for (const bool training : {true, false}) {
    const Dataset& half = training ? *data.train : *data.test;
    NamedFiles files;
    int64_t shard = 0;
    for (int64_t i = 0; i < half.size(); ++i) {
      const auto stored = half.stored(i);
      const bool png = half.describe(i).ends_with("png");
      files.push_back({concat("sample", i, png ? ".png" : ".jpg"), Bytes(stored->bytes().begin(), stored->bytes().end())});
      files.push_back({concat("sample", i, ".cls"), text_bytes(std::to_string(stored->label))});
      if ((i + 1) % each != 0 && i + 1 < half.size()) continue;
      folder.write(concat(name, training ? "/train" : "/val", beside ? "-00000" : "/", shard++, ".tar"), tar_bytes(files));
      files.clear();
    }
  }
}

Bytes pack_bytes(const DatasetPair& data, const PackOptions& options) {
  std::string out = kPackedMagic;
  std::vector<PackedRecord> records;
  for (const Dataset* half : {data.train.get(), data.test.get()})
    for (int64_t i = 0; i < half->size(); ++i) {
      const StoredPicture picture = pack_picture(*half, i, options);
      const auto bytes = picture.bytes();
      records.push_back({out.size(), static_cast<uint32_t>(bytes.size()), crc32_of(bytes.data(), bytes.size()),
                         static_cast<uint32_t>(picture.label), static_cast<uint32_t>(picture.height), static_cast<uint32_t>(picture.width),
                         static_cast<uint32_t>(picture.channels)});
      out.append(bytes.begin(), bytes.end());
    }
  return text_bytes(out + packed_table(data.train->class_names(), records, data.train->size(), out.size()));
}

std::string write_pack(const TemporaryFolder& folder, const DatasetPair& data, const PackOptions& options) {
  return folder.write("data.pack", pack_bytes(data, options));
}

uint32_t crc32_of(const void* bytes, size_t count) { return static_cast<uint32_t>(crc32_z(0, static_cast<const Bytef*>(bytes), count)); }

void check_same_samples(const Dataset& a, const Dataset& b) {
  REQUIRE(a.size() == b.size());
  for (int64_t i = 0; i < a.size(); ++i) {
    const Dataset::Sample x = a.get(i), y = b.get(i);
    CHECK(x.label == y.label);
    CHECK(x.image.height == y.image.height);
    CHECK(x.image.pixels == y.image.pixels);
  }
}

}  // namespace mesa::testing
