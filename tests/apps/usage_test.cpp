// What a user is told who asks for what is not there, loses the output, starts several processes, or ends with weights of no use.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "apps/tiny_run.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("apps: an argument that nothing takes is named, with what it may have meant") {
  const TinyRun tiny;
  const auto told = [&](const std::string& program, const Args& args) {
    const ProcessResult result = tiny.call(program, args);
    CHECK(result.code == 2);
    return result.err;
  };
  CHECK_THAT(told("mesa-train", {"--config", "tiny.yaml", "--epochs", "3"}),
             Contains("mesa-train: there is no option --epochs; keys of the config are set with --set"));
  CHECK_THAT(told("mesa-train", {"--confg", "tiny.yaml"}), Contains("no option --confg; did you mean --config?"));
  CHECK_THAT(told("mesa-bench", {"--config", "tiny.yaml", "--stroage=int8"}), Contains("no option --stroage; did you mean --storage?"));
  CHECK_THAT(told("mesa-train", {"--config", "tiny.yaml", "more"}), Contains("'more' is one argument too many"));
}

TEST_CASE("apps: --fit takes bytes with a unit", "[slow]") {
  const TinyRun tiny;
  const auto fits = [&](const std::string& bytes) {
    return tiny.call("mesa-train", {"--config", "tiny.yaml", "--dry-run", "--fit", bytes});
  };
  const ProcessResult plain = fits("2e7");
  CHECK((plain.code == 0 && !plain.out.empty()));
  for (const char* bytes : {"20MB", "20 mb", "0.02GB"}) CHECK(fits(bytes).out == plain.out);
  CHECK(fits("20XB").code == 2);
  CHECK(fits("-3").code == 2);
}

TEST_CASE("apps: what is to be resumed is looked for where it is said to be") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"train.epochs=1"}).code == 0);
  const auto told = [&](const Args& args, int code = 2) {
    const ProcessResult result = tiny.call("mesa-train", args);
    CHECK(result.code == code);
    return result.err;
  };
  CHECK_THAT(told({"--resume", "bestt", "--output", "other"}, 1), Contains("--resume: there is no checkpoint at bestt"));
  CHECK_THAT(told({"--resume", "--output", "nothing"}), Contains("there is no run to resume in nothing"));
  CHECK_THAT(told({"--resume", "run/checkpoints/last", "--weights", "run", "--output", "other"}), Contains("give one of them"));
  std::filesystem::copy(tiny.path("run/checkpoints/last"), tiny.path("alone"));
  CHECK_THAT(told({"--resume", "alone", "--output", "other"}), Contains("--resume alone") && Contains("give --config, too"));
  CHECK_THAT(told({"--config", "tiny.yaml", "--dry-run", "--weights", "absent.safetensors"}),
             Contains("train.weights: there is no checkpoint at absent.safetensors"));
  const ProcessResult more = tiny.call("mesa-train", {"--resume", "best", "--output", "run", "--set", "train.epochs=2", "--quiet"});
  INFO(more.err);
  CHECK(more.code == 0);
  CHECK(tiny.json("run/summary.json")["epochs"] == 2);
}

TEST_CASE("apps: output that is lost is a failure", "[slow]") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"train.epochs=1"}).code == 0);
  const auto lost = [&](const std::string& command) {
    const ProcessResult result =
        run("/bin/sh", {"-c", "exec " + std::string(MESA_BIN_DIR) + "/" + command + " >/dev/full"}, {}, tiny.path("."));
    CAPTURE(command);
    CHECK(result.code == 1);
    CHECK_THAT(result.err, Contains("the output cannot be written: No space left"));
  };
  lost("mesa-train --list-models");
  lost("mesa-train --config tiny.yaml --dry-run");
  lost("mesa-train --config tiny.yaml --check-data");
  lost("mesa-eval run --per-class");
  lost("mesa-report run");
}

TEST_CASE("apps: what one process is enough for is done by one of several that were started together", "[slow]") {
  const TinyRun tiny;
  const auto as_rank = [&](const char* rank, const std::string& program, const Args& args) {
    return run(program, args, {{"OMPI_COMM_WORLD_RANK", rank}, {"OMPI_COMM_WORLD_SIZE", "2"}}, tiny.path("."));
  };
  const std::vector<std::pair<std::string, Args>> calls{{"mesa-train", {"--list-models"}},
                                                        {"mesa-train", {"--config", "tiny.yaml", "--dry-run"}},
                                                        {"mesa-train", {"--config", "tiny.yaml", "--check-data"}},
                                                        {"mesa-train", {"--config", "tiny.yaml", "--pack", "packed"}}};
  for (const auto& [program, args] : calls) {
    CAPTURE(args.back());
    const ProcessResult second = as_rank("1", program, args);
    CHECK((second.code == 0 && second.out.empty() && second.err.empty()));
    CHECK_FALSE(tiny.exists("packed"));
    const ProcessResult first = as_rank("0", program, args);
    CHECK((first.code == 0 && !first.out.empty()));
  }
  CHECK(tiny.exists("packed"));
}

TEST_CASE("apps: a run that ends with weights of no use fails, and does not call them the best") {
  const TinyRun tiny;
  const ProcessResult result = tiny.train({"optimizer.lr=1e15", "train.epochs=1"});
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("the loss of the evaluation is nan") && !Contains("-nan"));
  CHECK(tiny.exists("run/checkpoints/last"));
  CHECK_FALSE(tiny.exists("run/checkpoints/best"));
  const ProcessResult evaluated = tiny.eval({"run"});
  CHECK_THAT(evaluated.out, Contains("loss nan"));
  CHECK_THAT(evaluated.err, Contains("warning: the loss is not finite"));
}

TEST_CASE("apps: a run shorter than an interval leaves a line of it") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"train.log_interval=5"}).code == 0);
  std::vector<int> steps;
  for (const Json& row : tiny.metrics("run")) steps.push_back(row["step"]);
  CHECK(steps == std::vector<int>{5, 10, 12});
  REQUIRE(tiny.train({"train.log_interval=50", "train.epochs=1"}, "short").code == 0);
  REQUIRE(tiny.metrics("short").size() == 1);
  CHECK(tiny.metrics("short")[0]["step"] == 6);
  CHECK(tiny.metrics("short")[0]["loss"].get<double>() > 0);
}
