#include "mesa/base/scope.h"

namespace mesa {
namespace {
thread_local std::string current_path;
thread_local int64_t current_heads = 1;
}

Scope::Scope(const std::string& name, int64_t heads) : restore_(current_path.size()), restore_heads_(current_heads) {
  if (heads > 0) current_heads = heads;
  if (name.empty()) return;
  if (!current_path.empty()) current_path += '.';
  current_path += name;
}

Scope::~Scope() {
  current_path.resize(restore_);
  current_heads = restore_heads_;
}

int64_t Scope::heads() { return current_heads; }

const std::string& Scope::path() { return current_path; }

std::string Scope::join(const std::string& name) { return current_path.empty() ? name : current_path + "." + name; }

}  // namespace mesa
