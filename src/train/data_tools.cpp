#include "mesa/train/data_tools.h"

#include <omp.h>
#include <zlib.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <vector>

#include "item_progress.h"
#include "mesa/base/threads.h"
#include "mesa/data/packed.h"
#include "mesa/train/files.h"
#include "mesa/train/setup.h"
#include "mesa/train/signals.h"

namespace mesa {
namespace {

DatasetPair open_data(const RunConfig& config, bool in_full) {
  ImageConfig model = model_config(config, known_classes(config)).input();
  if (in_full && config.data.kind != "random") model.image_size = 0;  // no picture is decoded at a fraction of its size
  return make_datasets(config, model);
}

/// make(index) for every sample on the compute threads, and take(index, result, error) for each in order on this one: the result, or why
/// there is none.
template <class Make, class Take>
void for_each_sample(const Dataset& data, const Make& make, const Take& take) {
  using Result = decltype(make(int64_t{0}));
  const int64_t threads = omp_get_max_threads(), block = 16 * threads;
  for (int64_t first = 0; first < data.size(); first += block) {
    stop_if_asked();
    const int64_t count = std::min(block, data.size() - first);
    std::vector<std::optional<Result>> results(count);
    std::vector<std::string> errors(count);
    parallel_for(count, threads, [&](int64_t i) {
      try {
        results[i] = make(first + i);
      } catch (const Error& e) {
        errors[i] = e.what();
      }
    });
    for (int64_t i = 0; i < count; ++i) take(first + i, results[i], errors[i]);
  }
}

struct HalfReport {
  int64_t good = 0, bad = 0;
  std::vector<int64_t> of_class;
};

HalfReport check_half(const Dataset& data, ItemProgress& progress) {
  HalfReport report;
  report.of_class.resize(data.classes());
  const auto label = [&](int64_t i) {
    const int64_t label = data.get(i).label;
    check(label >= 0 && label < data.classes(), data.describe(i), ": has label ", label, " of ", data.classes(), " classes");
    return label;
  };
  for_each_sample(data, label, [&](int64_t, const std::optional<int64_t>& label, const std::string& error) {
    if (label) ++report.good, ++report.of_class[*label];
    if (!label) ++report.bad, progress.print("damaged: " + error, 1);
    progress.advance();
  });
  return report;
}

std::string describe(const char* half, const HalfReport& report, const std::vector<std::string>& names) {
  const auto [least, most] = std::minmax_element(report.of_class.begin(), report.of_class.end());
  const auto name = [&](auto at) { return names[at - report.of_class.begin()]; };
  return concat(half, ": ", report.good, " good and ", report.bad, " damaged images of ", names.size(), " classes; smallest '", name(least),
                "' with ", *least, ", largest '", name(most), "' with ", *most, "\n");
}

/// Appends pictures to a packed file that is being written.
class PackWriter {
 public:
  explicit PackWriter(OutputFile& out) : out_(out) { put(kPackedMagic); }
  void add(const StoredPicture& picture) {
    const auto bytes = picture.bytes();
    check(bytes.size() <= std::numeric_limits<uint32_t>::max(), "a picture of ", bytes.size(), " bytes is too large for a packed file");
    records_.push_back({at_, static_cast<uint32_t>(bytes.size()), static_cast<uint32_t>(crc32_z(0, bytes.data(), bytes.size())),
                        static_cast<uint32_t>(picture.label), static_cast<uint32_t>(picture.height), static_cast<uint32_t>(picture.width),
                        static_cast<uint32_t>(picture.channels)});
    put({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
  int64_t size() const { return static_cast<int64_t>(records_.size()); }
  uint64_t finish(const std::vector<std::string>& class_names, int64_t train) {
    put(packed_table(class_names, records_, train, at_));
    return at_;
  }

 private:
  void put(std::string_view bytes) {
    out_.write(bytes);
    at_ += bytes.size();
  }
  OutputFile& out_;
  uint64_t at_ = 0;
  std::vector<PackedRecord> records_;
};

/// The keys that a run on the packed file needs: its pixels are normalized as those of the data that were packed.
std::string keys_of(const RunConfig& config, const std::string& path) {
  RunConfig packed = config;
  packed.data.kind = "packed";
  const ImageConfig model = model_config(config, known_classes(config)).input();
  const TransformOptions before = make_transform(config, model), after = make_transform(packed, model);
  std::string keys = concat("--set data.kind=packed --set data.path=", path);
  const auto list = [&](const char* key, const std::vector<float>& values) {
    keys += concat(" --set ", key, "=[");
    for (size_t i = 0; i < values.size(); ++i) keys += concat(i == 0 ? "" : ",", values[i]);
    keys += "]";
  };
  if (before.mean != after.mean) list("data.mean", before.mean);
  if (before.std != after.std) list("data.std", before.std);
  return keys;
}

}  // namespace

bool check_data(const RunConfig& config) {
  use_threads(config);
  const DatasetPair data = open_data(config, false);
  std::string text;
  int64_t bad = 0;
  {
    ItemProgress progress("checking", data.train->size() + data.test->size());
    for (const auto& [name, half] : {std::pair{"training", data.train}, {"test", data.test}}) {
      const HalfReport report = check_half(*half, progress);
      text += describe(name, report, half->class_names());
      bad += report.bad;
    }
  }
  std::fputs(text.c_str(), stdout);
  return bad == 0;
}

std::string pack_data(const RunConfig& config, const PackSettings& settings) {
  use_threads(config);
  check_can_write(settings.path);
  const DatasetPair data = open_data(config, true);
  const bool skip = parse_on_bad_sample(config.data.on_bad_sample, "data.on_bad_sample") == OnBadSample::skip;
  const PackOptions options{settings.size, settings.raw, config.data.max_pixels};
  int64_t train = 0, test = 0, left_out = 0;
  uint64_t bytes = 0;
  write_file_atomically(settings.path, [&](OutputFile& out) {
    ItemProgress progress("packing", data.train->size() + data.test->size());
    PackWriter writer(out);
    const auto add = [&](const Dataset& half) {
      const int64_t before = writer.size();
      const auto make = [&](int64_t i) { return pack_picture(half, i, options); };
      for_each_sample(half, make, [&](int64_t, const std::optional<StoredPicture>& picture, const std::string& error) {
        if (!picture && !skip) throw Error(error + "\n  data.on_bad_sample: skip would leave damaged pictures out");
        if (picture) writer.add(*picture);
        if (!picture) ++left_out, progress.print("warning: a bad sample is left out: " + error, 2);
        progress.advance();
      });
      check(writer.size() > before, settings.path, ": no picture of a half is whole");
      return writer.size() - before;
    };
    train = add(*data.train);
    test = add(*data.test);
    bytes = writer.finish(data.train->class_names(), train);
  });
  std::string text = concat(settings.path, ": ", train, " training and ", test, " test images of ", data.train->classes(), " classes, ",
                            format_bytes(static_cast<int64_t>(bytes)));
  if (left_out > 0) text += concat(", ", left_out, " damaged ones left out");
  return concat(text, "\ntrain on it with ", keys_of(config, settings.path), "\n");
}

}  // namespace mesa
