// What tests of the emulated GPU share: arrays on the device, and crashes that are looked at.
#pragma once
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_memory.h"

namespace mesa::testing {

/// An array in device memory, which the host reads and writes through copies only.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : size_(values.size()) {
    if (cudaMalloc(&memory_, size_ * sizeof(T)) != cudaSuccess) throw std::runtime_error("no device memory");
    set(values);
  }
  OnDevice(std::initializer_list<T> values) : OnDevice(std::vector<T>(values)) {}
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return static_cast<T*>(memory_); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void set(const std::vector<T>& values) {
    if (cudaMemcpy(memory_, values.data(), bytes(), cudaMemcpyHostToDevice) != cudaSuccess) throw std::runtime_error("no copy");
  }
  std::vector<T> get() const {
    std::vector<T> out(size_);
    if (cudaMemcpy(out.data(), memory_, bytes(), cudaMemcpyDeviceToHost) != cudaSuccess) throw std::runtime_error("no copy");
    return out;
  }

 private:
  void* memory_ = nullptr;
  size_t size_;
};

/// How a child process ended that ran `f`: "signal 11" or "exit 0", and what it wrote to stderr.
struct End {
  std::string how, err;
};
template <class F>
End end_of(F&& f) {
  int err[2];
  if (pipe(err) != 0) throw std::runtime_error("no pipe");
  const pid_t child = fork();
  if (child == 0) {
    for (const int one : {SIGSEGV, SIGABRT}) signal(one, SIG_DFL);  // not the test framework's
    { const emulation::DeviceAccess access; }                       // but the emulation's again
    dup2(err[1], STDERR_FILENO);
    f();
    _exit(0);
  }
  close(err[1]);
  End end;
  char block[4096];
  for (ssize_t got; (got = read(err[0], block, sizeof block)) > 0;) end.err.append(block, static_cast<size_t>(got));
  close(err[0]);
  int status = 0;
  waitpid(child, &status, 0);
  end.how = WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status)) : "exit " + std::to_string(WEXITSTATUS(status));
  return end;
}

/// What the emulation said on stderr while `f` ran.
template <class F>
std::string said(F&& f) {
  const int kept = dup(STDERR_FILENO);
  char name[] = "/tmp/emulation-XXXXXX";
  const int file = mkstemp(name);
  if (file < 0) throw std::runtime_error("no temporary file");
  unlink(name);
  dup2(file, STDERR_FILENO);
  f();
  dup2(kept, STDERR_FILENO);
  close(kept);
  std::string text(static_cast<size_t>(lseek(file, 0, SEEK_END)), '\0');
  if (pread(file, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) throw std::runtime_error("no text");
  close(file);
  return text;
}

}  // namespace mesa::testing
