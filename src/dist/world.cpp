#include "mesa/dist/world.h"

#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>
#include <vector>

#include "host_communicator.h"
#include "mesa/base/threads.h"
#include "nccl_open.h"
#include "transport.h"

namespace mesa {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

int64_t number(const char* name) {
  const std::string text = variable(name);
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  check(!text.empty() && *end == '\0' && value >= 0, "the environment variable ", name, " is '", text, "'; it must be a whole number");
  return value;
}

/// What a launcher of MPI leaves in the environment of several processes: Open MPI, MPICH and Intel's, srun with a plugin for MPI.
bool started_by_mpi() {
  for (const char* size : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"})
    if (!variable(size).empty()) return true;
  return !variable("PMIX_RANK").empty() && !variable("SLURM_PROCID").empty();
}

std::string host_name() {
  char name[256] = "?";
  gethostname(name, sizeof name - 1);
  return name;
}

/// What its launcher calls this process, for as long as MPI cannot tell.
std::string own_name() {
  for (const char* rank : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"})
    if (!variable(rank).empty()) return concat("rank ", variable(rank), " (", host_name(), ")");
  return host_name();
}

RankInfo from_environment() {
  RankInfo me;
  me.rank = number("RANK"), me.world = number("WORLD_SIZE");
  me.local_rank = variable("LOCAL_RANK").empty() ? me.rank : number("LOCAL_RANK");
  check(me.world > 0 && me.rank < me.world, "RANK is ", me.rank, " and WORLD_SIZE ", me.world, "; ranks count from 0");
  me.host = host_name();
  return me;
}

/// A function of a plugin beside this library. `needed`: what for, in an error.
template <class Function>
Function* from_plugin(const char* plugin, const char* name, const std::string& needed) {
  Dl_info self;
  check(dladdr(reinterpret_cast<const void*>(&single_communicator), &self) != 0, "the library does not find itself");
  const std::string path = (std::filesystem::absolute(self.dli_fname).parent_path() / plugin).string();
  check(std::filesystem::exists(path), needed, ", which this build of Mesa has not (no ", path,
        "; of Debian's packages mesa-mpi and mesa-nccl bring them)");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);  // global: MPI's own plugins look for its symbols there
  check(library != nullptr, needed, ", which cannot be loaded: ", dlerror());
  auto* function = reinterpret_cast<Function*>(dlsym(library, name));
  check(function != nullptr, path, " is not of this version of Mesa");
  return function;
}

std::unique_ptr<Transport> open_mpi() {
  std::string why;
  auto* open =
      from_plugin<OpenTransport>("libmesa_mpi.so", "mesa_open_transport",
                                 "this process was started by MPI's launcher and needs MPI (ranks on GPUs can also be started with "
                                 "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT)");
  std::unique_ptr<Transport> transport(open(&why));
  check(transport != nullptr, why);
  return transport;
}

std::unique_ptr<Communicator> open_nccl(const RankInfo& me, Control& control) {
  const std::string needed = me.world > 1 ? "several ranks on GPUs need NCCL" : "one rank whose environment has MASTER_ADDR uses NCCL";
  std::string id;
  if (me.rank == 0) from_plugin<NcclId>("libmesa_nccl.so", "mesa_nccl_id", needed)(&id);
  id = control.exchange("the id of NCCL", id).front();
  return std::unique_ptr<Communicator>(from_plugin<OpenNccl>("libmesa_nccl.so", "mesa_open_nccl", needed)(&me, &id, &control));
}

/// What CUDA_VISIBLE_DEVICES says, if it is set: set but empty hides all GPUs.
std::optional<std::string> visible_gpus() {
  const char* const list = std::getenv("CUDA_VISIBLE_DEVICES");
  return list != nullptr ? std::optional<std::string>(list) : std::nullopt;
}

/// Each rank of a host gets a GPU of its own, of those that were visible: the process sees no other. Before CUDA is used for the first
/// time.
void choose_gpu(int64_t local_rank, const std::optional<std::string>& of) {
  std::vector<std::string> visible;
  std::istringstream list(of.value_or(""));
  for (std::string one; std::getline(list, one, ',');) visible.push_back(one);
  if (visible.size() == 1) return;  // the launcher has chosen
  const auto local = static_cast<size_t>(local_rank);
  const std::string own = !of ? std::to_string(local) : local < visible.size() ? visible[local] : "";
  setenv("CUDA_VISIBLE_DEVICES", own.c_str(), 1);
}

/// The local rank that the launcher tells before MPI starts: an MPI that knows of GPUs looks at them then, and a later choice would come
/// too late.
std::optional<int64_t> launched_local_rank() {
  for (const char* size : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"})
    if (variable(size) == "1") return {};
  const bool by_srun = !variable("SLURM_PROCID").empty() &&  // and not by a launcher of its own within a task of srun's
                       (variable("SLURM_PROCID") == variable("PMIX_RANK") || variable("SLURM_PROCID") == variable("PMI_RANK"));
  for (const char* local : {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", by_srun ? "SLURM_LOCALID" : ""})
    if (!variable(local).empty()) return number(local);
  return {};
}

/// Tasks of srun without MPI would each take itself for the whole run and write into the same folder.
void check_no_other_tasks() {
  const std::string tasks = variable("SLURM_STEP_NUM_TASKS");
  if (tasks.empty() || tasks == "1" || !variable("OMPI_COMM_WORLD_SIZE").empty()) return;  // mpirun may itself be a step's task
  fail("srun started ", tasks,
       " tasks that do not know of each other: start them with srun --mpi=pmix (srun --mpi=list tells what there is) ",
       "or mpirun; for GPUs RANK=$SLURM_PROCID, WORLD_SIZE=$SLURM_STEP_NUM_TASKS, LOCAL_RANK=$SLURM_LOCALID, MASTER_ADDR and MASTER_PORT "
       "do. ",
       "Runs that are to be alone say so by RANK=0 and WORLD_SIZE=1");
}

/// The leader's listening address, known to all.
std::string share(Transport& transport, const std::string& mine) {
  int64_t bytes = static_cast<int64_t>(mine.size());
  transport.broadcast(&bytes, sizeof bytes, 0);
  std::string text = transport.me().rank == 0 ? mine : std::string(static_cast<size_t>(bytes), '\0');
  transport.broadcast(text.data(), bytes, 0);
  return text;
}

/// Ends the process if a part of the set-up that nothing watches takes longer than it may: a rank that MPI waits for did not come. MPI does
/// not say which, but all others speak here.
class Deadline {
 public:
  explicit Deadline(double seconds) {
    const SignalsBlocked blocked;
    thread_ = std::thread([this, seconds] {
      std::unique_lock lock(mutex_);
      if (changed_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return over_; })) return;
      std::fprintf(stderr, "error: %s: MPI has not answered for %.0f seconds; a rank that does not say so is the one that did not come\n",
                   own_name().c_str(), seconds);
      std::this_thread::sleep_for(std::chrono::seconds(3));  // the launcher ends all with the first one, and each is to speak
      _exit(kExitRankLost);
    });
  }
  ~Deadline() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::thread thread_;
};

}  // namespace

int64_t launched_rank() {
  if (!started_by_mpi()) return variable("RANK").empty() ? 0 : number("RANK");
  for (const char* rank : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"})
    if (!variable(rank).empty()) return number(rank);
  return 0;
}

World::World(double timeout) {
  if (!variable("MESA_RANK_TIMEOUT").empty()) timeout = static_cast<double>(number("MESA_RANK_TIMEOUT"));
  check(timeout >= kLeastRankTimeout, "a rank timeout of ", timeout, " seconds is too short; it must be at least ", kLeastRankTimeout);
  try {
    connect(timeout);
  } catch (...) {
    static_cast<void>(transport_.release());  // its end would wait for the others
    throw;
  }
}

void World::connect(double timeout) {
  me_.host = host_name();
  const std::optional<std::string> gpus = visible_gpus();
  if (started_by_mpi()) {
    const Deadline deadline(timeout);
    if (const auto local = launched_local_rank()) choose_gpu(*local, gpus);
    transport_ = open_mpi();
    me_ = transport_->me();
    if (alone()) check_no_other_tasks();
  } else if (!variable("WORLD_SIZE").empty() && !variable("RANK").empty()) {
    me_ = from_environment();
  } else {
    check_no_other_tasks();
  }
  if (me_.world == 1 && (transport_ || variable("MASTER_ADDR").empty() || variable("MASTER_PORT").empty())) return;
  choose_gpu(me_.local_rank, gpus);  // the same, but where a launcher runs within another one, whose word it was
  if (transport_) {
    const std::unique_ptr<Listener> listener = leads() ? std::make_unique<Listener>() : nullptr;
    std::string address;
    {
      const Deadline deadline(timeout);
      address = share(*transport_, listener ? listener->address() : "");
    }
    control_ = listener ? std::make_unique<Control>(me_, *listener, timeout) : std::make_unique<Control>(me_, address, timeout);
  } else {
    check(!variable("MASTER_ADDR").empty(), "WORLD_SIZE is ", me_.world, " but MASTER_ADDR, the host of rank 0, is not set");
    const auto port = static_cast<int>(number("MASTER_PORT"));
    control_ = leads() ? std::make_unique<Control>(me_, Listener(port), timeout)
                       : std::make_unique<Control>(me_, concat(variable("MASTER_ADDR"), ":", port), timeout);
  }
}

/// All leave together, and as long as MPI's end takes the wire still watches.
World::~World() {
  try {
    if (control_ && !control_->failed()) control_->exchange("farewells", "");
  } catch (const RankFailure& e) {
    if (control_->speaks()) std::fprintf(stderr, "error: %s\n", e.what());
  }
  communicator_.reset();
  if (control_ && control_->failed()) static_cast<void>(transport_.release());  // its end would wait for ranks that are gone
  transport_.reset();
}

Communicator& World::communicator(Device device) {
  if (communicator_) return *communicator_;
  if (alone())
    communicator_ = single_communicator();
  else if (device.kind == DeviceKind::cuda)
    communicator_ = open_nccl(me_, *control_);
  else if (transport_)
    communicator_ = std::make_unique<HostCommunicator>(*transport_, control_.get());
  else if (me_.world == 1)
    communicator_ = single_communicator();
  else
    fail("the CPU engine's ranks talk through MPI: start them with mpirun");
  return *communicator_;
}

}  // namespace mesa
