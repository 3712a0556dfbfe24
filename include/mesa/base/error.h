// Errors for people: what was wrong, where, and what to do.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mesa {

/// Every failure that a user can cause or meet. The text begins with the scope path (if any) and ends with the source position.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A mistake in a command line or a config file; apps exit with 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// The system or the GPU has no more memory. Whoever knows the run may add what would fit.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

namespace detail {
struct Place {  // std::source_location, which clang 14 does not offer with libstdc++
  const char* file;
  int line;
};
struct Condition {  // remembers where the check stands
  Condition(bool ok, const char* file = __builtin_FILE(), int line = __builtin_LINE()) : ok(ok), where{file, line} {}
  bool ok;
  Place where;
};
struct Located {
  Located(const char* text, const char* file = __builtin_FILE(), int line = __builtin_LINE()) : text(text), where{file, line} {}
  const char* text;
  Place where;
};
[[noreturn]] void throw_error(const std::string& text, const Place& where);
}  // namespace detail

/// check(n == c, "gamma has ", n, " elements but x ends in ", c) throws mesa::Error unless the condition holds.
template <class... Parts>
void check(detail::Condition condition, const Parts&... parts) {
  if (!condition.ok) [[unlikely]] detail::throw_error(concat(parts...), condition.where);
}

/// Throws mesa::Error; the first part is a literal.
template <class... Parts>
[[noreturn]] void fail(detail::Located first, const Parts&... parts) {
  detail::throw_error(concat(first.text, parts...), first.where);
}

/// "did you mean" helper: the candidate with the smallest edit distance to `word`, or "" when none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace mesa
