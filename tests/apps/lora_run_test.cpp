// Fine-tuning with LoRA through the programs: from weights to a merged file that a plain model takes.
#include "apps/tiny_run.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("apps: LoRA from another run's weights, evaluated as it is, merged, and begun with again") {
  const TinyRun tiny;
  REQUIRE(tiny.train({}, "base").code == 0);
  const Args lora{"train.weights=base",
                  "lora.rank=4",
                  "lora.alpha=8",
                  "lora.targets=[blocks.*]",
                  "train.ema_decay=0.5",
                  "optimizer.lr=1e-2",
                  "train.frozen=[\"*.lora_A.weight\"]",
                  "optimizer.no_decay=[\"*.lora_*\"]"};
  const ProcessResult run = tiny.train(lora, "lora");
  INFO(run.err);
  REQUIRE(run.code == 0);
  CHECK_THAT(run.err, Contains("LoRA: rank 4, alpha 8 on 4 linears; ") && !Contains("random first values"));
  const auto evaluate = [&](const Args& args) {
    Args all = args;
    all.insert(all.end(), {"--json", "result.json"});
    const ProcessResult result = tiny.eval(all);
    INFO(result.err);
    REQUIRE(result.code == 0);
    return tiny.json("result.json")["loss"].get<double>();
  };
  for (const char* which : {"raw", "ema"}) {
    CAPTURE(which);
    const ProcessResult merge = tiny.eval({"lora/checkpoints/last", "--weights", which, "--merge", "merged.safetensors"});
    INFO(merge.err);
    REQUIRE(merge.code == 0);
    CHECK_THAT(merge.out, Contains("merged LoRA's factors into 4 linears") && !Contains("top-1"));
    const double adapted = evaluate({"lora/checkpoints/last", "--weights", which}), merged = evaluate({"merged.safetensors"});
    CHECK(merged == Approx(adapted).epsilon(1e-5));
    CHECK(std::fabs(merged - evaluate({"base/checkpoints/last"})) > 1e-4);
  }
  const ProcessResult again = tiny.train({"train.weights=merged.safetensors", "train.epochs=1"}, "plain");
  INFO(again.err);
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Contains("started from merged.safetensors") && !Contains("lora"));
  const ProcessResult inside = tiny.eval({"lora", "--merge", "lora/checkpoints/best/model.safetensors"});
  CHECK(inside.code == 1);
  CHECK_THAT(inside.err, Contains("lies in a checkpoint"));
  CHECK(tiny.eval({"lora"}).code == 0);
  const ProcessResult louder = tiny.eval({"lora", "--set", "lora.alpha=80"});
  CHECK(louder.code == 2);
  CHECK_THAT(louder.err, Contains("lora.alpha") && Contains("trained with alpha 8"));
  Args other = lora;
  other.insert(other.end(), {"lora.alpha=80", "train.epochs=3"});
  const ProcessResult resumed = tiny.train(other, "lora", {"--resume"});
  CHECK(resumed.code == 2);
  CHECK_THAT(resumed.err, Contains("lora.alpha") && Contains("trained with alpha 8"));
  const ProcessResult idle = tiny.train({"train.weights=base", "lora.rank=4", "train.frozen=[\"*.lora_B.weight\"]"}, "idle");
  CHECK(idle.code == 2);
  CHECK_THAT(idle.err, Contains("keeps lora_A from learning"));
  const ProcessResult none = tiny.eval({"base", "--merge", "none.safetensors"});
  CHECK(none.code == 1);
  CHECK_THAT(none.err, Contains("nothing to merge"));
  CHECK_FALSE(tiny.exists("none.safetensors"));
}

TEST_CASE("apps: a dry run tells what LoRA trains, and that frozen linears keep nothing") {
  const TinyRun tiny;
  const ProcessResult dry = tiny.train({"lora.rank=4", "storage=exact"}, "run", {"--dry-run"});
  INFO(dry.err);
  REQUIRE(dry.code == 0);
  CHECK_THAT(dry.out, Contains("lora              rank 4, alpha 4 on 1 linears; ") && Contains(" are trained\n"));
  CHECK_THAT(dry.out, Contains("blocks.*.attn.qkv.lora_B:x") && !Contains("attn.qkv:x") && !Contains("fc1:x") && !Contains("fc2:x"));
  const ProcessResult warned = tiny.train({"lora.rank=4", "train.epochs=1"});
  CHECK(warned.code == 0);
  CHECK_THAT(warned.err, Contains("warning: lora.rank is set but train.weights is empty"));
  const ProcessResult refused = tiny.train({"lora.rank=4", "lora.targets=[blocks.0.qkv]"}, "other");
  CHECK(refused.code == 2);
  CHECK_THAT(refused.err, Contains("lora.targets") && Contains("blocks.*.attn.qkv"));
}
