// Two hosts on this machine: network namespaces with a cable between them, each with its own host name.
#pragma once
#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "support/data_files.h"
#include "support/process.h"

namespace mesa::testing {

/// mesa-a (192.0.2.1) and mesa-b (192.0.2.2) over "link0". The namespaces have no names outside: they live as long as a process in them, so
/// that nothing stays behind, however a test ends.
class TwoHosts {
 public:
  static constexpr const char *kFirst = "mesa-a", *kSecond = "mesa-b";

  /// Null, with a warning in the test's output, where this machine permits no namespaces or lacks `ip`.
  static std::unique_ptr<TwoHosts> make();
  /// Ends every process that is left on a host.
  ~TwoHosts();

  /// mpirun on the first host, with two ranks on each. `options` go before the program of the build.
  std::unique_ptr<Process> mpirun(const std::vector<std::string>& options, const std::string& program, const std::vector<std::string>& args,
                                  Environment env, const std::string& folder) const;
  /// Unplugs the cable.
  void cut() const;
  /// Command lines of what runs on the hosts; only of programs whose name begins with `program`.
  std::vector<std::string> running(const std::string& program = "") const;
  /// Whether they end within this time.
  bool all_gone(std::chrono::seconds limit, const std::string& program = "") const;

 private:
  struct Host {
    std::unique_ptr<Process> holder;
    pid_t pid = 0;  // of a process in the namespaces
    std::string net;
  };
  TwoHosts() = default;
  /// Empty, or why it could not be done.
  std::string set_up();
  static std::string start(Host& host, const std::string& name);
  std::vector<std::pair<pid_t, std::string>> processes() const;

  TemporaryFolder folder_;  // hostfile and remote agent
  Host hosts_[2];
};

}  // namespace mesa::testing
