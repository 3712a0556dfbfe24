// One run in a folder at a time, whatever ends it.
#include "../../src/train/folder_lock.h"

#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <optional>

#include "mesa/base/error.h"
#include "mesa/base/files.h"
#include "mesa/train/trainer.h"
#include "support/data_files.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

TEST_CASE("a run's folder is one process's at a time, until that ends, however it does") {
  const TemporaryFolder temporary;
  const std::string folder = (temporary.path() / "runs/one").string();
  std::optional<FolderLock> first(std::in_place, folder);
  const std::string pid = concat("process ", getpid(), " on ");
  CHECK_THAT(read_text(folder + "/run.lock"), Contains(pid));
  CHECK_THROWS_WITH(FolderLock(folder), Contains("a run is going on in " + folder) && Contains(pid) && Contains("--output"));
  CHECK_NOTHROW(FolderLock(folder + "2"));
  first.reset();
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const pid_t child = fork();
  if (child == 0) {
    const FolderLock lock(folder);
    if (write(ready[1], "x", 1) == 1) pause();
    _exit(0);
  }
  char byte = 0;
  REQUIRE(read(ready[0], &byte, 1) == 1);
  CHECK_THROWS_WITH(FolderLock(folder), Contains(concat("process ", child, " on ")));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK_NOTHROW(FolderLock(folder));
  for (const int end : ready) close(end);
  CHECK_THROWS_WITH(FolderLock("/dev/null/run"), Contains("/dev/null/run"));
}

TEST_CASE("a run that nobody names a folder for gets one of its own") {
  const TemporaryFolder temporary;
  const std::string name = (temporary.path() / "runs/now").string();
  CHECK(claim_folder(name) == name);
  CHECK(claim_folder(name) == name + "-2");
  CHECK(claim_folder(name) == name + "-3");
  CHECK((fs::is_directory(name) && fs::is_directory(name + "-3")));
  CHECK_THROWS_WITH(claim_folder("/dev/null/now"), Contains("/dev/null"));
}

TEST_CASE("trainer: a second run in a folder is refused before it touches anything, and may follow") {
  const TemporaryFolder temporary;
  RunConfig config = parse_config(kTinyTraining, "tiny.yaml", {"train.epochs=1"});
  config.output = (temporary.path() / "run").string();
  for (const char* resume : {"", "auto"}) {
    const FolderLock other(config.output);
    CHECK_THROWS_WITH(train(config, {resume, true}), Contains("a run is going on in"));
    CHECK_FALSE(fs::exists(config.output + "/config.yaml"));
    CHECK_FALSE(fs::exists(config.output + "/checkpoints"));
  }
  CHECK(train(config, {"", true}) == 0);
  CHECK_THROWS_WITH(train(config, {"", true}), Contains("holds a run already"));
}
