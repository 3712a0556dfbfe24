#include "product_tuning.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "mesa/base/files.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/files.h"

namespace mesa {
namespace {

using Choices = std::map<std::string, std::string>;

std::string file_of(const std::string& folder, int64_t rank) {
  return concat(folder, "/products", rank > 0 ? concat("-rank", rank) : "", ".json");
}

/// What the file has for this library and GPU. Throws where it is damaged or of another.
Choices read_choices(const std::string& path) {
  const nlohmann::json file = nlohmann::json::parse(read_text(path));
  const std::string library = file.at("library");
  check(library == kernels::product_library(), "it is of ", library);
  return file.at("algorithms").get<Choices>();
}

}  // namespace

ProductTuning::ProductTuning(const std::string& folder, const std::string& checkpoint, int64_t rank,
                             std::function<void(const std::string&)> warn)
    : path_(file_of(folder, rank)), warn_(std::move(warn)) {
  const std::string before = std::filesystem::path(checkpoint).parent_path().parent_path().string();  // checkpoints/NAME lies in it
  Choices choices;
  std::string found;
  for (const std::string& path : {path_, file_of(folder, 0), file_of(before, rank), file_of(before, 0)})
    if (found.empty() && std::filesystem::exists(path)) found = path;
  try {
    if (!found.empty()) choices = read_choices(found);
    if (found.empty() && !checkpoint.empty()) warn_("no products.json is there: algorithms are chosen anew, and last bits may differ");
  } catch (const std::exception& e) {
    warn_(concat(found, " is not used, so algorithms are chosen anew, and last bits may differ: ", e.what()));
  }
  kernels::tune_products(true, choices);
  if (found == path_) kept_ = choices;
}

ProductTuning::~ProductTuning() { kernels::tune_products(false); }

void ProductTuning::keep() {
  const Choices choices = kernels::product_choices();
  if (choices == kept_) return;
  try {
    write_file_atomically(path_, nlohmann::json{{"library", kernels::product_library()}, {"algorithms", choices}}.dump(1) + "\n");
    kept_ = choices;
  } catch (const std::exception& e) {
    if (!std::exchange(warned_, true)) warn_(concat("the chosen algorithms are not kept: ", e.what()));
  }
}

}  // namespace mesa
