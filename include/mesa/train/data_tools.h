// What can be done with a run's data before it is trained on: check every picture, and pack them into one file.
#pragma once
#include <string>

#include "mesa/train/config.h"

namespace mesa {

/// --check-data: reads and decodes every picture of both halves once, on train.threads threads, with a live line on stderr. Prints the
/// damaged ones with the reasons to stdout, and then for each half how many pictures there are, of how many classes, and the smallest and
/// the largest class. Returns whether all are good. Throws what opening the data throws.
bool check_data(const RunConfig& config);

struct PackSettings {
  std::string path;  ///< of the packed file
  int64_t size = 0;  ///< see PackOptions
  bool raw = false;
};

/// --pack: writes the run's data, as data.train_size and data.test_size limit them, into one file (data.kind: packed), in one step: a
/// failure leaves what was there. A damaged picture is an error, or with data.on_bad_sample: skip it is left out and listed on stderr.
/// Returns what was written and which keys train on it, for people. Throws Error.
std::string pack_data(const RunConfig& config, const PackSettings& settings);

}  // namespace mesa
