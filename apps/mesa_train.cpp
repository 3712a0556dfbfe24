// mesa-train: trains a vision transformer from a config.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "mesa/train/trainer.h"
#include "mesa/train/version.h"

int main(int argc, char** argv) {
  CLI::App app("Trains a vision transformer while keeping compressed activations.", "mesa-train");
  std::string config, output, device, resume;
  std::vector<std::string> overrides;
  bool dry = false, quiet = false;
  app.add_option("--config", config, "config file, or the name of a shipped one (deit_s.yaml); with --resume the run's own is the default");
  app.add_option("--set", overrides, "override one key of the config, e.g. train.epochs=3 (repeatable)")->type_name("KEY=VALUE")->expected(1)->take_all();
  app.add_option("--output", output, "folder of the run (default: runs/<date>-<model>)");
  CLI::Option* resume_option = app.add_option("--resume", resume, "continue: 'auto' (the default value) takes the newest whole checkpoint of --output")
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
      if (options.resume.empty() || output.empty()) throw mesa::UsageError("--config is needed (or --resume with --output of an earlier run)");
      config = output + "/config.yaml";
    }
    mesa::RunConfig run = mesa::load_config(config, overrides);
    if (!output.empty()) run.output = output;
    if (!device.empty()) run.device = device;
    if (dry) {
      std::fputs(mesa::dry_run(run).c_str(), stdout);
      return 0;
    }
    return mesa::train(std::move(run), options);
  } catch (const mesa::UsageError& e) {
    std::fprintf(stderr, "mesa-train: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "mesa-train: %s\n", e.what());
    return 1;
  }
}
