// Checkpoints written beside training, against disks that fail and processes that die at each operation of a save.
#include "mesa/train/checkpoint_writer.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "mesa/base/files.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/optim/adamw.h"
#include "mesa/train/files.h"
#include "mesa/train/setup.h"
#include "support/data_files.h"
#include "support/device.h"
#include "support/disk.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const char* const kConfig = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, classes: 4}\nseed: 5\n";

bool is_all(const Tensor& x, float value) {
  const std::vector<float> values = x.to_vector<float>();
  return std::all_of(values.begin(), values.end(), [&](float v) { return v == value; });
}

/// A model whose weights and moments tell which step they belong to.
struct Model {
  RunConfig config = parse_config(kConfig, "c.yaml");
  BuiltModel model{config, model_config(config, 4)};
  StoragePolicy policy = make_policy(config.storage);
  int64_t branch = 0;
  AdamW optimizer{(model.params.allocate_gradients(), model.params.params()), {}};
  std::vector<std::string> classes{"a", "b", "c", "d"};

  std::map<std::string, Tensor> moments = optimizer.state();  // handles of what the optimizer has

  CheckpointParts parts() const { return {config, classes, model.params, optimizer, moments, policy}; }
  TrainingState at(int64_t step) const {
    for (const Param& param : model.params.params()) kernels::fill(param.value, static_cast<double>(step));
    for (const auto& [name, moment] : optimizer.state()) kernels::fill(moment, 0.5 * static_cast<double>(step));
    TrainingState state;
    state.step = step, state.branch = branch;
    return state;
  }
  /// The step of a checkpoint, all of whose numbers must be of it.
  int64_t load(const std::string& folder) {
    const int64_t step = load_checkpoint(folder, config, model.params, optimizer, policy).state.step;
    for (const Param& param : model.params.params()) REQUIRE(is_all(param.value, static_cast<float>(step)));
    for (const auto& [name, moment] : optimizer.state()) REQUIRE(is_all(moment, 0.5F * static_cast<float>(step)));
    return step;
  }
};

/// checkpoints/ of a run that has written the steps 1, 2 and 3 and keeps two older ones.
struct History {
  TemporaryFolder folder;
  Model model;
  std::string run = (folder.path() / "run").string(), at = run + "/checkpoints", ready = (folder.path() / "ready").string();
  History() {
    CheckpointWriter writer(at, 2, "");
    for (int64_t step = 1; step <= 3; ++step)
      write(writer, step, step == 2 ? std::vector<std::string>{"best", "last"} : std::vector<std::string>{"last"});
    fs::copy(at, ready, fs::copy_options::recursive);
  }
  ~History() { set_file_fault({}); }
  /// As it was before the next save.
  void reset() const {
    fs::remove_all(at);
    fs::copy(ready, at, fs::copy_options::recursive);
  }
  CheckpointWriter::Result write(CheckpointWriter& writer, int64_t step, std::vector<std::string> names = {"best", "last"},
                                 bool beside = true) const {
    writer.copy(model.parts(), model.at(step));
    writer.write(std::move(names), beside);
    return *writer.wait();
  }
  std::set<std::string> names() const {
    std::set<std::string> out;
    for (const auto& entry : fs::directory_iterator(at)) out.insert(entry.path().filename().string());
    return out;
  }
  std::string resumed(std::vector<std::string>* rejected = nullptr) const {
    return find_checkpoint("auto", run, [&](const std::string& why) {
      if (rejected == nullptr) FAIL_CHECK("rejected: " << why);
      if (rejected != nullptr) rejected->push_back(why);
    });
  }
};

/// Whether a file system without exchanges and lost power are tried. Sanitizers look at memory, and make a fork long; of a GPU only the
/// copy differs.
bool everything() {
#ifdef __SANITIZE_ADDRESS__
  return false;
#else
  return test_device() == kCpu;
#endif
}

bool exchange_fails(std::string_view operation) { return operation == "exchange"; }

/// Saves step 4 in a process that dies at the operation number `at`, or right behind the last one, of a power failure where there is
/// something to lose. False if the save had no such operation.
bool dies(const History& h, CheckpointWriter& writer, int at, std::optional<Disk::Loss> loss, bool exchange_works) {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    Disk disk(h.at);
    const auto die = [&] {
      if (loss) disk.lose(*loss);
      _exit(9);
    };
    set_file_fault([&](std::string_view operation, const std::string& path) {
      if (++count == at) die();
      disk.note(operation, path);
      return exchange_fails(operation) && !exchange_works ? EINVAL : 0;
    });
    writer.write({"best", "last"}, at % 2 == 0);  // beside training and not
    writer.wait();
    set_file_fault({});
    if (++count == at) die();
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  REQUIRE((WEXITSTATUS(status) == 9 || WEXITSTATUS(status) == 0));
  return WEXITSTATUS(status) == 9;
}

/// After whatever happened to the save of step 4, the run goes on from a whole checkpoint, and leaves no more than it should.
int64_t check_goes_on(History& h) {
  const std::string found = h.resumed();
  const int64_t step = h.model.load(found);
  CHECK((step == 3 || step == 4));
  for (const std::string& name : h.names()) {  // what has a name is whole
    CHECK_NOTHROW(verify_folder(h.at + "/" + name));
    const auto state = nlohmann::json::parse(read_text(h.at + "/" + name + "/state.json"));
    CHECK(state["step"] <= step);  // no update is made twice that a whole checkpoint has
    CHECK_FALSE((name.ends_with(".tmp") || name.ends_with(".old")));
  }
  CheckpointWriter writer(h.at, 2, found);
  CHECK(h.write(writer, 5, {"last"}).error.empty());
  CHECK(h.model.load(h.resumed()) == 5);
  const std::set<std::string> names = h.names();
  CHECK(names.size() <= 4);
  CHECK(names.count("best") == 1);
  CHECK(names.count("step-00000003") == 1);
  return step;
}

}  // namespace

TEST_CASE("checkpoint writer: a process that dies at any operation of a save leaves checkpoints to resume", "[disk][slow]") {
  History h;
  using Loss = std::optional<Disk::Loss>;
  const Loss killed, bytes_lost = Disk::Loss{false, false}, all_lost = Disk::Loss{true, true};
  for (const bool exchange_works : {true, false})
    for (const Loss& loss : {killed, bytes_lost, all_lost, Loss({true, false}), Loss({false, true})}) {
      if (!everything() && (!exchange_works || loss)) continue;
      std::set<int64_t> found;
      int at = 1;
      for (;; ++at) {
        CAPTURE(exchange_works, loss.has_value(), loss && loss->outer, loss && loss->inner, at);
        h.reset();
        CheckpointWriter writer(h.at, 2, h.at + "/last");
        writer.copy(h.model.parts(), h.model.at(4));
        if (!dies(h, writer, at, loss, exchange_works)) break;
        found.insert(check_goes_on(h));
      }
      CHECK(at > 40);
      CHECK(found == std::set<int64_t>{3, 4});
    }
}

TEST_CASE("checkpoint writer: a disk that fails at any operation of a save costs nothing", "[disk]") {
  History h;
  const int code = GENERATE(ENOSPC, EIO, kShortWrite);
  for (const bool exchange_works : {true, false}) {
    if (!everything() && !exchange_works) continue;
    int failures = 0, at = 1;
    for (;; ++at) {
      CAPTURE(code, exchange_works, at);
      h.reset();
      CheckpointWriter writer(h.at, 2, h.at + "/last");
      int count = 0;
      bool short_write = false;  // after it the disk is full
      set_file_fault([&](std::string_view operation, const std::string&) {
        if (short_write && operation == "write") return short_write = false, ENOSPC;
        short_write = ++count == at && code == kShortWrite && operation == "write";
        if (count == at && (code != kShortWrite || short_write)) return code;
        return exchange_fails(operation) && !exchange_works ? EINVAL : 0;
      });
      const CheckpointWriter::Result result = h.write(writer, 4, {"best", "last"}, at % 2 == 0);
      set_file_fault({});
      CHECK(result.error.empty() == writer.failed().empty());
      if (!result.error.empty()) {
        ++failures;
        CHECK_THAT(result.error, Contains(h.at) && Contains(code == EIO ? "Input/output error" : "No space left on device"));
        for (const char* name : {"last", "best"}) CHECK_NOTHROW(verify_folder(h.at + "/" + name));
        writer.write(writer.failed(), false);  // the copy is still there
        CHECK(writer.wait()->error.empty());
        CHECK(writer.failed().empty());
        CHECK(h.model.load(h.at + "/last") == 4);
        CHECK(h.model.load(h.at + "/best") == 4);
      }
      check_goes_on(h);
      if (count < at) break;
    }
    CHECK(at > 40);
    CHECK(failures > 8);
  }
}

TEST_CASE("checkpoint writer: after each rename the folder around it is synced, and data before", "[disk]") {
  History h;
  CheckpointWriter writer(h.at, 2, h.at + "/last");
  std::vector<std::pair<std::string, std::string>> log;
  set_file_fault([&](std::string_view operation, const std::string& path) { return log.emplace_back(operation, path), 0; });
  REQUIRE(h.write(writer, 4).error.empty());
  set_file_fault({});
  int renames = 0;
  std::set<std::string> dirty;
  for (size_t i = 0; i < log.size(); ++i) {
    const auto& [operation, path] = log[i];
    if (operation == "write") dirty.insert(path);
    if (operation == "sync") dirty.erase(path);
    if ((operation != "rename" && operation != "exchange") || path.ends_with(".tmp")) continue;
    ++renames;
    CHECK(dirty.empty());
    REQUIRE(i + 1 < log.size());
    const bool second = path.find("/step-") != std::string::npos;  // `last` takes its name at once
    CHECK(log[i + 1].first == (second ? "rename" : "sync"));
    CHECK(log[i + 1].second == (second ? h.at + "/last" : h.at));
  }
  CHECK(renames == 3);  // best, last, and the one before it
}

TEST_CASE("checkpoint writer: the older ones stay as many as asked for, and are resumed when the newer are damaged") {
  History h;
  CHECK(h.names() == std::set<std::string>{"best", "last", "step-00000001", "step-00000002"});
  CheckpointWriter writer(h.at, 2, h.at + "/last");
  h.write(writer, 4);
  CHECK(h.names() == std::set<std::string>{"best", "last", "step-00000002", "step-00000003"});
  CHECK(writer.written_step() == 4);
  for (const int64_t step : {2, 3}) CHECK(h.model.load(h.at + "/step-0000000" + std::to_string(step)) == step);
  const auto damage = [&](const std::string& name) { fs::resize_file(h.at + "/" + name + "/model.safetensors", 100); };
  std::vector<std::string> rejected;
  damage("last"), damage("step-00000003");
  CHECK(h.resumed(&rejected) == h.at + "/best");
  CHECK(rejected.size() == 2);
  CHECK_THAT(rejected[0], Contains("checkpoints/last cannot be used: ") && Contains("truncated"));
  damage("best");
  rejected.clear();
  CHECK(h.resumed(&rejected) == h.at + "/step-00000002");
  CHECK(rejected.size() == 4);
  CHECK_THAT(rejected[1], Contains("checkpoints/best cannot be used: "));  // of step 4
  CHECK_THAT(rejected[2], Contains("checkpoints/step-00000003 cannot be used: "));
  CHECK_THAT(rejected[3], Contains("going back to "));

  // A damaged `last` does not become an older checkpoint, nor does one of a future that was left.
  h.model.branch = 1;
  CheckpointWriter resumed(h.at, 2, h.at + "/step-00000002");
  h.write(resumed, 3, {"last"});
  CHECK(h.names() == std::set<std::string>{"best", "last", "step-00000002"});
  CHECK(h.model.load(h.resumed()) == 3);
  h.write(resumed, 3, {"last"});  // the same step once more
  CHECK(h.names() == std::set<std::string>{"best", "last", "step-00000002"});
  CheckpointWriter none(h.at, 0, h.at + "/last");
  h.write(none, 6, {"last"});
  CHECK(h.names() == std::set<std::string>{"best", "last"});
}

TEST_CASE("checkpoint writer: who resumes `last` removes the older one that a killed process kept too many") {
  History h;  // the newest two beside `last`, of step 3
  fs::copy(h.at + "/step-00000001", h.at + "/step-00000000", fs::copy_options::recursive);
  fs::copy(h.at + "/step-00000001", h.at + "/step-00000009", fs::copy_options::recursive);  // of a future that was left
  CheckpointWriter elsewhere(h.at, 2, h.at + "/step-00000002");
  CHECK(h.names().size() == 6);  // what it goes on from is not the newest: nothing goes before the next is whole
  CheckpointWriter writer(h.at, 2, h.at + "/last");
  CHECK(h.names() == std::set<std::string>{"best", "last", "step-00000001", "step-00000002"});
}

TEST_CASE("checkpoint writer: another process's `last` is kept only if it is whole") {
  History h;
  CheckpointWriter writer(h.at, 5, "");  // resumed from elsewhere
  h.write(writer, 8, {"last"});
  CHECK(h.names().count("step-00000003") == 1);
  fs::resize_file(h.at + "/last/state.safetensors", 100);
  CheckpointWriter other(h.at, 5, "");
  h.write(other, 9, {"last"});
  CHECK(h.names().count("step-00000008") == 0);
}

TEST_CASE("checkpoint writer: the copy is of its moment, holds on to its memory, and is told apart from later states") {
  History h;
  CheckpointWriter writer(h.at, 0, "");
  h.write(writer, 1);
  const int64_t before = Allocator::of(kCpu).use().system_allocations;
  std::atomic<bool> go = false;
  set_file_fault([&](std::string_view, const std::string&) {
    while (!go) usleep(1000);
    return 0;
  });
  writer.copy(h.model.parts(), h.model.at(7));
  writer.write({"last"}, true);
  CHECK(writer.writing());
  CHECK_FALSE(writer.finished());
  CHECK(writer.written_step() == 1);
  TrainingState later = h.model.at(8);  // training goes on
  go = true;
  CHECK(writer.wait()->error.empty());
  set_file_fault({});
  CHECK_FALSE(writer.busy());
  CHECK_FALSE(writer.holds(later));
  later.step = 7;
  CHECK(writer.holds(later));
  later.evaluated_step = 7;
  CHECK_FALSE(writer.holds(later));
  CHECK(writer.bytes() > 0);
  CHECK(Allocator::of(kCpu).use().system_allocations == before);
  CHECK(h.model.load(h.at + "/last") == 7);
}

TEST_CASE("checkpoint writer: an older one that cannot be removed is told, and what was written counts") {
  History h;
  CheckpointWriter writer(h.at, 1, "");
  set_file_fault([&](std::string_view operation, const std::string& path) {
    const bool old = path.find("step-") != std::string::npos;
    return old && (operation == "remove" || (operation == "rename" && path.find("step-00000001") != std::string::npos)) ? EPERM : 0;
  });
  const CheckpointWriter::Result written = h.write(writer, 4);
  set_file_fault({});
  CHECK(written.error.empty());
  CHECK_FALSE(written.leftover.empty());
  CHECK(writer.failed().empty());
  CHECK(writer.written_step() == 4);
  CHECK(h.model.load(h.resumed()) == 4);
}

TEST_CASE("checkpoint writer: what cannot be read of one checkpoint keeps nobody from another") {
  const History h;
  fs::remove(h.at + "/best/state.json");
  fs::create_directory(h.at + "/best/state.json");  // reading it is an error
  CHECK(h.resumed() == h.at + "/last");
  // A crash between the two renames: the newest that has a name is resumed, also by the run's folder, and no fresh run begins here.
  fs::remove_all(h.at + "/last");
  CHECK(resolve_checkpoint(h.run, "last") == h.at + "/step-00000002");
}
