#include "support/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "mesa/base/files.h"

namespace mesa::testing {
namespace {

using Clock = std::chrono::steady_clock;

std::chrono::milliseconds until(Clock::time_point end) {
  return std::max(std::chrono::milliseconds(0), std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()));
}

// Takes what is there; closes the pipe at its end.
void drain(int& fd, std::string& text) {
  char block[4096];
  const ssize_t got = ::read(fd, block, sizeof block);
  if (got > 0) {
    text.append(block, static_cast<size_t>(got));
  } else if (got == 0 || errno != EINTR) {
    ::close(fd);
    fd = -1;
  }
}

}  // namespace

Process::Process(const std::string& program, const std::vector<std::string>& args, const Environment& env, const std::string& folder) {
  const std::string path = program.find('/') == std::string::npos ? std::string(MESA_BIN_DIR) + "/" + program : program;
  std::vector<char*> argv{const_cast<char*>(path.c_str())};
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
  pid_ = fork();
  if (pid_ < 0) throw std::runtime_error("no fork");
  if (pid_ == 0) {
    dup2(out[1], 1), dup2(err[1], 2);
    setenv("OMP_NUM_THREADS", "1", 1);
    for (const auto& [name, value] : env) setenv(name.c_str(), value.c_str(), 1);
    if (chdir(folder.c_str()) == 0) execv(path.c_str(), argv.data());
    dprintf(2, "cannot run %s in %s\n", path.c_str(), folder.c_str());
    _exit(127);
  }
  ::close(out[1]), ::close(err[1]);
  out_ = out[0], err_ = err[0];
}

Process::~Process() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (out_ >= 0) ::close(out_);
  if (err_ >= 0) ::close(err_);
}

void Process::send(int signal) { kill(pid_, signal); }

bool Process::read_some(std::chrono::milliseconds limit) {
  pollfd fds[2] = {{out_, POLLIN, 0}, {err_, POLLIN, 0}};
  const int ready = poll(fds, 2, static_cast<int>(limit.count()));
  if (ready <= 0) return ready < 0 && errno == EINTR;
  if (out_ >= 0 && fds[0].revents) drain(out_, result_.out);
  if (err_ >= 0 && fds[1].revents) drain(err_, result_.err);
  return true;
}

bool Process::wait_for(const std::string& text, std::chrono::milliseconds limit) {
  const auto end = Clock::now() + limit;
  while (result_.err.find(text) == std::string::npos)
    if (err_ < 0 || Clock::now() >= end || !read_some(until(end))) return false;
  return true;
}

ProcessResult Process::finish(std::chrono::seconds limit) {
  const auto end = Clock::now() + limit;
  while ((out_ >= 0 || err_ >= 0) && Clock::now() < end) read_some(until(end));
  if (out_ >= 0 || err_ >= 0) {
    result_.timed_out = true;
    kill(pid_, SIGKILL);
  }
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  result_.code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return result_;
}

ProcessResult run(const std::string& program, const std::vector<std::string>& args, const Environment& env, const std::string& folder) {
  return Process(program, args, env, folder).finish();
}

std::vector<std::vector<std::string>> read_csv(const std::string& path) {
  std::vector<std::vector<std::string>> rows;
  std::istringstream lines(read_text(path));
  for (std::string line; std::getline(lines, line);) {
    rows.emplace_back();
    std::istringstream cells(line);
    for (std::string cell; std::getline(cells, cell, ',');) rows.back().push_back(cell);
    if (line.ends_with(',')) rows.back().emplace_back();
  }
  return rows;
}

}  // namespace mesa::testing
