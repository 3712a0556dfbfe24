// The one place that decides what is kept of each activation, and how.
#pragma once
#include <optional>

#include "mesa/storage/saved.h"

namespace mesa {

/// One line of a policy: sites whose name matches the glob, in which @(a|b) means a or b, use this codec. The last rule that matches wins.
struct StorageRule {
  std::string match, codec;
  CodecOptions options;
  std::string where;  ///< file:line for errors; may be empty
};

/// What is known of one site since it was first seen.
struct SiteRecord {
  Site site;
  Shape shape;
  DType dtype = DType::f32;
  std::string codec;        ///< as the rule says; "statistic" for exact values an op keeps, "shared" for a second save of one buffer
  int64_t exact_bytes = 0;  ///< what the tensor itself takes
  int64_t kept_bytes = 0;   ///< what is really kept of it, scales included
  int64_t elements = 0, saturated = 0, nonfinite = 0;  ///< since reset_counts()
};

/// A value whose kernel packs it: the handle, and what the kernel needs. Undefined where the policy has no such codec at this site.
struct SavedAhead {
  Saved saved;
  kernels::Coding codes;
  bool defined() const { return saved.defined(); }
};

class StoragePolicy {
 public:
  /// Checks every rule; throws UsageError with the rule's place.
  StoragePolicy(std::string name, std::vector<StorageRule> rules);
  ~StoragePolicy();
  StoragePolicy(StoragePolicy&&) noexcept;
  StoragePolicy& operator=(StoragePolicy&&) noexcept;

  /// Keeps what the rule of this site says. `recipe` (may be null) is how to rebuild x from what is saved already. Of a `constant` x
  /// nothing before was saved, since it depends on nothing trainable or comes from an op that keeps nothing: where a rule says rebuild, the
  /// matching rule before that one holds.
  Saved save(const Tensor& x, const Site& site, const std::shared_ptr<const Recipe>& recipe, bool constant = false);
  /// The same before the value exists, on a GPU and for codecs that can: a kernel then writes the codes as it computes the value.
  SavedAhead open(const Site& site, const Shape& shape, DType dtype, Device device);
  /// The same for a tensor that exists and that a kernel is about to read.
  SavedAhead open(const Site& site, const Tensor& x);
  /// True if this site's codec would keep x's own buffer.
  bool shares_input(const Site& site, DType dtype);
  /// Registers an exact statistic that an op captures itself.
  void keep(const Tensor& statistic, const Site& site);
  /// A new forward pass: random numbers of (seed, step), no buffer known yet. `live_step`: see RandomKey.
  void begin(uint64_t seed, uint64_t step, const uint64_t* live_step = nullptr);
  /// The last pass once more, by work on a device that was recorded in the same phase.
  void repeat();
  uint64_t phase() const;

  /// Called by save for each value that is packed, with what backward will find; null, as at first: by nobody. Meanwhile no kernel packs
  /// what it computes, so that there is a value to look at; the codes are the same.
  using Observer = std::function<void(const SiteRecord& site, const Tensor& x, const Saved& saved)>;
  void observe(Observer observer);

  const std::string& name() const;
  std::vector<SiteRecord> sites() const;  ///< in order of first use
  void reset_counts();
  /// The first site of this pass where a NaN or infinity was packed, or "". Waits for the device, as sites() and begin() do.
  const std::string& first_nonfinite() const;
  /// Throws UsageError for a rule that matched no site so far, listing the nearest sites.
  void check_rules_matched() const;

  /// Running state as it is now is what roll_back() returns to: after a good update. A bad update must leave no trace in the ranges.
  void commit();
  void roll_back();

  /// Running state by "site/name", for the checkpoint. load_state is taken up when a site is first used.
  std::map<std::string, Tensor> state() const;
  void load_state(std::map<std::string, Tensor> state);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mesa
