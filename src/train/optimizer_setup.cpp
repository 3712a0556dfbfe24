#include "mesa/train/optimizer_setup.h"

#include <algorithm>
#include <cmath>

#include "mesa/optim/adamw.h"
#include "mesa/optim/lamb.h"
#include "mesa/optim/layer_decay.h"
#include "mesa/optim/sgd.h"

namespace mesa {

std::unique_ptr<GradientSync> share_gradients(const RunConfig& config, ParamStore& params, Communicator& communicator) {
  const bool connected = communicator.connected(), sharded = connected && config.train.shard == "optimizer";
  if (sharded) params.gather_values(communicator.size());
  params.allocate_gradients(sharded ? communicator.size() : 1);
  if (!connected) return nullptr;
  const DType dtype = config.train.reduce_precision == "bf16" ? DType::bf16 : DType::f32;
  return std::make_unique<GradientSync>(communicator, params.params(), GradientSyncOptions{kBucketBytes, dtype, sharded});
}

void rehearse_collectives(const RunConfig& config, Communicator& communicator) {
  if (!communicator.connected() || !is_gpu(communicator.device())) return;
  for (const int64_t bytes : {kBucketBytes, int64_t{4} << 10}) {
    const int64_t part = std::max<int64_t>(1, bytes / size_of(DType::f32) / communicator.size());
    const Tensor bucket = Tensor::zeros({part * communicator.size()}, DType::f32, communicator.device());
    if (config.train.shard == "optimizer") {
      const Tensor own = bucket.narrow(0, communicator.rank() * part, part);
      communicator.reduce_scatter(bucket, own);
      communicator.all_gather(own, bucket);
    } else {
      communicator.all_reduce(bucket);
    }
    communicator.barrier();
  }
  Allocator::of(communicator.device()).release_cached();  // the plan has no place for these
}

OptimizerShard shard_of(GradientSync* sync, Communicator& communicator) {
  if (sync == nullptr || !sync->sharded()) return {};
  return {sync->own(),
          [&communicator](const Tensor& x) {
            communicator.all_reduce(x);
            communicator.finish();
          },
          [sync, &communicator](const std::vector<Tensor>& parts, const OptimizerShard::Each& f) {
            sync->gather(parts, [&](const Param& param, const Tensor& values) {
              if (communicator.rank() != 0) return;
              const bool on_gpu = is_gpu(values.device());
              const Tensor copy = on_gpu ? to(values, kCpu) : empty_like(values);
              if (!on_gpu) transfer(values, copy);
              f(param, copy);
            });
          }};
}

std::unique_ptr<Optimizer> make_optimizer(const RunConfig& config, ParamStore& params, OptimizerShard shard) {
  const OptimizerConfig o = with_defaults(config.optimizer);
  for (const std::string& glob : o.no_decay) {
    try {
      params.spare_decay(glob);
    } catch (const Error& e) {
      config.refuse("optimizer.no_decay", e.what());
    }
  }
  set_layer_decay(params.params(), o.layer_decay);
  if (o.name == "sgd") return std::make_unique<Sgd>(params.params(), SgdConfig{o.weight_decay, *o.momentum, *o.nesterov}, std::move(shard));
  if (o.name == "lamb")
    return std::make_unique<Lamb>(params.params(), LambConfig{o.weight_decay, *o.beta1, *o.beta2, *o.eps, *o.trust_clip}, std::move(shard));
  return std::make_unique<AdamW>(params.params(), AdamWConfig{o.lr, o.weight_decay, *o.beta1, *o.beta2, *o.eps}, std::move(shard));
}

std::unique_ptr<Ema> make_ema(const RunConfig& config, ParamStore& params) {
  if (config.train.ema_decay == 0) return nullptr;
  return std::make_unique<Ema>(params.params(), EmaConfig{config.train.ema_decay, config.train.ema_warmup});
}

int64_t images_per_update(const RunConfig& config) { return config.train.batch_size * config.train.accumulation * config.ranks; }

static double lr_factor(const RunConfig& config) {
  const int64_t base = config.optimizer.lr_base_batch;
  return base > 0 ? static_cast<double>(images_per_update(config)) / static_cast<double>(base) : 1.0;
}

Schedule make_schedule(const RunConfig& config, int64_t updates_per_epoch) {
  const ScheduleConfig& c = config.schedule;
  const auto updates = [&](double epochs) { return std::llround(std::min(epochs * static_cast<double>(updates_per_epoch), 1e18)); };
  const double factor = lr_factor(config);
  Schedule s;
  s.kind = c.name == "constant" ? Schedule::Kind::constant
           : c.name == "linear" ? Schedule::Kind::linear
           : c.name == "step"   ? Schedule::Kind::step
                                : Schedule::Kind::cosine;
  s.lr = config.optimizer.lr * factor, s.warmup_lr = c.warmup_lr * factor, s.min_lr = c.min_lr * factor;
  s.warmup_steps = updates(c.warmup_epochs);
  s.total_steps = config.train.epochs * updates_per_epoch;
  if (config.train.steps > 0) s.total_steps = std::min(s.total_steps, config.train.steps);
  s.decay_rate = c.decay_rate.value_or(0.1);
  s.decay_steps = std::max<int64_t>(1, updates(c.decay_epochs.value_or(30)));
  return s;
}

std::string describe_optimizer(const RunConfig& config, const ParamStore& params) {
  const OptimizerConfig& o = config.optimizer;
  std::string out = concat(o.name, ", learning rate ", o.lr * lr_factor(config));
  if (o.lr_base_batch > 0) out += concat(" (", o.lr, " * ", images_per_update(config), " images an update / ", o.lr_base_batch, ")");
  out += ", " + config.schedule.name;
  int64_t decayed = 0, trained = 0;
  double least = 1;
  for (const Param& param : params.params()) {
    if (!param.trainable) continue;
    ++trained, decayed += param.decay;
    least = std::min(least, param.lr_scale);
  }
  out += concat("; weight decay ", o.weight_decay, " on ", decayed, " of ", trained, " tensors");
  if (o.layer_decay < 1) out += concat("; layer decay ", o.layer_decay, ": the layers learn at ", least, " to 1 times that rate");
  if (config.train.ema_decay > 0)
    out += concat("; moving average of the weights with decay ", config.train.ema_decay, config.train.ema_warmup ? " after a warm-up" : "");
  return out;
}

}  // namespace mesa
