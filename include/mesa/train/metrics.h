// What a run tells about itself: tables in its folder that resume without seams, and one live line in the terminal.
#pragma once
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mesa/train/files.h"

namespace mesa {

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();  ///< an empty cell in CSV, null in JSON

/// One row of summary.csv, written after each epoch.
struct EpochRow {
  int64_t epoch = 0;
  double train_loss = kNotMeasured, eval_loss = kNotMeasured;
  double eval_top1 = kNotMeasured, eval_top5 = kNotMeasured;  ///< percent
  double lr = 0, images_per_second = 0;
  double activation_bytes_per_image = 0;
  int64_t peak_bytes = 0;
  double seconds = 0;
  int64_t step = 0;                                                                                 ///< updates tried by then
  double eval_loss_ema = kNotMeasured, eval_top1_ema = kNotMeasured, eval_top5_ema = kNotMeasured;  ///< of the average of the weights
};

/// Of several ranks the one that takes longest for its own work, and how many times the median that is; of an even number of ranks the
/// median is the faster of the two in the middle, so that of two ranks each is judged by the other.
struct Slowest {
  int64_t rank = 0;
  double ratio = 1;
};
Slowest slowest_of(const std::vector<double>& rank_seconds);

/// One line of metrics.jsonl, written each train.log_interval steps.
struct IntervalRow {
  int64_t step = 0, epoch = 0;
  double loss = kNotMeasured, lr = 0, grad_norm = kNotMeasured;
  double images_per_second = 0;
  double data_wait = 0;  ///< share of the time, 0 to 1
  double activation_bytes_per_image = 0;
  int64_t peak_bytes = 0;
  int64_t bad_steps = 0, bad_samples = 0;  ///< so far
  std::vector<double> rank_seconds = {};   ///< of several ranks: each one's own work for an update, without waiting for the others
  Slowest slowest = {};                    ///< of these
  double sync_wait = 0;                    ///< of several ranks: the leader's share of the time in which it waited for their gradients
  /// Shares of the loader threads' time, 0 to 1; the rest they were idle.
  double data_read = 0, data_decode = 0, data_augment = 0;
  int64_t checkpoint_step = -1;   ///< of the newest checkpoint that this process has on the disk as `last`; -1: none yet, null in JSON
  double checkpoint_writing = 0;  ///< share of the steps' time beside which a checkpoint was being written, 0 to 1
};

/// One row of memory.csv: what one site keeps for the backward pass.
struct MemoryRow {
  std::string site, shape, codec;
  int64_t exact_bytes = 0, kept_bytes = 0;
  double saturated = 0;  ///< share of the elements that lay outside a running range
};

/// One row of health.csv: how well one site's values are stored, at a step that was looked at.
struct HealthRow {
  int64_t step = 0;
  std::string site, codec;
  double relative_error = kNotMeasured;  ///< |decoded - x| / |x|, root of sums of squares over the site's elements of the update
  double clamped = 0;                    ///< share of these elements that lay outside the range
};

struct RunSummary {
  double top1 = kNotMeasured, top5 = kNotMeasured;  ///< percent
  double eval_loss = kNotMeasured, train_loss = kNotMeasured;
  double top1_ema = kNotMeasured, top5_ema = kNotMeasured, eval_loss_ema = kNotMeasured;  ///< of the average of the weights
  int64_t epochs = 0, steps = 0;
  double images_per_second = 0;
  int64_t parameters = 0;
  double activation_bytes_per_image = 0, exact_activation_bytes_per_image = 0;
  int64_t peak_bytes = 0;
  std::string device, storage;
  int64_t seed = 0;
};

/// summary.csv. With `last_epoch` (resume) rows of later epochs and a torn last line are dropped, so that the file of a resumed run is that
/// of an uninterrupted one; the rows of a file that has the first columns only get empty cells. Without it the file starts anew. Throws
/// mesa::Error on I/O errors and on a file of another kind.
class EpochLog {
 public:
  explicit EpochLog(const std::string& path, std::optional<int64_t> last_epoch = {});
  void append(const EpochRow& row);

 private:
  OutputFile file_;
};

/// metrics.jsonl, in the same way by step.
class IntervalLog {
 public:
  explicit IntervalLog(const std::string& path, std::optional<int64_t> last_step = {});
  void append(const IntervalRow& row);

 private:
  OutputFile file_;
};

/// health.csv, in the same way by step; made with the first row.
class HealthLog {
 public:
  explicit HealthLog(const std::string& path, std::optional<int64_t> last_step = {});
  void append(std::span<const HealthRow> rows);

 private:
  OutputFile file_;
};

/// A cell of RFC 4180: the shortest text that reads back as the same number, empty for NaN; or text, in quotes where it needs them (a shape
/// such as [2, 3] holds a comma).
std::string csv_cell(double x);
std::string csv_cell(const std::string& text);
/// Cells of RFC 4180, where quotes may hold commas and line breaks; a torn last line is left out.
std::vector<std::vector<std::string>> parse_csv(const std::string& text);

void write_memory_csv(const std::string& path, std::span<const MemoryRow> rows);
void write_summary_json(const std::string& path, const RunSummary& summary);

struct ProgressState {
  int64_t epoch = 0, epochs = 0;  ///< epoch counts from 1
  int64_t step = 0, steps = 0;    ///< within the epoch
  double loss = kNotMeasured, lr = 0, images_per_second = 0;
  double data_wait = 0;         ///< share of the time, 0 to 1
  double activation_bytes = 0;  ///< kept by one step
  double eta_seconds = kNotMeasured;
};

/// Tells when training waits for data for more than a tenth of the time, judged over ten seconds of training at a time.
class WaitWatch {
 public:
  /// After each update: what it took, and how much of that it waited. The share, where it is now known to be too much.
  std::optional<double> add(double seconds, double wait);

 private:
  double seconds_ = 0, wait_ = 0;
};

/// Tells when a rank takes more than 1.5 times the median for its own work, judged over 50 updates or more at a time.
class StragglerWatch {
 public:
  /// After so many updates, the mean of each rank's seconds for one. The slowest rank, where it is now known to be too slow.
  std::optional<Slowest> add(const std::vector<double>& rank_seconds, int64_t updates);

 private:
  std::vector<double> seconds_;
  int64_t updates_ = 0;
};

/// One line of at most `width` columns; what is least needed goes first when there is no room. A width of 0 means no limit and no bar.
std::string format_progress(const ProgressState& state, int width);
/// "[=====>    ]", `width` columns between the brackets, of which the share `done` is full.
std::string format_bar(double done, int width);
/// Columns of the terminal behind a file descriptor; 80 where it does not say.
int terminal_width(int fd);
/// "1:02:03", "2:03"
std::string format_duration(double seconds);

/// The live line. On a terminal it is redrawn in place at most ten times a second; elsewhere a plain line is printed each `log_interval`
/// steps and at the end of an epoch. The estimated time left comes from the steps seen by this object.
class Progress {
 public:
  using Clock = std::function<double()>;  ///< seconds
  /// total_steps: of the whole run, first_step: those done before (resume); fd: where to print.
  Progress(int64_t total_steps, int64_t first_step, int64_t log_interval, int fd = 2, Clock clock = {});
  ~Progress();
  /// After each step; eta_seconds is filled in here.
  void update(ProgressState state);
  /// On a terminal, between steps: the live line says this for now.
  void tell(const std::string& text);
  /// Prints a line above the live one.
  void print(const std::string& text);
  /// Leaves the live line as it stands and goes to the next.
  void finish();

 private:
  void put(const std::string& text);
  void draw(const std::string& line, double now);
  int fd_;
  bool terminal_, line_open_ = false, broken_ = false;
  int64_t total_steps_, done_steps_, first_step_, log_interval_;
  Clock clock_;
  double start_, last_drawn_;
  std::string last_;
};

}  // namespace mesa
