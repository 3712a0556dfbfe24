// Data sets: what each format gives, and the error for every way a file can be wrong.
#include "mesa/data/dataset.h"

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <set>

#include "mesa/base/random.h"
#include "mesa/data/formats.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
DataOptions options_for(const std::string& kind, const std::string& path, int64_t train = 0, int64_t test = 0) {
  DataOptions options;
  options.kind = kind;
  options.path = path;
  options.train_size = train;
  options.test_size = test;
  return options;
}

std::string open_error(const DataOptions& options) {
  return error_of([&] { open_datasets(options); });
}

/// Ten epochs of plain stochastic gradient descent on the softmax regression of raw pixels.
struct LinearClassifier {
  static constexpr int kInputs = 3072, kClasses = 10;
  std::vector<float> weights = std::vector<float>(kClasses * kInputs, 0.0f), bias = std::vector<float>(kClasses, 0.0f);

  std::array<float, kClasses> probabilities(const std::vector<float>& x) const {
    std::array<float, kClasses> p;
    for (int c = 0; c < kClasses; ++c) {
      float sum = bias[c];
      for (int i = 0; i < kInputs; ++i) sum += weights[c * kInputs + i] * x[i];
      p[c] = sum;
    }
    const float most = *std::max_element(p.begin(), p.end());
    float total = 0;
    for (float& v : p) total += v = std::exp(v - most);
    for (float& v : p) v /= total;
    return p;
  }
  void learn(const std::vector<float>& x, int64_t label, float rate) {
    const auto p = probabilities(x);
    for (int c = 0; c < kClasses; ++c) {
      const float step = rate * ((c == label ? 1.0f : 0.0f) - p[c]);
      for (int i = 0; i < kInputs; ++i) weights[c * kInputs + i] += step * x[i];
      bias[c] += step;
    }
  }
};

std::vector<float> as_input(const Image& image) {
  std::vector<float> x(image.pixels.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(image.pixels[i]) / 255.0f - 0.4f;
  return x;
}
}  // namespace

TEST_CASE("unknown kinds and missing paths are refused", "[data]") {
  CHECK_THAT(open_error(options_for("cifar", "x")), Contains("data.kind") && Contains("did you mean 'cifar10'"));
  CHECK_THAT(open_error(options_for("idx", "")), Contains("data.path is empty"));
  for (const char* kind : {"cifar10", "cifar100", "idx", "image_folder"})
    CHECK_THAT(open_error(options_for(kind, "/nowhere/at/all")), Contains("/nowhere/at/all") && Contains("not a folder"));
  CHECK_THAT(open_error(options_for("shapes", "", -1)), Contains("data.train_size"));
}

TEST_CASE("shapes are drawn from (seed, split, index) alone, balanced and varied", "[data]") {
  DataOptions options;
  const DatasetPair pair = open_datasets(options), again = open_datasets(options);
  CHECK(pair.train->size() == 10'000);
  CHECK(pair.test->size() == 2'000);
  CHECK(pair.train->class_names().size() == 10);
  options.seed = 1;
  const DatasetPair other = open_datasets(options);
  std::map<int64_t, int> count;
  std::map<int64_t, std::set<Bytes>> pictures;
  for (int64_t i = 0; i < 200; ++i) {
    const auto sample = pair.train->get(i);
    CHECK(sample.image.pixels == again.train->get(i).image.pixels);
    CHECK(sample.image.pixels != other.train->get(i).image.pixels);
    CHECK(sample.image.pixels != pair.test->get(i).image.pixels);
    ++count[sample.label];
    pictures[sample.label].insert(sample.image.pixels);
  }
  for (int64_t label = 0; label < 10; ++label) {
    CHECK(count[label] == 20);
    CHECK(pictures[label].size() == 20);
  }
  CHECK_THAT(error_of([&] { pair.train->get(10'000); }), Contains("10000"));
}

TEST_CASE("a linear classifier on pixels stays under half of the shapes", "[data]") {
  DataOptions options;
  options.train_size = 3000;
  options.test_size = 500;
  const DatasetPair pair = open_datasets(options);
  std::vector<std::vector<float>> inputs;
  for (int64_t i = 0; i < options.train_size; ++i) inputs.push_back(as_input(pair.train->get(i).image));
  LinearClassifier classifier;
  for (uint64_t epoch = 0; epoch < 5; ++epoch)
    for (int64_t i : permutation(options.train_size, 0, "test.linear", epoch)) classifier.learn(inputs[i], i % 10, 3e-4f);
  int right = 0;
  for (int64_t i = 0; i < options.test_size; ++i) {
    const auto p = classifier.probabilities(as_input(pair.test->get(i).image));
    right += std::max_element(p.begin(), p.end()) - p.begin() == pair.test->get(i).label;
  }
  const double accuracy = static_cast<double>(right) / static_cast<double>(options.test_size);
  INFO("accuracy " << accuracy);
  CHECK(accuracy < 0.5);
  CHECK(accuracy > 0.12);  // it did learn what there is for it
}

TEST_CASE("CIFAR-10 reads every batch file in order", "[data]") {
  const TemporaryFolder folder;
  folder.write("cifar-10-batches-bin/data_batch_2.bin", cifar_bytes(2, 1, 5));
  folder.write("cifar-10-batches-bin/data_batch_10.bin", cifar_bytes(1, 1, 9));
  folder.write("cifar-10-batches-bin/data_batch_1.bin", cifar_bytes(3, 1, 1));
  folder.write("cifar-10-batches-bin/test_batch.bin", cifar_bytes(4, 1, 0));
  const DatasetPair pair = open_datasets(options_for("cifar10", folder.path().string()));
  REQUIRE(pair.train->size() == 6);
  CHECK(pair.test->size() == 4);
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < 6; ++i) labels.push_back(pair.train->get(i).label);
  CHECK(labels == std::vector<int64_t>{1, 1, 1, 5, 5, 9});
  CHECK_THAT(pair.train->describe(4), Contains("data_batch_2.bin: record 1"));
  const Image image = pair.train->get(2).image;  // planes of 1,024: byte i of the record is 2 + i / 4
  CHECK(image.pixels[3 * 8 + 0] == static_cast<uint8_t>(2 + 8 / 4));
  CHECK(image.pixels[3 * 8 + 1] == static_cast<uint8_t>(2 + (1024 + 8) / 4));
  CHECK(image.pixels[3 * 8 + 2] == static_cast<uint8_t>(2 + (2048 + 8) / 4));
  CHECK(open_datasets(options_for("cifar10", folder.path().string(), 4, 1)).train->size() == 4);
  CHECK_THAT(open_error(options_for("cifar10", folder.path().string(), 7)), Contains("data.train_size asks for 7") && Contains("holds 6"));
}

TEST_CASE("CIFAR-100 uses the fine label", "[data]") {
  const TemporaryFolder folder;
  Bytes train = cifar_bytes(2, 2, 3);
  train[1] = 99;
  folder.write("train.bin", train);
  folder.write("test.bin", cifar_bytes(1, 2, 7));
  const DatasetPair pair = open_datasets(options_for("cifar100", folder.path().string()));
  CHECK(pair.train->get(0).label == 99);
  CHECK(pair.train->classes() == 100);
}

TEST_CASE("bad CIFAR files are refused at opening, with file and record", "[data]") {
  const TemporaryFolder folder;
  const auto error_with = [&](const Bytes& bytes) {
    folder.write("data_batch_1.bin", bytes);
    return open_error(options_for("cifar10", folder.path().string()));
  };
  CHECK_THAT(open_error(options_for("cifar10", folder.path().string())), Contains("no training files") && Contains("data_batch_1.bin"));
  CHECK_THAT(error_with(cifar_bytes(1, 1, 0)), Contains("test_batch.bin: is missing"));
  folder.write("test_batch.bin", cifar_bytes(1, 1, 0));
  CHECK(error_with(cifar_bytes(1, 1, 0)) == "");
  CHECK_THAT(error_with({}), Contains("data_batch_1.bin: is empty"));
  Bytes cut = cifar_bytes(2, 1, 0), longer = cut, label = cut;
  cut.pop_back();
  longer.push_back(0);
  label[3073] = 10;
  CHECK_THAT(error_with(cut), Contains("data_batch_1.bin") && Contains("truncated") && Contains("6145"));
  CHECK_THAT(error_with(longer), Contains("6147") && Contains("1 bytes after record 1"));
  CHECK_THAT(error_with(label), Contains("record 1 has label 10"));
  folder.write("batches.meta.txt", {'a', '\n', 'b', '\n'});
  CHECK_THAT(error_with(cifar_bytes(1, 1, 0)), Contains("batches.meta.txt: has 2 class names"));
}

TEST_CASE("IDX reads plain and gzip files alike", "[data]") {
  Bytes values(2 * 3 * 4);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(i);
  const Bytes plain = idx_bytes({2, 3, 4}, values), packed = gzip(plain);
  for (const Bytes& bytes : {plain, packed}) {
    const IdxArray array = parse_idx(bytes.data(), bytes.size(), "file");
    CHECK(array.dims == std::vector<int64_t>{2, 3, 4});
    CHECK(array.values == values);
  }
  Bytes members = gzip(Bytes(plain.begin(), plain.begin() + 11));  // a gzip file may be several, one after the other
  const Bytes rest = gzip(Bytes(plain.begin() + 11, plain.end()));
  members.insert(members.end(), rest.begin(), rest.end());
  CHECK(parse_idx(members.data(), members.size(), "file").values == values);
}

TEST_CASE("bad IDX files are refused by name", "[data]") {
  const auto error_with = [](const Bytes& bytes) { return error_of([&] { parse_idx(bytes.data(), bytes.size(), "file"); }); };
  const Bytes good = idx_bytes({2, 3, 4}, Bytes(24)), packed = gzip(good);
  CHECK_THAT(error_with({}), Contains("file: is empty"));
  CHECK_THAT(error_with({1, 2, 3, 4, 5}), Contains("magic"));
  CHECK_THAT(error_with({0, 0, 13, 1, 0, 0, 0, 1, 0}), Contains("type 13"));
  CHECK_THAT(error_with({0, 0, 8, 9}), Contains("9 dimensions"));
  CHECK_THAT(error_with(idx_bytes({0}, {})), Contains("dimension 0 is 0"));
  for (size_t length = 0; length < good.size(); ++length)
    CHECK_THAT(error_with(Bytes(good.begin(), good.begin() + static_cast<int64_t>(length))), Contains("file"));
  for (size_t length = 0; length < packed.size(); ++length)
    CHECK_THAT(error_with(Bytes(packed.begin(), packed.begin() + static_cast<int64_t>(length))), Contains("file"));
  CHECK_THAT(error_with(idx_bytes({2, 3, 4}, Bytes(25))), Contains("bytes after"));
  CHECK_THAT(error_with(gzip(idx_bytes({2, 3, 4}, Bytes(25)))), Contains("bytes after"));
  for (const Bytes& liar : {idx_bytes({0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}, Bytes(9)), idx_bytes({60000, 28, 28}, Bytes(9))}) {
    CHECK_THAT(error_with(liar), Contains("lies"));
    CHECK_THAT(error_with(gzip(liar)), Contains("lies"));
  }
  Bytes garbage = packed, broken = packed;
  garbage.push_back(77);
  broken[broken.size() - 6] ^= 1;  // the checksum
  CHECK_THAT(error_with(garbage), Contains("gzip"));
  CHECK_THAT(error_with(broken), Contains("gzip"));
}

TEST_CASE("IDX sets of one pair are split without overlap", "[data]") {
  const TemporaryFolder folder;
  Bytes values(10 * 4), labels(10);
  for (size_t i = 0; i < 10; ++i) values[4 * i] = labels[i] = static_cast<uint8_t>(i);
  folder.write("t10k-images-idx3-ubyte.gz", gzip(idx_bytes({10, 2, 2}, values)));
  const std::string path = folder.path().string();
  CHECK_THAT(open_error(options_for("idx", path)), Contains("t10k-labels-idx1-ubyte"));
  folder.write("t10k-labels-idx1-ubyte", idx_bytes({10}, labels));
  CHECK_THAT(open_error(options_for("idx", path)), Contains("data.train_size") && Contains("10 pictures"));
  CHECK_THAT(open_error(options_for("idx", path, 8, 3)), Contains("fewer than"));
  const DatasetPair pair = open_datasets(options_for("idx", path, 7, 3));
  REQUIRE(pair.train->size() == 7);
  REQUIRE(pair.test->size() == 3);
  CHECK(pair.train->get(6).label == 6);
  CHECK(pair.test->get(0).label == 7);
  CHECK(int{pair.test->get(2).image.pixels[0]} == 9);
  CHECK_THAT(pair.test->describe(0), Contains("record 7"));
  CHECK_THAT(error_of([&] { pair.train->get(7); }), Contains("7"));
  folder.write("train-images.idx3-ubyte", idx_bytes({10, 2, 2}, values));
  folder.write("train-labels.idx1-ubyte", idx_bytes({10}, labels));
  CHECK(open_datasets(options_for("idx", path)).test->size() == 10);
  labels[4] = 10;
  folder.write("train-labels.idx1-ubyte", idx_bytes({10}, labels));
  CHECK_THAT(open_error(options_for("idx", path)), Contains("record 4 has label 10") && Contains("model.classes"));
  labels.pop_back();
  folder.write("train-labels.idx1-ubyte", idx_bytes({9}, labels));
  CHECK_THAT(open_error(options_for("idx", path)), Contains("9 labels for the 10 pictures"));
}

TEST_CASE("folders of photos: classes by name, both splits alike", "[data]") {
  const TemporaryFolder folder;
  const std::string path = folder.path().string();
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("class folders"));
  folder.write("train/dog/1.jpg", encode_jpeg(test_image(8, 9, 3)));
  folder.write("train/cat/b.JPEG", encode_jpeg(test_image(8, 9, 1)));
  folder.write("train/cat/a.png", encode_png(test_image(5, 6, 3)));
  folder.write("train/cat/notes.txt", {'x'});
  folder.write("train/.hidden/a.png", {'x'});
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("none of val/"));
  folder.write("val/dog/2.jpg", encode_jpeg(test_image(8, 9, 3)));
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("lacks the class 'cat'"));
  folder.write("val/cat/zero.jpg", {});
  const DatasetPair pair = open_datasets(options_for("image_folder", path));
  CHECK(pair.train->class_names() == std::vector<std::string>{"cat", "dog"});
  REQUIRE(pair.train->size() == 3);
  CHECK_THAT(pair.train->describe(0), Contains("train/cat/a.png"));
  CHECK(pair.train->get(1).image.channels == 1);
  CHECK(pair.train->get(2).label == 1);
  CHECK_THAT(error_of([&] { pair.test->get(0); }), Contains("val/cat/zero.jpg: is empty"));
  std::filesystem::create_directories(folder.path() / "train/eel");
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("lacks the class 'eel'"));
  std::filesystem::create_directories(folder.path() / "val/eel");
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("train/eel: holds no"));
  std::filesystem::create_directory_symlink("/no/such/disk", folder.path() / "train/fox");
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("train/fox: is a link to nothing"));
}

TEST_CASE("an unsplit folder is split by seed, without overlap", "[data]") {
  const TemporaryFolder folder;
  for (int i = 0; i < 12; ++i) folder.write(concat(i % 2 == 0 ? "a/" : "b/", i, ".png"), encode_png(test_image(4, 4, 3)));
  const std::string path = folder.path().string();
  CHECK_THAT(open_error(options_for("image_folder", path)), Contains("data.test_size"));
  CHECK_THAT(open_error(options_for("image_folder", path, 9, 4)), Contains("too few"));
  const DatasetPair pair = open_datasets(options_for("image_folder", path, 0, 4)),
                    again = open_datasets(options_for("image_folder", path, 0, 4));
  REQUIRE(pair.train->size() == 8);
  REQUIRE(pair.test->size() == 4);
  std::set<std::string> all;
  for (int64_t i = 0; i < 8; ++i) all.insert(pair.train->describe(i));
  for (int64_t i = 0; i < 4; ++i) all.insert(pair.test->describe(i));
  CHECK(all.size() == 12);
  for (int64_t i = 0; i < 4; ++i) CHECK(pair.test->describe(i) == again.test->describe(i));
}

TEST_CASE("the real sets open", "[data][shared]") {
  const auto cifar = shared_data("cifar10"), mnist = shared_data("mnist"), photos = shared_data("photos");
  if (!cifar || !mnist || !photos) {
    WARN("skipped: the shared data sets are absent");
    return;
  }
  const DatasetPair colors = open_datasets(options_for("cifar10", cifar->string()));
  CHECK(colors.train->size() == 10'000);
  CHECK(colors.test->size() == 2'000);
  CHECK(colors.train->class_names()[3] == "cat");
  const DatasetPair digits = open_datasets(options_for("idx", mnist->string(), 8000, 2000));
  CHECK(digits.train->size() == 8000);
  CHECK(digits.train->get(0).label == 7);  // MNIST's test set begins 7, 2, 1, 0
  CHECK(digits.train->get(3).label == 0);
  CHECK(digits.test->get(1999).image.height == 28);
  const DatasetPair pictures = open_datasets(options_for("image_folder", photos->string(), 0, 12));
  CHECK(pictures.train->classes() == 6);
  for (int64_t i = 0; i < pictures.test->size(); ++i) CHECK(pictures.test->get(i).image.height > 50);
}
