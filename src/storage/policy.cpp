#include "mesa/storage/policy.h"

#include <fnmatch.h>

#include <algorithm>

#include "mesa/kernels/elementwise.h"

namespace mesa {

Tensor Saved::get() const {
  check(defined(), "a backward pass asks for an activation that was not kept");
  if (entry_->recipe) return (*entry_->recipe)();
  const Packed& packed = entry_->packed;
  if (packed.parts[0].is_meta() && (entry_->codec->leaves(packed.parts[0].device()) || !entry_->codec->shares_input(packed.dtype)))
    return Tensor::empty(packed.shape, packed.dtype, packed.parts[0].device());
  return entry_->codec->unpack(packed);
}

std::optional<kernels::Coded> Saved::coded() const {
  check(defined(), "a backward pass asks for an activation that was not kept");
  if (entry_->recipe) return {};
  return entry_->codec->coded(entry_->packed);
}

std::optional<kernels::Coded> Saved::coded_on_gpu() const {
  auto found = coded();
  if (found && !is_gpu(found->codes.device())) found.reset();
  return found;
}

double Saved::error() const { return defined() && entry_->codec ? entry_->codec->error_bound(0, 1) : 0; }

namespace {

/// One saved view: the buffer's id is never reused, so equal keys mean equal contents.
struct ViewKey {
  uint64_t buffer;
  int64_t offset;
  std::vector<int64_t> extents;
  std::string codec;
  auto operator<=>(const ViewKey&) const = default;
};

ViewKey view_key(const Tensor& x, const std::string& codec) {
  ViewKey key{x.buffer()->id(), x.offset(), {x.shape().begin(), x.shape().end()}, codec};
  key.extents.insert(key.extents.end(), x.strides().begin(), x.strides().end());
  return key;
}

std::string describe(const StorageRule& rule) {
  std::string text = rule.codec;
  for (const auto& [key, value] : rule.options) text += " " + key + "=" + value;
  return text;
}

void count_as_activation(const Tensor& t) {
  if (t.buffer()->kind() == MemoryKind::workspace) t.buffer()->retag(MemoryKind::activations);
}

/// Bytes that a kept tensor adds: inputs and parameters are counted under their own kinds.
int64_t counted_bytes(const Tensor& t) { return t.buffer()->kind() == MemoryKind::activations ? t.bytes() : 0; }

}  // namespace

struct StoragePolicy::Impl {
  struct SiteState {
    SiteRecord record;
    const StorageRule* rule = nullptr;
    const StorageRule* fallback = nullptr;  // the last matching rule that does not rebuild
    std::shared_ptr<Codec> codec;           // null for rebuild
    Tensor counts;                          // this site's row of the counters
    int64_t elements = 0;                   // that this pass has packed
  };

  std::string name;
  std::vector<StorageRule> rules;
  std::vector<bool> matched;
  std::vector<std::string> order;
  std::map<std::string, SiteState> sites;
  std::map<ViewKey, std::weak_ptr<const Saved::Entry>> kept;  // of this pass
  std::map<std::string, Tensor> pending_state;
  uint64_t seed = 0, step = 0;
  const uint64_t* live_step = nullptr;
  std::string first_nonfinite;
  // Elements that codecs found odd since the last harvest: rows of [2] i64 where the tensors live, so that no pack waits for a device.
  std::vector<Tensor> counters;
  int64_t rows_used = 0;  // of the last block
  bool counting = false;
  Observer observer;

  SiteState& site_state(const Site& site);
  void load_pending(SiteState& state);
  const Tensor& counts_of(SiteState& state, Device device);
  void harvest();
  PackContext context_of(SiteState& state, DType dtype, Device device) {
    const Site& site = state.record.site;
    const bool counts = !state.codec->shares_input(dtype);  // what is kept as it is has no odd elements
    counting |= counts;
    static const Tensor nowhere;
    return {site, RandomKey::of(seed, site.name(), step, live_step), counts ? counts_of(state, device) : nowhere};
  }
  std::shared_ptr<const Saved::Entry> keep(Packed packed, SiteState& state, Device device);
  std::shared_ptr<const Saved::Entry> pack(const Tensor& x, SiteState& state);
};

StoragePolicy::StoragePolicy(std::string name, std::vector<StorageRule> rules) : impl_(std::make_unique<Impl>()) {
  for (const auto& rule : rules) {
    const std::string place = rule.where.empty() ? "" : rule.where + ": ";
    if (rule.match.empty()) throw UsageError(place + "a storage rule has an empty match");
    try {
      make_codec(rule.codec, rule.options);
    } catch (const Error& e) {
      throw UsageError(place + "storage rule '" + rule.match + "': " + e.what());
    }
  }
  impl_->name = std::move(name);
  impl_->matched.assign(rules.size(), false);
  impl_->rules = std::move(rules);
}

StoragePolicy::~StoragePolicy() = default;
StoragePolicy::StoragePolicy(StoragePolicy&&) noexcept = default;
StoragePolicy& StoragePolicy::operator=(StoragePolicy&&) noexcept = default;

StoragePolicy::Impl::SiteState& StoragePolicy::Impl::site_state(const Site& site) {
  const std::string site_name = site.name();
  auto [found, fresh] = sites.try_emplace(site_name);
  SiteState& state = found->second;
  if (!fresh) return state;
  order.push_back(site_name);
  state.record.site = site;
  for (size_t i = 0; i < rules.size(); ++i)
    if (fnmatch(rules[i].match.c_str(), site_name.c_str(), FNM_EXTMATCH) == 0) {
      matched[i] = true;
      state.rule = &rules[i];
      if (rules[i].codec != "rebuild") state.fallback = &rules[i];
    }
  if (state.rule == nullptr) return state;
  state.codec = make_codec(state.rule->codec, state.rule->options);
  load_pending(state);
  return state;
}

void StoragePolicy::Impl::load_pending(SiteState& state) {
  const std::string prefix = state.record.site.name() + "/";
  std::map<std::string, Tensor> mine;
  for (auto it = pending_state.lower_bound(prefix); it != pending_state.end() && it->first.starts_with(prefix);
       it = pending_state.erase(it))
    mine[it->first.substr(prefix.size())] = it->second;
  if (mine.empty()) return;
  check(state.codec != nullptr, "the checkpoint has a running range for ", state.record.site.name(), ", which this policy rebuilds");
  state.codec->load_state(mine);
}

/// Blocks of rows that double: a model's few hundred sites are read back in a handful of copies.
const Tensor& StoragePolicy::Impl::counts_of(SiteState& state, Device device) {
  if (!state.counts.defined()) {
    if (counters.empty() || rows_used == counters.back().dim(0)) {
      const Shape rows{counters.empty() ? 8 : 2 * counters.back().dim(0), 2};
      counters.push_back(Tensor::zeros(rows, DType::i64, device, MemoryKind::tables));
      rows_used = 0;
    }
    state.counts = counters.back().select(0, rows_used++);
  }
  return state.counts;
}

/// Adds what was counted to the sites' records and starts from 0 again. Waits for the device.
void StoragePolicy::Impl::harvest() {
  if (!counting) return;
  counting = false;
  int64_t rows = 0;
  for (const Tensor& block : counters) rows += block.dim(0);
  const Tensor gathered = Tensor::empty({rows, 2}, DType::i64, counters.front().device());  // one copy to wait for, not one for each block
  std::map<uint64_t, int64_t> first_of;
  rows = 0;
  for (const Tensor& block : counters) {
    transfer(block, gathered.narrow(0, rows, block.dim(0)));
    clear(block);
    first_of[block.buffer()->id()] = 2 * rows;
    rows += block.dim(0);
  }
  const Tensor on_host = to(gathered, kCpu);
  for (const std::string& site_name : order) {
    SiteState& site = sites.at(site_name);
    if (!site.counts.defined()) continue;
    const int64_t* found = on_host.data<int64_t>() + first_of.at(site.counts.buffer()->id()) + site.counts.offset();
    site.record.saturated += found[0];
    site.record.nonfinite += found[1];
    if (found[1] > 0 && first_nonfinite.empty()) first_nonfinite = site_name;
  }
}

std::shared_ptr<const Saved::Entry> StoragePolicy::Impl::keep(Packed packed, SiteState& state, Device device) {
  check(!packed.parts.empty(), "the codec ", state.rule->codec, " packed nothing");
  state.record.elements += packed.shape.numel();
  state.elements += packed.shape.numel();
  state.record.kept_bytes = 0;
  for (const Tensor& part : packed.parts) {
    count_as_activation(part);
    if (part.device() == device) state.record.kept_bytes += counted_bytes(part);
  }
  auto entry = std::make_shared<Saved::Entry>();
  entry->codec = state.codec;
  entry->packed = std::move(packed);
  return entry;
}

std::shared_ptr<const Saved::Entry> StoragePolicy::Impl::pack(const Tensor& x, SiteState& state) {
  const bool leaves = state.codec->leaves(x.device());
  const PackContext context = context_of(state, x.dtype(), x.device());
  if (!x.is_meta() || (!leaves && state.codec->shares_input(x.dtype()))) return keep(state.codec->pack(x, context), state, x.device());
  // A plan: no codes, but on a GPU, where places matter, the tensors that would hold them, else the promised bytes.
  if (is_gpu(x.device()))
    if (Opened room = state.codec->open(x.shape(), x.dtype(), x.device(), context); room.codes.defined())
      return keep(std::move(room.packed), state, x.device());
  const Tensor promised =
      Tensor::empty({leaves ? 0 : state.codec->packed_bytes(x.shape(), x.dtype(), context.site)}, DType::u8, x.device());
  return keep({{promised}, x.shape(), x.dtype(), {}}, state, x.device());
}

SavedAhead StoragePolicy::open(const Site& site, const Shape& shape, DType dtype, Device device) {
  Impl::SiteState& state = impl_->site_state(site);
  if (!is_gpu(device) || state.codec == nullptr || impl_->observer) return {};
  const PackContext context = impl_->context_of(state, dtype, device);
  Opened opened = state.codec->open(shape, dtype, device, context);
  if (!opened.codes.defined()) return {};
  state.record.shape = shape;
  state.record.dtype = dtype;
  state.record.exact_bytes = shape.numel() * size_of(dtype);
  state.record.codec = state.rule->codec;
  return {Saved(impl_->keep(std::move(opened.packed), state, device)), std::move(opened.codes)};
}

SavedAhead StoragePolicy::open(const Site& site, const Tensor& x) {
  const Impl::SiteState& state = impl_->site_state(site);
  if (!is_gpu(x.device()) || state.codec == nullptr) return {};
  auto& slot = impl_->kept[view_key(x, describe(*state.rule))];
  if (!slot.expired()) return {};  // save finds it
  const SavedAhead ahead = open(site, x.shape(), x.dtype(), x.device());
  if (ahead.defined()) slot = ahead.saved.entry_;
  return ahead;
}

bool StoragePolicy::shares_input(const Site& site, DType dtype) {
  const Impl::SiteState& state = impl_->site_state(site);
  return state.codec != nullptr && state.codec->shares_input(dtype);
}

Saved StoragePolicy::save(const Tensor& x, const Site& site, const std::shared_ptr<const Recipe>& recipe, bool constant) {
  Impl::SiteState& state = impl_->site_state(site);
  if (state.rule != nullptr && state.codec == nullptr && recipe == nullptr && constant && state.fallback != nullptr) {
    state.rule = state.fallback;
    state.codec = make_codec(state.rule->codec, state.rule->options);
    impl_->load_pending(state);
  }
  check(state.rule != nullptr, "no storage rule of policy '", impl_->name, "' matches the site ", site.name(),
        "; begin the policy with {match: \"*\", codec: exact}");
  SiteRecord& record = state.record;
  record.shape = x.shape();
  record.dtype = x.dtype();
  record.exact_bytes = x.buffer()->kind() == MemoryKind::inputs ? 0 : x.bytes();
  record.codec = state.rule->codec;
  if (state.codec == nullptr) {
    check(recipe != nullptr, state.rule->where, state.rule->where.empty() ? "" : ": ", "the rule '", state.rule->match, "' rebuilds ",
          site.name(), ", but its value is not computed from anything that is kept; give that site a codec");
    auto entry = std::make_shared<Saved::Entry>();
    entry->recipe = recipe;
    record.kept_bytes = 0;
    return Saved(entry);
  }
  // A buffer saved twice with one codec is packed once.
  auto& slot = impl_->kept[view_key(x, describe(*state.rule))];
  if (auto entry = slot.lock()) {
    record.kept_bytes = 0;
    record.codec = "shared";
    return Saved(entry);
  }
  auto entry = impl_->pack(x, state);
  slot = entry;
  if (impl_->observer) impl_->observer(record, x, Saved(entry));
  return Saved(entry);
}

void StoragePolicy::observe(Observer observer) { impl_->observer = std::move(observer); }

void StoragePolicy::keep(const Tensor& statistic, const Site& site) {
  auto [found, fresh] = impl_->sites.try_emplace(site.name());  // no rule applies, so none is matched by it
  if (fresh) impl_->order.push_back(site.name());
  SiteRecord& record = found->second.record;
  record.site = site;
  count_as_activation(statistic);
  record.shape = statistic.shape();
  record.dtype = statistic.dtype();
  record.codec = "statistic";
  record.exact_bytes = record.kept_bytes = counted_bytes(statistic);
  record.elements += statistic.numel();
}

void StoragePolicy::begin(uint64_t seed, uint64_t step, const uint64_t* live_step) {
  impl_->harvest();
  impl_->seed = seed;
  impl_->step = step;
  impl_->live_step = live_step;
  impl_->kept.clear();
  impl_->first_nonfinite.clear();
  for (auto& [site_name, site] : impl_->sites) site.elements = 0;
}

void StoragePolicy::repeat() {
  impl_->harvest();
  impl_->first_nonfinite.clear();
  impl_->counting = !impl_->counters.empty();
  for (auto& [site_name, site] : impl_->sites) {
    site.record.elements += site.elements;
    if (site.codec && site.elements > 0) site.codec->repeat();
  }
}

uint64_t StoragePolicy::phase() const {
  uint64_t all = 0;
  for (const auto& [site_name, site] : impl_->sites) {
    if (!site.codec) continue;
    const uint64_t phase = site.codec->phase();
    check(phase != 0 || site.codec->state().empty(), "the codec ", site.rule->codec, " of ", site_name,
          " has running state but no phase, so that its work cannot be recorded; train.cuda_graph: false runs it");
    all = mix64(all ^ phase);
  }
  return all;
}

const std::string& StoragePolicy::name() const { return impl_->name; }
const std::string& StoragePolicy::first_nonfinite() const {
  impl_->harvest();
  return impl_->first_nonfinite;
}

std::vector<SiteRecord> StoragePolicy::sites() const {
  impl_->harvest();
  std::vector<SiteRecord> out;
  for (const auto& site_name : impl_->order) out.push_back(impl_->sites.at(site_name).record);
  return out;
}

void StoragePolicy::reset_counts() {
  impl_->harvest();
  for (auto& [site_name, state] : impl_->sites) state.record.elements = state.record.saturated = state.record.nonfinite = 0;
}

void StoragePolicy::check_rules_matched() const {
  for (size_t i = 0; i < impl_->rules.size(); ++i) {
    if (impl_->matched[i]) continue;
    const StorageRule& rule = impl_->rules[i];
    std::string near = nearest(rule.match, impl_->order);
    std::string list;
    for (size_t j = 0; j < impl_->order.size() && j < 8; ++j) list += (j ? ", " : "") + impl_->order[j];
    throw UsageError(concat(rule.where, rule.where.empty() ? "" : ": ", "the storage rule '", rule.match, "' matches no site",
                            near.empty() ? "" : "; the nearest is '" + near + "'", ". This model's sites begin with ", list,
                            "; --dry-run lists them all"));
  }
}

std::map<std::string, Tensor> StoragePolicy::state() const {
  std::map<std::string, Tensor> out = impl_->pending_state;
  for (const auto& [site_name, site] : impl_->sites)
    if (site.codec)
      for (const auto& [key, tensor] : site.codec->state()) out[site_name + "/" + key] = tensor;
  return out;
}

void StoragePolicy::commit() {
  for (auto& [site_name, site] : impl_->sites)
    if (site.codec) site.codec->commit();
}

void StoragePolicy::roll_back() {
  for (auto& [site_name, site] : impl_->sites)
    if (site.codec) site.codec->roll_back();
}

void StoragePolicy::load_state(std::map<std::string, Tensor> state) {
  impl_->pending_state = std::move(state);
  for (auto& [site_name, site] : impl_->sites) impl_->load_pending(site);
}

}  // namespace mesa
