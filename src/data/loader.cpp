#include "mesa/data/loader.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>

#include "mesa/base/error.h"
#include "mesa/base/threads.h"

namespace mesa {

OnBadSample parse_on_bad_sample(const std::string& text, const std::string& key) {
  if (text == "error") return OnBadSample::error;
  check(text == "skip", key, " must be error or skip, it is '", text, "'");
  return OnBadSample::skip;
}

namespace {
constexpr int kMaxBadInARow = 20;  // as timm: more mean that the disk or the whole set is broken

struct Skip {
  std::string name, reason;
};

/// A batch in preparation. Workers claim chunks of its positions under the loader's mutex and write disjoint parts of its tensors.
struct Job {
  Batch batch;
  int64_t size = 0, claimed = 0, done = 0;
  std::vector<std::vector<Skip>> skips;  // by position, so that reports do not depend on who was first
  std::exception_ptr error;
  int64_t error_position = 0;
};

int64_t default_workers() {
  cpu_set_t set;
  const int64_t processors = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::clamp<int64_t>(processors / 4, 1, 16);
}
}  // namespace

class Loader::Impl {
 public:
  Impl(std::shared_ptr<const Dataset> dataset, const TransformOptions& transform, const LoaderOptions& options);
  ~Impl();
  void start_epoch(int64_t epoch, int64_t first_batch);
  std::optional<Batch> next();
  int64_t batches_per_epoch() const;
  StageTimes stage_times();
  int64_t workers() const { return static_cast<int64_t>(threads_.size()); }

  std::shared_ptr<const Dataset> dataset_;
  double wait_seconds_ = 0;
  int64_t skipped_ = 0;
  std::vector<std::string> skipped_samples_;

 private:
  struct Slot {
    Tensor images, labels, mirrored, mixing;
    bool free() const {
      for (const Tensor* t : {&images, &labels, &mirrored, &mixing})
        if (t->defined() && t->buffer().use_count() > 1) return false;
      return true;
    }
  };
  bool mirrors_later() const { return options_.train && transform_.flip > 0 && transform_.flips_last(); }
  bool mixes() const { return options_.train && options_.mix.on(); }
  /// Which sample stands at a place of the epoch, and for which time. With r repeats a group of r pairs comes r times, and each time the
  /// second samples stand beside the next first one: neighbours, which Mixup and CutMix mix, are never the same picture or pair twice.
  int64_t group() const { return 2 * options_.repeats; }
  int64_t repeat_at(int64_t place) const { return place / group() % options_.repeats; }
  int64_t sample_at(int64_t place) const {
    const int64_t first = place / (group() * options_.repeats) * group(), in_turn = place % group();
    return first + (in_turn % 2 == 0 ? in_turn : (in_turn + 2 * repeat_at(place)) % group());
  }
  int64_t global_batch() const { return options_.batch_size * options_.world_size; }
  Slot new_slot() const;
  Slot free_slot() const;
  Tensor mix(const Slot& slot, const Job& job) const;
  void post_jobs();
  void end_threads();
  void work();
  void fill(Job& job, int64_t from, int64_t count);
  void fill_one(Job& job, int64_t position);
  Dataset::Sample get_or_replace(int64_t& index, std::vector<Skip>& skips) const;
  void report(const Job& job);

  const TransformOptions transform_;
  const LoaderOptions options_;
  std::vector<Slot> slots_;
  std::vector<int64_t> order_;  // empty: 0, 1, 2, ...
  bool started_ = false;
  int64_t epoch_ = 0, posted_ = 0;
  int64_t chunk_ = 1;
  std::set<std::string> reported_;

  std::mutex mutex_;
  std::condition_variable work_ready_, batch_ready_;
  std::deque<std::shared_ptr<Job>> jobs_;  // in order of delivery
  int64_t busy_ = 0;                       // chunks in the hands of workers
  bool stop_ = false;
  StageTimes stage_times_;
  std::vector<std::thread> threads_;
};

Loader::Impl::Impl(std::shared_ptr<const Dataset> dataset, const TransformOptions& transform, const LoaderOptions& options)
    : dataset_(std::move(dataset)), transform_(transform), options_(options) {
  transform.validate();
  const int64_t size = dataset_->size();
  check(size > 0, "the data set is empty");
  check(options.batch_size > 0, "the batch size must be positive, it is ", options.batch_size);
  check(options.workers >= 0 && options.workers <= 1024, "the number of workers must lie in 0..1024, it is ", options.workers);
  check(options.repeats > 0, "each picture must come at least once, repeats is ", options.repeats);
  check(options.prefetch > 0, "the loader must prepare at least one batch ahead, prefetch is ", options.prefetch);
  check(!mixes() || (options.batch_size % 2 == 0 && options.drop_last), "mixup and CutMix need full batches of an even size, not ",
        options.batch_size);
  check(options.world_size > 0 && options.rank >= 0 && options.rank < options.world_size, "rank ", options.rank, " of ",
        options.world_size);
  check(!options.drop_last || global_batch() <= size, "a batch of ", global_batch(), " pictures is larger than the data set of ", size,
        "; choose a smaller train.batch_size");
  const int64_t workers = options.workers > 0 ? options.workers : default_workers();
  chunk_ = std::clamp<int64_t>(options.batch_size / (2 * workers), 1, 16);
  for (int64_t i = 0; i < options.prefetch + 2; ++i) slots_.push_back(new_slot());  // one in the caller's hands, one about to be
  const SignalsBlocked blocked;
  try {
    for (int64_t i = 0; i < workers; ++i) {
      threads_.emplace_back([this] { work(); });
      pthread_setname_np(threads_.back().native_handle(), "mesa-data");
    }
  } catch (const std::system_error& e) {
    const size_t started = threads_.size();
    end_threads();
    fail("only ", started, " of ", workers, " loader threads could be started (", e.what(), "); lower data.workers");
  }
}

Loader::Impl::~Impl() { end_threads(); }

void Loader::Impl::end_threads() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_ready_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

StageTimes Loader::Impl::stage_times() {
  const std::lock_guard lock(mutex_);
  return stage_times_;
}

int64_t Loader::Impl::batches_per_epoch() const {
  const int64_t whole = dataset_->size() / global_batch();
  return options_.drop_last || dataset_->size() % global_batch() == 0 ? whole : whole + 1;
}

Loader::Impl::Slot Loader::Impl::new_slot() const {
  const int64_t b = options_.batch_size, side = transform_.image_size;
  const Device memory = options_.pinned ? kPinned : kCpu;
  return {Tensor::empty({b, side, side, transform_.channels}, DType::u8, memory, MemoryKind::inputs),
          Tensor::empty({b}, DType::i64, memory, MemoryKind::inputs),
          mirrors_later() ? Tensor::empty({b}, DType::u8, memory, MemoryKind::inputs) : Tensor(),
          mixes() ? Tensor::empty({b, Mixing::kNumbers}, DType::f32, memory, MemoryKind::inputs) : Tensor()};
}

/// Runs on the caller's thread, so that "nobody else holds it" cannot change under it. A caller who keeps many batches gets more memory.
Loader::Impl::Slot Loader::Impl::free_slot() const {
  for (const Slot& slot : slots_)
    if (slot.free()) return slot;
  return new_slot();
}

Tensor Loader::Impl::mix(const Slot& slot, const Job& job) const {
  if (!mixes()) return {};
  const MixPlace place{job.batch.epoch, job.batch.index, options_.rank * options_.batch_size};
  const std::vector<Mixing> drawn = draw_mixing(options_.mix, options_.seed, place, job.size, transform_.image_size, transform_.image_size);
  std::memcpy(slot.mixing.data<float>(), drawn.data(), drawn.size() * sizeof(Mixing));
  return slot.mixing;
}

void Loader::Impl::start_epoch(int64_t epoch, int64_t first_batch) {
  check(epoch >= 0 && first_batch >= 0 && first_batch <= batches_per_epoch(), "the loader cannot start at epoch ", epoch, ", batch ",
        first_batch, " of ", batches_per_epoch());
  {
    std::unique_lock lock(mutex_);
    for (auto& job : jobs_) job->claimed = job->size;  // nobody takes more of the old epoch
    batch_ready_.wait(lock, [&] { return busy_ == 0; });
    jobs_.clear();
  }
  if (options_.shuffle) order_ = permutation(dataset_->size(), options_.seed, "data.order", static_cast<uint64_t>(epoch));
  epoch_ = epoch;
  posted_ = first_batch;
  started_ = true;
  post_jobs();
}

/// Keeps `prefetch` batches in preparation.
void Loader::Impl::post_jobs() {
  while (posted_ < batches_per_epoch()) {
    {
      const std::lock_guard lock(mutex_);
      if (static_cast<int64_t>(jobs_.size()) >= options_.prefetch) return;
    }
    auto job = std::make_shared<Job>();
    const int64_t first = posted_ * global_batch() + options_.rank * options_.batch_size;
    const int64_t last = std::min(first + options_.batch_size, dataset_->size());
    for (int64_t i = first; i < last; ++i) job->batch.sample_indices.push_back(order_.empty() ? sample_at(i) : order_[sample_at(i)]);
    job->size = static_cast<int64_t>(job->batch.sample_indices.size());
    job->skips.resize(job->size);
    const Slot slot = free_slot();
    job->batch.images = slot.images.narrow(0, 0, job->size);
    job->batch.labels = slot.labels.narrow(0, 0, job->size);
    if (slot.mirrored.defined()) job->batch.mirrored = slot.mirrored.narrow(0, 0, job->size);
    job->batch.epoch = epoch_;
    job->batch.index = posted_++;
    job->batch.mixing = mix(slot, *job);
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    work_ready_.notify_all();
  }
}

std::optional<Batch> Loader::Impl::next() {
  check(started_, "start_epoch() must come before next()");
  std::shared_ptr<Job> job;
  {
    std::unique_lock lock(mutex_);
    if (jobs_.empty()) return std::nullopt;
    job = jobs_.front();
    const auto before = std::chrono::steady_clock::now();
    batch_ready_.wait(lock, [&] { return job->done == job->size; });
    wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    if (job->error) std::rethrow_exception(job->error);  // the job stays in front: the next call fails the same way
    jobs_.pop_front();
  }
  report(*job);
  for (int64_t i = 0; i < job->size; ++i)
    if (!job->skips[i].empty()) job->batch.replaced.push_back(i);
  post_jobs();
  return std::move(job->batch);
}

void Loader::Impl::report(const Job& job) {
  for (const auto& skips : job.skips)
    for (const Skip& skip : skips) {
      ++skipped_;
      if (reported_.insert(skip.name).second) skipped_samples_.push_back(skip.reason);
    }
}

void Loader::Impl::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const auto open = std::find_if(jobs_.begin(), jobs_.end(), [](auto& job) { return job->claimed < job->size; });
    if (open == jobs_.end()) {
      work_ready_.wait(lock);
      continue;
    }
    const std::shared_ptr<Job> job = *open;
    const int64_t from = job->claimed, count = std::min(chunk_, job->size - from);
    job->claimed += count;
    ++busy_;
    lock.unlock();
    const StageTimes before = mesa::stage_times();
    fill(*job, from, count);
    const StageTimes spent = mesa::stage_times() - before;
    lock.lock();
    stage_times_ += spent;
    --busy_;
    job->done += count;
    if (job->done == job->size || busy_ == 0) batch_ready_.notify_all();
  }
}

void Loader::Impl::fill(Job& job, int64_t from, int64_t count) {
  for (int64_t position = from; position < from + count; ++position) try {
      fill_one(job, position);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!job.error || position < job.error_position) {
        job.error = std::current_exception();
        job.error_position = position;
      }
    }
}

void Loader::Impl::fill_one(Job& job, int64_t position) {
  int64_t& index = job.batch.sample_indices[position];
  const int64_t place = job.batch.index * global_batch() + options_.rank * options_.batch_size + position;
  RandomStream random = augmentation_stream(options_.seed, job.batch.epoch, index, repeat_at(place));
  const StageScope decoding(Stage::decode);
  const Dataset::Sample sample = get_or_replace(index, job.skips[position]);
  const StageScope augmenting(Stage::augment);
  uint8_t* out = job.batch.images.data<uint8_t>() + position * transform_.bytes();
  if (options_.train)
    transform_for_training(sample.image, transform_, random, out,
                           job.batch.mirrored.defined() ? job.batch.mirrored.data<uint8_t>() + position : nullptr);
  else
    transform_for_evaluation(sample.image, transform_, out);
  job.batch.labels.data<int64_t>()[position] = sample.label;
}

/// The sample, or the next good one; `index` becomes the one that was taken.
Dataset::Sample Loader::Impl::get_or_replace(int64_t& index, std::vector<Skip>& skips) const {
  for (;;) try {
      return dataset_->get(index);
    } catch (const Error& error) {
      if (options_.on_bad_sample == OnBadSample::error)
        throw Error(concat(error.what(), "\n  data.on_bad_sample: skip would replace damaged pictures by the next good one"));
      skips.push_back({dataset_->describe(index), error.what()});
      if (static_cast<int>(skips.size()) == kMaxBadInARow)
        fail("the last of ", kMaxBadInARow, " damaged pictures in a row, the first was ", skips.front().name, ": ", error.what());
      index = (index + 1) % dataset_->size();
    }
}

Loader::Loader(std::shared_ptr<const Dataset> dataset, const TransformOptions& transform, const LoaderOptions& options)
    : impl_(std::make_unique<Impl>(std::move(dataset), transform, options)) {}
Loader::~Loader() = default;
void Loader::start_epoch(int64_t epoch, int64_t first_batch) { impl_->start_epoch(epoch, first_batch); }
std::optional<Batch> Loader::next() { return impl_->next(); }
const Dataset& Loader::dataset() const { return *impl_->dataset_; }
int64_t Loader::batches_per_epoch() const { return impl_->batches_per_epoch(); }
double Loader::wait_seconds() const { return impl_->wait_seconds_; }
StageTimes Loader::stage_times() const { return impl_->stage_times(); }
int64_t Loader::workers() const { return impl_->workers(); }
int64_t Loader::skipped() const { return impl_->skipped_; }
const std::vector<std::string>& Loader::skipped_samples() const { return impl_->skipped_samples_; }

}  // namespace mesa
