// mesa-train: trains a vision transformer from a config.
#include <csignal>
#include <filesystem>
#include <map>

#include "app.h"
#include "mesa/dist/world.h"
#include "mesa/train/check_comm.h"
#include "mesa/train/data_tools.h"
#include "mesa/train/plan.h"
#include "mesa/train/signals.h"
#include "mesa/train/trainer.h"

namespace {

struct Arguments {
  std::string config, output, device, weights;
  std::vector<std::string> overrides;
  bool dry = false, list = false, check_comm = false, check_data = false;
  double fit = 0;  // bytes
  int64_t ranks = 1;
  mesa::PackSettings pack;
  mesa::TrainOptions options;
};

/// The run that a checkpoint lies in: "runs/a" for "runs/a" and for "runs/a/checkpoints/best"; "" if there is none.
std::string run_of(const std::string& checkpoint) {
  const std::filesystem::path path = std::filesystem::weakly_canonical((std::filesystem::absolute(checkpoint) / "").parent_path());
  for (const auto& folder : {path, path.parent_path().parent_path()})
    if (std::filesystem::exists(folder / "config.yaml")) return std::filesystem::proximate(folder).string();
  return "";
}

/// --resume with a checkpoint: a path, or the name of one of the run in --output ("best").
void find_checkpoint(Arguments& args) {
  std::string& resume = args.options.resume;
  if (resume.empty() || resume == "auto") return;
  if (!args.weights.empty())
    throw mesa::UsageError("--weights begins a run, and --resume " + resume + " goes on with one: give one of them");
  const std::string own = args.output + "/checkpoints/" + resume;
  if (!std::filesystem::exists(resume) && !args.output.empty() && std::filesystem::exists(own)) resume = own;
  if (!std::filesystem::exists(resume)) throw mesa::Error("--resume: there is no checkpoint at " + resume);
}

/// Without --config a resumed run goes on by its own.
void find_config(Arguments& args) {
  const std::string& resume = args.options.resume;
  if (resume.empty() || (resume == "auto" && args.output.empty()))
    throw mesa::UsageError("--config is needed (or --resume with --output of an earlier run, or with a checkpoint)");
  const std::string run = resume == "auto" ? args.output : run_of(resume);
  if (run.empty())
    throw mesa::UsageError("--resume " + resume + ": no run's folder lies around it, which has the config; give --config, too");
  args.config = run + "/config.yaml";
  if (!std::filesystem::exists(args.config)) throw mesa::UsageError("there is no run to resume in " + run + "; a first one needs --config");
  if (args.output.empty()) args.output = run;
}

/// --check-data and --pack. A signal ends them cleanly, with the code that it would have ended them with by itself.
int use_data(const mesa::RunConfig& config, const Arguments& args) try {
  std::signal(SIGPIPE, SIG_DFL);  // nobody reads on: `--check-data | head`
  if (args.check_data) return mesa::check_data(config) ? 0 : 1;
  std::fputs(mesa::pack_data(config, args.pack).c_str(), stdout);
  return 0;
} catch (const mesa::Stopped& e) {
  std::fprintf(stderr, "mesa-train: %s\n", e.what());
  return 128 + mesa::received_signal();
}

int run(Arguments& args) {
  const bool trains = !args.list && !args.dry && !args.check_data && args.pack.path.empty();
  if (!trains && mesa::launched_rank() > 0) return 0;  // one of the ranks is enough
  if (args.list) {
    std::fputs(mesa::list_models().c_str(), stdout);
    return 0;
  }
  find_checkpoint(args);
  if (args.config.empty()) find_config(args);
  mesa::RunConfig config = mesa::load_config(args.config, args.overrides);
  if (config.where("storage") == "default") config.storage = mesa::load_storage("exact");  // the shipped policy, not just its name
  if (!args.output.empty()) config.output = args.output;
  if (!args.device.empty()) config.device = args.device;
  if (!args.weights.empty()) config.train.weights = args.weights, config.places["train.weights"] = "--weights " + args.weights;
  if (args.dry) {
    const std::string& weights = config.train.weights;
    if (!weights.empty() && !std::filesystem::exists(weights)) config.refuse("train.weights", "there is no checkpoint at ", weights);
    config.ranks = args.ranks;
    std::fputs(mesa::dry_run(config, static_cast<int64_t>(args.fit)).c_str(), stdout);
    return 0;
  }
  if (args.check_comm) return mesa::check_comm(std::move(config));
  mesa::handle_signals(config.train.stop_signals);  // from the set-up on, a signal ends in a resumable state
  if (args.check_data || !args.pack.path.empty()) return use_data(config, args);
  return mesa::train(std::move(config), args.options);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a vision transformer while keeping compressed activations.", "mesa-train");
  Arguments args;
  std::string resume;
  app.add_option("--config", args.config,
                 "config file, or the name of a shipped one (deit_s.yaml); with --resume the run's own is the default")
      ->type_name("CONFIG");
  app.add_option("--set", args.overrides, "override one key of the config, e.g. train.epochs=3 (repeatable)")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->take_all();
  app.add_option("--output", args.output, "folder of the run (default: runs/<date>-<model>)")->type_name("FOLDER");
  CLI::Option* resume_option =
      app.add_option("--resume", resume, "continue: 'auto' (the default value) takes the newest whole checkpoint of --output")
          ->expected(0, 1)
          ->type_name("[auto|CHECKPOINT]");
  app.add_option("--weights", args.weights, "begin with the weights of this checkpoint or safetensors file (train.weights)");
  app.add_option("--device", args.device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  CLI::Option* dry = app.add_flag("--dry-run", args.dry,
                                  "print the resolved config, the plan of kept activations and the predicted peak memory; train nothing");
  app.add_option("--fit", args.fit,
                 "with --dry-run: also the largest train.batch_size that fits so many bytes, what is lost between blocks included")
      ->transform(CLI::AsNumberWithUnit(std::map<std::string, double>{{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}},
                                        CLI::AsNumberWithUnit::CASE_INSENSITIVE))
      ->check(CLI::Range(1.0, 1e15))
      ->type_name("BYTES")
      ->needs(dry);
  app.add_option("--ranks", args.ranks, "with --dry-run: plan for one of so many ranks")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->needs(dry);
  CLI::Option* check = app.add_flag("--check-data", args.check_data,
                                    "read and decode every picture once, list the damaged ones and count the classes; train nothing")
                           ->excludes(dry);
  CLI::Option* pack = app.add_option("--pack", args.pack.path, "write the data into one file for data.kind: packed; train nothing")
                          ->type_name("FILE")
                          ->excludes(dry)
                          ->excludes(check);
  app.add_option("--pack-size", args.pack.size,
                 "with --pack: reduce larger pictures until their shorter side has so many pixels; 0 keeps all as they are")
      ->check(CLI::Range(int64_t{0}, int64_t{65536}))
      ->type_name("PIXELS")
      ->needs(pack)
      ->capture_default_str();
  app.add_flag("--pack-raw", args.pack.raw, "with --pack: store pixels, which need no decoding, in place of JPEG")->needs(pack);
  app.add_flag("--list-models", args.list, "print the models that model.name may name, with their sizes and what they keep; train nothing");
  app.add_flag("--check-comm", args.check_comm,
               "print who the ranks of this run are and how fast they add up, refuse those that differ; train nothing");
  app.add_flag("--quiet", args.options.quiet, "no progress, only warnings and the summary");
  app.footer(
      "Examples:\n"
      "  mesa-train --config quickstart.yaml --output runs/first\n"
      "  mesa-train --config deit_s.yaml --set data.path=/imagenet --set storage=int4 --dry-run\n"
      "  mesa-train --resume --output runs/first\n"
      "  mpirun -n 2 mesa-train --config deit_s.yaml --set data.path=/imagenet --output runs/ranks\n"
      "\n"
      "Exit codes: 0 done; 1 failed; 2 wrong usage or config; 69 another rank was lost; 75 stopped by a signal and resumable.");
  return mesa::run_app(app, argc, argv, [&] {
    if (resume_option->count() > 0) args.options.resume = resume.empty() ? "auto" : resume;
    return run(args);
  });
}
