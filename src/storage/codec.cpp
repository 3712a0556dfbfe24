#include "mesa/storage/codec.h"

#include <algorithm>

#include "builtin_codecs.h"

namespace mesa {
namespace {

struct Registered {
  std::vector<std::string> options;
  CodecFactory make;
};

std::map<std::string, Registered>& registry() {
  static std::map<std::string, Registered> codecs = [] {
    std::map<std::string, Registered> all;
    const std::vector<std::string> affine{"groups", "range", "decay", "rounding"};
    for (int bits : {8, 4, 2})
      all["int" + std::to_string(bits)] = {affine, [bits](const CodecOptions& o) { return make_affine_codec(bits, o); }};
    all["exact"] = {{}, [](const CodecOptions&) { return make_exact_codec(); }};
    all["host"] = {{}, [](const CodecOptions&) { return make_host_codec(); }};
    all["bf16"] = {{}, [](const CodecOptions&) { return make_bf16_codec(); }};
    all["rebuild"] = {{}, [](const CodecOptions&) { return std::unique_ptr<Codec>(); }};  // keeps nothing: the policy follows the recipe
    return all;
  }();
  return codecs;
}

template <class Map>
std::string suggestion(const std::string& word, const Map& known) {
  const std::string near = nearest(word, known);
  return near.empty() ? "" : "; did you mean '" + near + "'?";
}

}  // namespace

void Codec::load_state(const std::map<std::string, Tensor>& state) {
  check(state.empty(), "this codec keeps no running state, but the checkpoint has some");
}

void register_codec(const std::string& name, std::vector<std::string> options, CodecFactory factory) {
  check(registry().count(name) == 0, "a codec named '", name, "' exists already");
  registry()[name] = {std::move(options), std::move(factory)};
}

std::vector<std::string> codec_names() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : registry()) names.push_back(name);
  return names;
}

std::unique_ptr<Codec> make_codec(const std::string& name, const CodecOptions& options) {
  const auto found = registry().find(name);
  check(found != registry().end(), "unknown codec '", name, "'", suggestion(name, codec_names()));
  const auto& known = found->second.options;
  for (const auto& [key, value] : options)
    check(std::find(known.begin(), known.end(), key) != known.end(), "codec '", name, "' has no option '", key, "'",
          suggestion(key, known));
  return found->second.make(options);
}

}  // namespace mesa
