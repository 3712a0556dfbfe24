// Codecs of the tests' own: one that watches another codec keep its promise, one that disturbs single elements.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "mesa/storage/policy.h"

namespace mesa::testing {

/// What the codec "audited" saw: every decoded element (when packed, and again when backward asks for it) against the exact one.
struct Audit {
  int64_t decoded = 0;  ///< tensors
  double worst = 0;     ///< the largest error as a fraction of the stated bound
  std::string worst_site;
  std::map<std::string, std::vector<double>> bounds;  ///< by site: the stated bound of each element
  static Audit& get();
};

/// What the codec "probe" does: keeps an own exact copy and adds `change` to one element of one site when it is decoded.
struct Probe {
  std::string site;
  int64_t element = -1;
  double change = 0;
  double share = 0;                     ///< the error it states, as a share of a group's range: ops choose their way back by it
  std::map<std::string, int64_t> seen;  ///< elements by site
  static Probe& get();
};

/// Registers both (once): {"*", "audited", {{"codec", "int8"}, {"groups", "heads"}}} watches int8 with groups: heads.
void register_test_codecs();

/// One way to store: a codec and its options.
struct Setting {
  std::string codec;
  CodecOptions options;
  std::string text() const;
};
/// Every codec with every kind of group, range and rounding.
const std::vector<Setting>& settings();

}  // namespace mesa::testing
