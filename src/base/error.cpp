#include "mesa/base/error.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "mesa/base/scope.h"

namespace mesa {

void detail::throw_error(const std::string& text, const Place& where) {
  const char* file = std::strrchr(where.file, '/');
  file = file ? file + 1 : where.file;
  const std::string& scope = Scope::path();
  throw Error(concat(scope, scope.empty() ? "" : ": ", text, "  (", file, ":", where.line, ")"));
}

namespace {
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row.back();
}
}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = std::max<size_t>(3, word.size() / 2) + 1;
  for (const auto& candidate : candidates) {
    const size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace mesa
