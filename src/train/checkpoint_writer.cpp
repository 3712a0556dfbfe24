#include "mesa/train/checkpoint_writer.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <system_error>

#include "checkpoint_files.h"
#include "mesa/base/threads.h"
#include "mesa/train/files.h"

namespace mesa {
namespace fs = std::filesystem;

CheckpointWriter::CheckpointWriter(std::string folder, int64_t keep, const std::string& resumed) : folder_(std::move(folder)), keep_(keep) {
  std::error_code ignored;
  if (resumed.empty() || !fs::equivalent(resumed, folder_ + "/last", ignored)) return;
  written_step_ = whole_last_ = step_of(resumed);
  try {
    prune(written_step_);   // a process that ended between the newest and the end of the oldest has left one more
  } catch (const Error&) {  // the next checkpoint tries it again
  }
}

CheckpointWriter::~CheckpointWriter() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::copy(const CheckpointParts& parts, const TrainingState& state) {
  check(!running_, "a checkpoint is copied while the one before it is being written");
  failed_.clear();
  data_ = snapshot_checkpoint(parts, state, std::move(data_));
}

void CheckpointWriter::write(std::vector<std::string> names, bool beside) {
  check(!running_, "two checkpoints are written at once");
  result_ = {data_.state.step, std::move(names), 0, "", ""};
  not_written_.clear();
  running_ = true;
  done_ = false;
  if (beside) try {
      const SignalsBlocked blocked;
      thread_ = std::thread([this] {
        ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), 19);  // Linux: of this thread alone
        run();
      });
      return;
    } catch (const std::system_error&) {  // no thread to be had
    }
  run();
}

void CheckpointWriter::run() {
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& name : result_.names) try {
      write_one(name);
    } catch (const std::exception& e) {
      not_written_.push_back(name);
      result_.error += concat(result_.error.empty() ? "" : "; ", "'", name, "': ", e.what());
    }
  result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  done_ = true;
}

void CheckpointWriter::write_one(const std::string& name) {
  if (name != "last") return write_checkpoint(folder_ + "/" + name, data_);
  const int64_t step = data_.state.step;
  const std::string former = keep_ > 0 ? former_name() : "";
  whole_last_ = -1;
  write_checkpoint(folder_ + "/last", data_, former);
  whole_last_ = step;
  try {
    prune(step);
  } catch (const std::exception& e) {  // what was written is whole all the same
    result_.leftover = e.what();
  }
}

/// Removes all older checkpoints but the newest, now that a newer one is whole. Those of later steps belong to a future that this run left
/// when it went back to an earlier checkpoint.
void CheckpointWriter::prune(int64_t step) const {
  int64_t kept = 0;
  for (const int64_t old : history_of(folder_))
    if (old >= step || ++kept > keep_) remove_folder(folder_ + "/" + history_name(old));
  remove_history_leftovers(folder_);
}

/// Where the present `last` goes on as an older checkpoint; "" if it is not worth it.
std::string CheckpointWriter::former_name() {
  const std::string last = folder_ + "/last";
  if (whole_last_ < 0 && recover_folder(last)) try {  // another process wrote it
      verify_folder(last);
      whole_last_ = step_of(last);
    } catch (const Error&) {
    }
  if (whole_last_ < 0 || whole_last_ >= data_.state.step) return "";
  const std::string former = folder_ + "/" + history_name(whole_last_);
  return fs::exists(former) ? "" : former;
}

bool CheckpointWriter::holds(const TrainingState& state) const {
  return written_step_ == state.step && written_evaluation_ == state.evaluated_step;
}

std::optional<CheckpointWriter::Result> CheckpointWriter::finished() {
  if (!running_ || !done_) return {};
  if (thread_.joinable()) thread_.join();
  running_ = false;
  failed_ = not_written_;
  const auto has_last = [](const std::vector<std::string>& names) { return std::find(names.begin(), names.end(), "last") != names.end(); };
  if (has_last(result_.names) && !has_last(failed_)) written_step_ = data_.state.step, written_evaluation_ = data_.state.evaluated_step;
  return result_;
}

std::optional<CheckpointWriter::Result> CheckpointWriter::wait() {
  if (thread_.joinable()) thread_.join();
  return finished();
}

}  // namespace mesa
