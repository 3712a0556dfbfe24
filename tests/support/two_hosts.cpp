#include "support/two_hosts.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <thread>

#include "mesa/base/error.h"
#include "mesa/base/files.h"
#include "support/mpirun.h"

namespace mesa::testing {
namespace {

namespace fs = std::filesystem;

/// The network namespace of a process: a link "net:[4026531840]"; empty if the process is gone or another user's.
std::string net_of(const fs::path& process) {
  std::error_code none;
  return fs::read_symlink(process / "ns/net", none).string();
}

std::vector<std::string> enter(pid_t pid) { return {"nsenter", "--target", std::to_string(pid), "--net", "--uts"}; }

/// Runs a line of sh on the host of this process; what went wrong, or nothing.
std::string shell_on(pid_t pid, const std::string& line) {
  std::vector<std::string> args = enter(pid);
  args.insert(args.end(), {"sh", "-ec", line});
  const ProcessResult result = run("/usr/bin/env", args);
  return result.code == 0 ? "" : concat("'", line, "': ", result.err);
}

}  // namespace

std::unique_ptr<TwoHosts> TwoHosts::make() {
  std::unique_ptr<TwoHosts> hosts(new TwoHosts);
  const std::string why = hosts->set_up();
  if (why.empty()) return hosts;
  WARN("skipped: no hosts can be made of network namespaces here: " << why);
  return nullptr;
}

/// A process that keeps new namespaces; it ends by itself should the test be killed.
std::string TwoHosts::start(Host& host, const std::string& name) {
  const std::string script = concat("hostname ", name, "; echo ready >&2; exec sleep 300");
  host.holder = std::make_unique<Process>("/usr/bin/env", std::vector<std::string>{"unshare", "--net", "--uts", "sh", "-ec", script});
  if (!host.holder->wait_for("ready", std::chrono::seconds(5))) return host.holder->finish(std::chrono::seconds(1)).err;
  host.pid = host.holder->pid();
  host.net = net_of(concat("/proc/", host.pid));
  return "";
}

std::string TwoHosts::set_up() {
  for (int i = 0; i < 2; ++i)
    if (const std::string why = start(hosts_[i], i == 0 ? kFirst : kSecond); !why.empty()) return why;
  // An address that both have, as hosts with Docker do: there nobody is found but oneself.
  for (const Host& host : hosts_)
    if (const std::string why =
            shell_on(host.pid, "ip link add docker0 type bridge; ip address add 172.17.0.1/16 dev docker0; ip link set docker0 up");
        !why.empty())
      return why;
  const std::string cable = concat("ip link add link0 type veth peer name link0 netns ", hosts_[1].pid);
  if (const std::string why = shell_on(hosts_[0].pid, cable); !why.empty()) return why;
  std::ofstream agent(folder_.path() / "agent"), hostfile(folder_.path() / "hosts");
  agent << "#!/bin/sh\n# In place of ssh: agent HOST COMMAND\nhost=$1; shift\ncase $host in\n";
  for (int i = 0; i < 2; ++i) {
    const std::string address = concat("192.0.2.", i + 1);
    const std::string up = concat("ip address add ", address, "/24 dev link0; ip link set link0 up; ip link set lo up");
    if (const std::string why = shell_on(hosts_[i].pid, up); !why.empty()) return why;
    hostfile << address << " slots=2\n";
    agent << "  " << address << ") pid=" << hosts_[i].pid << " ;;\n";
  }
  agent << "  *) echo \"no host $host\" >&2; exit 1 ;;\nesac\nexec nsenter --target $pid --net --uts sh -c \"$*\"\n";
  agent.close();
  fs::permissions(folder_.path() / "agent", fs::perms::owner_all);
  return "";
}

TwoHosts::~TwoHosts() {
  for (int round = 0; round < 20; ++round) {  // what is killed may have been starting something
    const auto left = processes();
    if (left.empty()) return;
    for (const auto& [pid, line] : left) kill(pid, SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

std::unique_ptr<Process> TwoHosts::mpirun(const std::vector<std::string>& options, const std::string& program,
                                          const std::vector<std::string>& args, Environment env, const std::string& folder) const {
  std::vector<std::string> all = enter(hosts_[0].pid);
  all.push_back("mpirun");
  for (std::string& arg : mpirun_args(4)) all.push_back(std::move(arg));
  all.insert(all.end(), {"--hostfile", (folder_.path() / "hosts").string(), "--mca", "plm_rsh_agent", (folder_.path() / "agent").string()});
  // Over the cable alone: the hosts share this machine's memory, which Open MPI must not find out.
  for (const char* option : {"btl tcp,self", "btl_tcp_if_include link0", "oob_tcp_if_include link0"}) {
    const std::string text = option;
    all.insert(all.end(), {"--mca", text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)});
  }
  all.insert(all.end(), options.begin(), options.end());
  all.push_back((fs::path(MESA_BIN_DIR) / program).string());
  all.insert(all.end(), args.begin(), args.end());
  return std::make_unique<Process>("/usr/bin/env", all, mpirun_environment(std::move(env)), folder);
}

void TwoHosts::cut() const {
  const std::string why = shell_on(hosts_[1].pid, "ip link set link0 down");
  INFO(why);
  REQUIRE(why.empty());
}

/// Without those that keep the namespaces.
std::vector<std::pair<pid_t, std::string>> TwoHosts::processes() const {
  std::vector<std::pair<pid_t, std::string>> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (!std::all_of(name.begin(), name.end(), ::isdigit)) continue;
    const pid_t pid = std::stoi(name);
    const std::string net = net_of(entry.path());
    if (net.empty() || (net != hosts_[0].net && net != hosts_[1].net) || pid == hosts_[0].pid || pid == hosts_[1].pid) continue;
    std::ifstream file(entry.path() / "cmdline", std::ios::binary);
    std::string line((std::istreambuf_iterator<char>(file)), {});
    std::replace(line.begin(), line.end(), '\0', ' ');
    if (!line.empty()) found.emplace_back(pid, line);  // a zombie has none
  }
  return found;
}

std::vector<std::string> TwoHosts::running(const std::string& program) const {
  std::vector<std::string> lines;
  for (const auto& [pid, line] : processes())
    if (fs::path(line.substr(0, line.find(' '))).filename().string().starts_with(program)) lines.push_back(line);
  return lines;
}

bool TwoHosts::all_gone(std::chrono::seconds limit, const std::string& program) const {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!running(program).empty()) {
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return true;
}

}  // namespace mesa::testing
