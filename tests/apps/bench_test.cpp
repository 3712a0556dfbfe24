// mesa-bench as a user runs it.
#include "apps/tiny_run.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("bench: policies side by side, on the screen and in JSON") {
  const TinyRun tiny;
  tiny.write("mine.yaml", "storage:\n  - {match: \"*\", codec: int4, groups: 64}\n  - {match: \"patch_embed.proj:x\", codec: exact}\n");
  const ProcessResult result = tiny.call("mesa-bench", {"--config", "tiny.yaml", "--storage", "exact,int8,./mine.yaml", "--steps", "3", "--json", "b.json"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK_THAT(result.out, Contains("images/s") && Contains("gradient error") && Contains("int8") && Contains("mine"));
  const Json json = tiny.json("b.json");
  CHECK(json["batch_size"] == 16);
  CHECK(json["precision"] == "fp32");
  CHECK(json["device"] == "cpu");
  CHECK(json["threads"] == 1);
  REQUIRE(json["policies"].size() == 3);
  for (const Json& policy : json["policies"]) {
    for (const char* key : {"images_per_second", "forward_ms", "backward_ms", "optimizer_ms", "activation_bytes_per_image", "peak_bytes",
                            "gradient_relative_error"}) {
      INFO(key);
      const Json& spread = policy[key];
      CHECK(spread["minimum"].get<double>() <= spread["median"].get<double>());
      CHECK(spread["median"].get<double>() <= spread["maximum"].get<double>());
    }
    CHECK(policy["forward_ms"]["minimum"].get<double>() > 0);
  }
  const auto median = [&](int i, const char* key) { return json["policies"][i][key]["median"].get<double>(); };
  CHECK(json["policies"][1]["storage"] == "int8");
  CHECK(median(0, "gradient_relative_error") == 0);
  CHECK(median(1, "gradient_relative_error") < median(2, "gradient_relative_error"));
  CHECK(median(0, "activation_bytes_per_image") > 2 * median(1, "activation_bytes_per_image"));
}

TEST_CASE("bench: wrong usage ends with 2, and help tells all") {
  const TinyRun tiny;
  tiny.write("bad.yaml", "storage:\n  - {match: \"*\", codec: exact}\n  - {match: \"*.fc9:x\", codec: int8}\n");
  const auto bench = [&](Args args) {
    args.insert(args.begin(), {"--config", "tiny.yaml"});
    return tiny.call("mesa-bench", args);
  };
  for (const Args& args : {Args{"--storage", "int7"}, Args{"--steps", "0"}, Args{"--set", "model.wdith=3"}, Args{"--storage", "./bad.yaml"}, Args{"--nonsense"}}) {
    const ProcessResult result = bench(args);
    INFO(args.back() << ": " << result.err);
    CHECK(result.code == 2);
    CHECK_FALSE(result.err.empty());
  }
  CHECK_THAT(bench({"--storage", "./bad.yaml"}).err, Contains("bad.yaml:3") && Contains("matches no site"));
  CHECK(bench({"--json", "/proc/none/b.json"}).code == 1);
  const ProcessResult help = tiny.call("mesa-bench", {"--help"});
  CHECK(help.code == 0);
  for (const char* word : {"--config", "--storage", "--steps", "--warmup", "--json", "--set", "--device", "--threads", "--version", "Exit codes"})
    CHECK_THAT(help.out, Contains(word));
}
