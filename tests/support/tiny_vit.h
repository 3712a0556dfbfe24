// A small vision transformer with data, for tests that need a whole network.
#pragma once
#include "mesa/models/vit.h"
#include "mesa/optim/adamw.h"
#include "support/device.h"
#include "support/random.h"

namespace mesa::testing {

inline VitConfig tiny_config() {
  VitConfig c;
  c.image_size = 16, c.patch_size = 4, c.classes = 5, c.width = 24, c.depth = 3, c.heads = 3;
  return c;
}

struct TinyVit {
  ParamStore store;
  Vit model;
  Tensor images, labels;

  explicit TinyVit(const VitConfig& config = tiny_config(), int64_t batch = 4, DType dtype = DType::f32)
      : model(Builder(store, 11, dtype, dtype, test_device()), config) {
    images = to(normal_tensor({batch, config.channels, config.image_size, config.image_size}, "images", dtype, MemoryKind::inputs),
                test_device(), MemoryKind::inputs);
    std::vector<int64_t> classes;
    for (int64_t i = 0; i < batch; ++i) classes.push_back(i % config.classes);
    labels = to(Tensor::from<int64_t>({batch}, classes, MemoryKind::inputs), test_device(), MemoryKind::inputs);
    store.allocate_gradients();
  }

  Var loss() const { return cross_entropy(model(images), labels); }
};

inline StoragePolicy simple_policy(std::vector<StorageRule> rules) { return StoragePolicy("test", std::move(rules)); }

inline Param make_param(const std::string& name, const Shape& shape, DType dtype = DType::f32) {
  Param param;
  param.name = name;
  param.value = normal_tensor(shape, name, dtype, MemoryKind::parameters);
  return param;
}

inline int64_t live_activations() { return Allocator::of(test_device()).use().of(MemoryKind::activations); }

/// Throws Error if the policy has not met the site.
inline SiteRecord record_of(const StoragePolicy& policy, const std::string& name) {
  for (const SiteRecord& record : policy.sites())
    if (record.site.name() == name) return record;
  fail("no site ", name);
}

}  // namespace mesa::testing
