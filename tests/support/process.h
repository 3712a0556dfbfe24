// Programs run as a user runs them: a child process with its output in pipes, which cannot outlive its time limit.
#pragma once
#include <sys/types.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

namespace mesa::testing {

struct ProcessResult {
  int code = -1;  ///< exit code; 128 + n when signal n ended it
  bool timed_out = false;
  std::string out, err;
};

using Environment = std::map<std::string, std::string>;

class Process {
 public:
  /// Starts a program of the build ("mesa-train") or a path. One compute thread unless `env` says otherwise: several would wait for each
  /// other on a loaded machine, and models this small gain nothing from them. `folder`: where it runs.
  Process(const std::string& program, const std::vector<std::string>& args, const Environment& env = {}, const std::string& folder = ".");
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void send(int signal);
  /// Reads until stderr holds the text or the time is over; false in the second case and when the program ended without it.
  bool wait_for(const std::string& text, std::chrono::milliseconds limit = std::chrono::seconds(60));
  ProcessResult finish(std::chrono::seconds limit = std::chrono::seconds(300));

 private:
  bool read_some(std::chrono::milliseconds limit);
  pid_t pid_ = -1;
  int out_ = -1, err_ = -1;
  ProcessResult result_;
};

ProcessResult run(const std::string& program, const std::vector<std::string>& args, const Environment& env = {},
                  const std::string& folder = ".");

/// Lines of a CSV file without quotes, as cells.
std::vector<std::vector<std::string>> read_csv(const std::string& path);

}  // namespace mesa::testing
