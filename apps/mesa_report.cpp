// mesa-report: a run at a glance, or several beside each other, as one HTML file.
#include "app.h"
#include "mesa/dist/world.h"
#include "mesa/train/report.h"

int main(int argc, char** argv) {
  CLI::App app("Writes what a run did as one HTML file: curves, memory by site, pictures, config. Several runs are drawn over one another.",
               "mesa-report");
  std::vector<std::string> runs;
  std::string output;
  app.add_option("run", runs, "folders of runs")->required()->type_name("RUN ...");
  app.add_option("-o,--output", output, "the file (default: report.html in the run's folder; for several runs in the current one)")
      ->type_name("FILE");
  app.footer(
      "Examples:\n"
      "  mesa-report runs/cifar\n"
      "  mesa-report runs/exact runs/int8 runs/int4 -o storage.html\n"
      "\n"
      "Exit codes: 0 done; 1 failed; 2 wrong usage.");
  return mesa::run_app(app, argc, argv, [&] {
    if (mesa::launched_rank() > 0) return 0;  // one of the ranks is enough
    std::printf("%s\n", mesa::write_report(runs, output).c_str());
    return 0;
  });
}
