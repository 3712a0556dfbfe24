// A folder of photos, one subfolder a class, as ImageNet is usually laid out.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <iterator>

#include "class_names.h"
#include "mesa/base/files.h"
#include "stored_dataset.h"

namespace mesa {

namespace {
namespace fs = std::filesystem;

struct ImageFile {
  std::string path;
  int64_t label;
};

class ImageFolder : public StoredDataset {
 public:
  ImageFolder(std::vector<ImageFile> files, std::vector<std::string> names, const DecodeOptions& decode)
      : StoredDataset(std::move(names), decode), files_(std::move(files)) {}
  int64_t size() const override { return static_cast<int64_t>(files_.size()); }
  std::string describe(int64_t index) const override {
    check(index >= 0 && index < size(), "sample ", index, " of a data set of ", size());
    return files_[index].path;
  }

 private:
  StoredPicture read(int64_t index) const override {
    StoredPicture picture;
    picture.label = files_[index].label;
    picture.memory = read_bytes(files_[index].path, kMaxImageFile);
    return picture;
  }
  std::vector<ImageFile> files_;
};

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with("."); }

bool is_picture(const fs::path& path) {
  std::string ending = path.extension().string();
  for (char& c : ending) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return ending == ".jpg" || ending == ".jpeg" || ending == ".png";
}

std::vector<std::string> class_folders(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    check(!entry.is_symlink() || entry.exists() || is_picture(entry.path()), entry.path().string(),
          ": is a link to nothing; is a disk not mounted?");
    if (entry.is_directory() && !is_hidden(entry.path())) names.push_back(entry.path().filename().string());
  }
  for (const std::string& name : names) check_utf8(name, folder.string(), "rename the folder (convmv does)");
  std::sort(names.begin(), names.end());
  return names;
}

/// Every picture below the class folders, by class, then by path, so that the numbering does not depend on the file system.
std::vector<ImageFile> list_files(const fs::path& folder, const std::vector<std::string>& names) {
  std::vector<ImageFile> files;
  for (size_t label = 0; label < names.size(); ++label) {
    const size_t before = files.size();
    for (const auto& entry : fs::recursive_directory_iterator(folder / names[label]))
      if (is_picture(entry.path()) && !is_hidden(entry.path()) && !entry.is_directory())
        files.push_back({entry.path().string(), static_cast<int64_t>(label)});
    check(files.size() > before, (folder / names[label]).string(),
          ": holds no .jpg, .jpeg or .png file; remove the empty class or add its pictures");
    std::sort(files.begin() + static_cast<int64_t>(before), files.end(), [](auto& a, auto& b) { return a.path < b.path; });
  }
  return files;
}

std::string only_in(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  std::vector<std::string> missing;
  std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(missing));
  return missing.empty() ? "" : missing.front();
}

std::shared_ptr<const Dataset> test_part(const DataOptions& options, const fs::path& test, const std::vector<std::string>& names,
                                         const DecodeOptions& decode) {
  check(!names.empty(), test.string(), ": holds no class folders");
  auto all = std::make_shared<ImageFolder>(list_files(test, names), names, decode);
  return random_part(all, options.test_size, options.seed, Half::test, test.string());
}

DatasetPair open_split(const DataOptions& options, const fs::path& train, const fs::path& test, const DecodeOptions& decode) {
  const auto names = class_folders(train), test_names = class_folders(test);
  check(!names.empty(), train.string(), ": holds no class folders");
  const std::string lost = only_in(names, test_names), extra = only_in(test_names, names);
  check(lost.empty(), test.string(), ": lacks the class '", lost, "' of ", train.string(), "; both must have the same class folders");
  check(extra.empty(), test.string(), ": has the class '", extra, "', which ", train.string(),
        " lacks; both must have the same class folders");
  auto train_set = std::make_shared<ImageFolder>(list_files(train, names), names, decode);
  return {random_part(train_set, options.train_size, options.seed, Half::train, train.string()), test_part(options, test, names, decode)};
}

DatasetPair open_unsplit(const DataOptions& options, const fs::path& folder, const DecodeOptions& decode) {
  const auto names = class_folders(folder);
  check(!names.empty(), folder.string(), ": holds neither train/ and val/ (or validation/, test/) nor class folders");
  if (!options.train && options.test_size == 0) return {nullptr, test_part(options, folder, names, decode)};
  check(options.test_size > 0, folder.string(),
        ": has class folders but no train/ and val/: set data.test_size to split it at random (by seed)");
  auto whole = std::make_shared<ImageFolder>(list_files(folder, names), names, decode);
  const int64_t test_size = options.test_size;
  const int64_t train_size = options.train && options.train_size > 0 ? options.train_size : whole->size() - test_size;
  check(test_size < whole->size() && train_size <= whole->size() - test_size, folder.string(), ": holds ", whole->size(),
        " pictures, too few for data.test_size ", test_size, " and data.train_size ", options.train_size);
  auto order = std::make_shared<const std::vector<int64_t>>(permutation(whole->size(), options.seed, "data.split", 0));
  return {subset(whole, test_size, train_size, order), subset(whole, 0, test_size, order)};
}
}  // namespace

DatasetPair open_image_folder(const DataOptions& options) {
  const fs::path folder(options.path);
  check(fs::is_directory(folder), "data.path: ", options.path, " is not a folder");
  const DecodeOptions decode = decode_options(options);
  const fs::path train = folder / "train";
  for (const char* name : {"val", "validation", "test"}) {
    const fs::path test = folder / name;
    if (!fs::is_directory(test)) continue;
    if (!options.train) return {nullptr, test_part(options, test, class_folders(test), decode)};
    if (fs::is_directory(train)) return open_split(options, train, test, decode);
  }
  if (!fs::is_directory(train)) return open_unsplit(options, folder, decode);
  fail("", folder.string(), ": has train/ but none of val/, validation/, test/");
}

}  // namespace mesa
