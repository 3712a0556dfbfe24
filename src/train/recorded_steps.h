// The forward and backward pass of a batch as recorded work (CUDA graphs): one launch in place of hundreds, for models so small that the
// host is slower than the GPU.
#pragma once
#include <functional>
#include <map>

#include "mesa/train/setup.h"

namespace mesa {

class RecordedSteps {
 public:
  /// Refuses, at train.cuda_graph, what cannot be recorded: no GPU, the codec `host`, cuDNN's attention, MESA_SYNC=1.
  static void check(const RunConfig& config, bool gpu);
  /// `memory`: bytes that the passes are known to need.
  RecordedSteps(const RunConfig& config, BuiltModel& model, StoragePolicy& policy, int64_t memory);

  /// All that a pass gives to the device, from a batch that has arrived to gradients; the result is its loss. It must wait for nothing.
  using Pass = std::function<Tensor(const SentBatch& batch, const uint64_t* live_step)>;
  struct Result {
    Tensor loss;               ///< on the device
    bool from_record = false;  ///< so that the device works in memory which nothing else is given
  };
  /// The first passes really run; then each kind of pass is recorded once, in memory of its own, and run from that record for ever.
  /// `variant` tells passes apart that differ in what they were recorded with.
  Result run(const SentBatch& batch, uint64_t step, uint64_t variant, const Pass& pass);

 private:
  struct Recorded {
    cuda::Recording work;
    Tensor loss;
    std::vector<bool> written;  // which gradients exist afterwards
  };
  void take_in(const SentBatch& batch, uint64_t step);
  Recorded record(const Pass& pass);

  BuiltModel& model_;
  StoragePolicy& policy_;
  int eager_ = 2;  // the first calibrates ranges, and both take what lasts
  SentBatch batch_;
  Tensor step_;
  std::shared_ptr<BlockCache> memory_;
  std::map<uint64_t, Recorded> recorded_;
};

}  // namespace mesa
