// mesa-bench: storage policies side by side on one training step. Parses, measures, reports.
#include <unistd.h>

#include <iostream>
#include <optional>

#include "app.h"
#include "mesa/dist/world.h"
#include "mesa/kernels/conv.h"
#include "mesa/train/benchmark.h"
#include "mesa/train/files.h"
#include "mesa/train/kernel_benchmark.h"
#include "mesa/train/plan.h"

namespace {

struct Arguments {
  std::string config, json, device;
  std::vector<std::string> storage, overrides;
  int64_t steps = 10, warmup = 2;
  std::optional<int64_t> threads;
  bool phases = false, kernels = false, profile = false;
};

constexpr const char* kFooter =
    "Every policy trains a model of its own, from the same weights on the same random batch; their steps take turns, so that\n"
    "whatever else the machine does falls on all of them alike. Shown are medians; the JSON has minimum and maximum of each.\n"
    "  speed           relative to the first policy, each step against the one beside it\n"
    "  forward ...     parts of a step; on a GPU of further steps, that wait for it after each part, so they add up to more\n"
    "  kept/image      bytes of activations that wait for the backward pass, right after the forward pass\n"
    "  peak            bytes in use at the worst moment of a step: weights, gradients, moments, activations, scratch\n"
    "  gradient error  |g - g_exact| / |g_exact| over all parameters, on equal weights after a few training steps\n"
    "\n"
    "Examples:\n"
    "  mesa-bench --config bench/deit_tiny.yaml --storage exact,int8,int4\n"
    "  mesa-bench --config bench/deit_small.yaml --set train.batch_size=128 --set train.precision=bf16 --kernels\n"
    "  mesa-bench --config bench/deit_tiny.yaml --storage int8,./mine.yaml --set train.precision=bf16 --json bench.json\n"
    "\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage or config.";

void add_options(CLI::App& app, Arguments& args) {
  app.add_option("--config", args.config, "Config file, or the name of a shipped one")->required()->type_name("CONFIG");
  app.add_option("--storage", args.storage, "Storage policies, separated by commas: shipped ones, or paths (default: the config's)")
      ->delimiter(',')
      ->type_name("POLICY,...");
  app.add_option("--steps", args.steps, "Measured steps of each policy")->capture_default_str()->type_name("N");
  app.add_option("--warmup", args.warmup, "Steps of each policy before them")->capture_default_str()->type_name("N");
  app.add_option("--json", args.json, "Write every number, also by site, to this file")->type_name("FILE");
  app.add_option("--set", args.overrides, "Override values of the config")->type_name("KEY=VALUE");
  app.add_option("--device", args.device, "auto, cpu or cuda (default: the config's)")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_option("--threads", args.threads, "OpenMP threads, 0 for all cores (default: the config's)")->type_name("N");
  app.add_flag("--kernels", args.kernels, "Time every kernel of a step alone instead: GB/s beside a measured copy, TFLOP/s of products");
  app.add_flag("--profile", args.profile, "On a GPU: time each kernel within a few further steps, and list them by their share");
  app.add_flag("--phases", args.phases, "Print first what each policy keeps at each site");
}

/// One line that is redrawn, only where somebody is watching, and gone in the end.
struct LiveLine {
  void show(const std::string& what) const {
    if (isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r\033[K%s", what.c_str());
  }
  ~LiveLine() { show(""); }
};

mesa::BenchmarkResult measure(const mesa::RunConfig& config, mesa::BenchmarkOptions options) {
  const LiveLine line;
  options.progress = [&](const std::string& what) { line.show(what); };
  try {
    return mesa::run_benchmark(config, options);
  } catch (const mesa::OutOfMemory& e) {
    mesa::RunConfig one = config;
    one.storage = options.policies.front();
    const char* several = options.policies.size() > 1 ? "\nevery policy has a model of its own: fewer at a time need less" : "";
    throw mesa::Error(mesa::concat(e.what(), "\nwith storage ", one.storage.name, " ", mesa::explain_out_of_memory(one), several));
  }
}

void print_plans(const mesa::RunConfig& config, const std::vector<mesa::StorageConfig>& policies) {
  const mesa::NetConfig model = mesa::model_config(config, mesa::known_classes(config));
  for (const mesa::StorageConfig& storage : policies) {
    mesa::RunConfig one = config;
    one.storage = storage;
    const mesa::Plan plan = mesa::plan_run(one, model);
    std::cout << "storage           " << storage.name << "\n" << mesa::format_plan(plan, config.train.batch_size) << "\n";
  }
}

int time_kernels(const mesa::RunConfig& config, const std::string& json) {
  const LiveLine line;
  const mesa::KernelReport report = mesa::run_kernel_benchmark(config, [&](const std::string& kernel) { line.show(kernel); });
  line.show("");
  std::cout << mesa::format_kernels(report) << std::flush;
  if (!json.empty()) mesa::write_file_atomically(json, mesa::kernels_json(report));
  return 0;
}

int run(const Arguments& args) {
  if (mesa::launched_rank() > 0) return 0;  // it measures one process, and another one would disturb it
  if (!args.json.empty()) mesa::check_can_write(args.json);
  std::vector<std::string> overrides = args.overrides;
  if (!args.device.empty()) overrides.push_back("device=" + args.device);
  if (args.threads) overrides.push_back(mesa::concat("train.threads=", *args.threads));
  const mesa::RunConfig config = mesa::load_config(args.config, overrides);
  if (args.kernels) return time_kernels(config, args.json);
  mesa::BenchmarkOptions options;
  for (const std::string& name : args.storage) options.policies.push_back(mesa::load_storage(name));
  if (options.policies.empty()) options.policies.push_back(config.storage);
  options.steps = args.steps;
  options.warmup = args.warmup;
  options.profile = args.profile;
  if (args.phases) print_plans(config, options.policies);
  const mesa::BenchmarkResult result = measure(config, options);
  std::cout << mesa::format_benchmark(result) << std::flush;
  for (const std::string& which : mesa::kernels::slow_convolutions()) std::cerr << "convolutions are slow: " << which << "\n";
  if (!args.json.empty()) mesa::write_file_atomically(args.json, mesa::benchmark_json(result));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Compares storage policies on one training step: speed, bytes kept, and error of the gradients.", "mesa-bench");
  Arguments args;
  add_options(app, args);
  app.footer(kFooter);
  return mesa::run_app(app, argc, argv, [&] { return run(args); });
}
