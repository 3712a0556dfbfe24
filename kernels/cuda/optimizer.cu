// AdamW: w <- w (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
//        w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
// SGD: d = g + decay w; m <- mu m + d; w <- w - lr m, or lr (d + mu m).   Average: a <- a + (1 - decay) (w - a).
#include "parameters.h"

namespace mesa::kernels::cuda {

namespace {

/// Applies the rule to N elements at a time.
template <class T, class Rule>
struct Update {
  Rule rule;
  Part<T> part;

  template <int N>
  __device__ void operator()(int64_t i) const {
    T w[N], g[N], m[N] = {}, v[N] = {};
    load_pack(part.w + i, w);
    load_pack(part.g + i, g);
    if constexpr (Rule::kMoments > 0) load_pack(part.m + i, m);
    if constexpr (Rule::kMoments > 1) load_pack(part.v + i, v);
#pragma unroll
    for (int k = 0; k < N; ++k) rule(w[k], g[k], m[k], v[k]);
    if constexpr (Rule::kMoments > 0) store_pack(part.m + i, m);
    if constexpr (Rule::kMoments > 1) store_pack(part.v + i, v);
    store_pack(part.w + i, w);
    if (part.copy) store_pack(part.copy + i, w);
  }
};

template <class T, class Rule>
__global__ void update_kernel(const Part<T>* parts, Rule rule) {
  const Part<T> part = parts[blockIdx.x];
  for_each_run(part, Update<T, Rule>{rule.of(part.weight_decay, part.lr_scale), part});
}

/// Applies the rule that `make(tag)` returns for float or double to every element of every slot.
template <class Make>
void update_all(const char* name, const std::vector<UpdateSlot>& slots, const Make& make) {
  for_each_dtype(slots, [&]<class T>(const std::vector<Part<T>>& parts) {
    const auto rule = make(T{});
    const ChunkTable<Part<T>> table = chunk_table(parts, kUpdateChunk, slots.front().w.device());
    if (table.count == 0) return;
    launch(name, &update_kernel<T, std::decay_t<decltype(rule)>>, static_cast<unsigned>(table.count), kUpdateThreads, 0, table.chunks,
           rule);
  });
}

}  // namespace

void adamw(const std::vector<UpdateSlot>& slots, AdamWStep step) {
  check_step(step.step, "adamw");
  check_slots(slots, 2, "adamw");
  update_all("adamw", slots, [&](auto tag) { return AdamWRule<decltype(tag)>(step); });
}

void sgd(const std::vector<UpdateSlot>& slots, SgdStep step) {
  check_slots(slots, step.momentum > 0 ? 1 : 0, "sgd");
  if (step.momentum > 0)
    update_all("sgd", slots, [&](auto tag) { return SgdRule<decltype(tag), true>(step); });
  else
    update_all("sgd", slots, [&](auto tag) { return SgdRule<decltype(tag), false>(step); });
}

void moving_average(const std::vector<AverageSlot>& slots, double decay) {
  update_all("moving_average", as_updates(slots), [&](auto tag) { return AverageRule<decltype(tag)>(decay); });
}

}  // namespace mesa::kernels::cuda
