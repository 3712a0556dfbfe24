// mesa-train: trains a vision transformer from a config.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "mesa/train/signals.h"
#include "mesa/train/trainer.h"
#include "mesa/train/version.h"

/// The run that a checkpoint lies in: "runs/a" for "runs/a" and for "runs/a/checkpoints/best"; "" if there is none.
static std::string run_of(const std::string& checkpoint) {
  const std::filesystem::path path(checkpoint);
  for (const auto& folder : {path, path.parent_path().parent_path()})
    if (!folder.empty() && std::filesystem::exists(folder / "config.yaml")) return folder.string();
  return "";
}

int main(int argc, char** argv) {
  CLI::App app("Trains a vision transformer while keeping compressed activations.", "mesa-train");
  std::string config, output, device, resume;
  std::vector<std::string> overrides;
  bool dry = false, quiet = false;
  app.add_option("--config", config, "config file, or the name of a shipped one (deit_s.yaml); with --resume the run's own is the default");
  app.add_option("--set", overrides, "override one key of the config, e.g. train.epochs=3 (repeatable)")
      ->type_name("KEY=VALUE")->expected(1)->take_all();
  app.add_option("--output", output, "folder of the run (default: runs/<date>-<model>)");
  CLI::Option* resume_option =
      app.add_option("--resume", resume, "continue: 'auto' (the default value) takes the newest whole checkpoint of --output")
          ->expected(0, 1)->type_name("[auto|CHECKPOINT]");
  app.add_option("--device", device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_flag("--dry-run", dry, "print the resolved config, the plan of kept activations and the predicted peak memory; train nothing");
  app.add_flag("--quiet", quiet, "no progress, only warnings and the summary");
  app.set_version_flag("--version", mesa::version_text());
  app.footer("Exit codes: 0 done; 1 failed; 2 wrong usage or config; 75 stopped by a signal and resumable.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    mesa::TrainOptions options;
    options.quiet = quiet;
    if (resume_option->count() > 0) options.resume = resume.empty() ? "auto" : resume;
    if (config.empty()) {
      const std::string run = output.empty() ? run_of(options.resume) : output;
      if (options.resume.empty() || run.empty()) throw mesa::UsageError("--config is needed (or --resume with --output of an earlier run)");
      config = run + "/config.yaml";
      output = run;
    }
    mesa::RunConfig run = mesa::load_config(config, overrides);
    if (run.where("storage") == "default") run.storage = mesa::load_storage("exact");  // the shipped policy, not just its name
    if (!output.empty()) run.output = output;
    if (!device.empty()) run.device = device;
    if (dry) {
      std::fputs(mesa::dry_run(run).c_str(), stdout);
      return 0;
    }
    // From the set-up on, a signal ends in a resumable state. Never destroyed: one that comes after "done" must not kill a finished run.
    [[maybe_unused]] static const auto& signals = *new mesa::SignalGuard;
    return mesa::train(std::move(run), options);
  } catch (const mesa::UsageError& e) {
    std::fprintf(stderr, "mesa-train: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "mesa-train: %s\n", e.what());
    return 1;
  }
}
