#include "mesa/train/setup.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "mesa/base/cuda.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/lora.h"

namespace mesa {

DType compute_dtype(const RunConfig& config, Device device) {
  if (config.train.precision != "bf16") return DType::f32;
  if (device.kind == DeviceKind::cpu && !kernels::native_bf16() && !config.train.force_precision)
    config.refuse("train.precision", "this CPU has no bf16 matrix products (avx512_bf16), so bf16 would be slower than fp32; ",
                  "use fp32, or set train.force_precision: true");
  return DType::bf16;
}

DType picture_dtype(const RunConfig& config, Device device) { return is_gpu(device) ? compute_dtype(config, device) : DType::f32; }

Device choose_device(const std::string& name) {
  if (name == "cpu") return kCpu;
  if (cuda::available()) return kCuda;
  if (name == "cuda") throw Error(concat("device cuda: ", cuda::unavailable(), "; --device cpu trains without a GPU"));
  return kCpu;
}

std::string describe_device(const std::string& wish, Device device) {
  if (device.kind == DeviceKind::cuda) return "cuda: " + cuda::describe_device();
  return wish == "auto" ? concat("cpu (", cuda::unavailable(), ")") : "cpu";
}

void use_threads(const RunConfig& config) {
  if (config.train.threads > 0) omp_set_num_threads(static_cast<int>(config.train.threads));
}

namespace {

/// Noise pictures with random labels; each depends on (seed, index) alone.
class RandomDataset : public Dataset {
 public:
  RandomDataset(int64_t size, const ImageConfig& model, uint64_t seed, const char* stream)
      : size_(size), model_(model), key_(RandomKey::of(seed, stream, 0)) {
    for (int64_t i = 0; i < model.classes; ++i) names_.push_back(std::to_string(i));
  }
  int64_t size() const override { return size_; }
  int64_t classes() const override { return model_.classes; }
  const std::vector<std::string>& class_names() const override { return names_; }
  Sample get(int64_t index) const override {
    RandomStream random({key_.key, static_cast<uint64_t>(index)});
    const int side = static_cast<int>(model_.image_size), channels = static_cast<int>(model_.channels);
    Sample sample{{side, side, channels, std::vector<uint8_t>(static_cast<size_t>(side) * side * channels)}, 0};
    std::vector<uint8_t>& pixels = sample.image.pixels;
    for (size_t i = 0; i < pixels.size(); i += sizeof(uint32_t)) {
      const uint32_t word = random.next();
      std::memcpy(&pixels[i], &word, std::min(sizeof word, pixels.size() - i));
    }
    sample.label = static_cast<int64_t>(random.below(static_cast<uint64_t>(model_.classes)));
    return sample;
  }
  std::string describe(int64_t index) const override { return "random picture " + std::to_string(index); }

 private:
  int64_t size_;
  ImageConfig model_;
  RandomKey key_;
  std::vector<std::string> names_;
};

/// Mean and standard deviation of the training pixels, as published for each set.
void default_normalization(const std::string& kind, std::vector<float>& mean, std::vector<float>& std) {
  if (kind == "cifar10")
    mean = {0.4914f, 0.4822f, 0.4465f}, std = {0.2470f, 0.2435f, 0.2616f};
  else if (kind == "cifar100")
    mean = {0.5071f, 0.4865f, 0.4409f}, std = {0.2673f, 0.2564f, 0.2762f};
  else if (kind == "idx")
    mean = {0.1307f}, std = {0.3081f};
  else if (kind == "image_folder" || kind == "shards" || kind == "packed")
    mean = {0.485f, 0.456f, 0.406f}, std = {0.229f, 0.224f, 0.225f};
  else
    mean = {0.5f, 0.5f, 0.5f}, std = {0.5f, 0.5f, 0.5f};
}

void fit_channels(std::vector<float>& values, int64_t channels) {
  if (static_cast<int64_t>(values.size()) == channels) return;
  float sum = 0;
  for (float v : values) sum += v;
  values.assign(static_cast<size_t>(channels), sum / static_cast<float>(values.size()));
}

}  // namespace

int64_t known_classes(const RunConfig& config) {
  const std::string& kind = config.data.kind;
  if (kind == "cifar100") return 100;
  return kind == "shapes" || kind == "cifar10" || kind == "idx" ? 10 : 0;
}

DatasetPair make_datasets(const RunConfig& config, const ImageConfig& model, bool train) {
  const DataConfig& d = config.data;
  const uint64_t seed = static_cast<uint64_t>(config.seed);
  if (d.kind == "random") {
    const int64_t train_size = d.train_size > 0 ? d.train_size : 1024, test_size = d.test_size > 0 ? d.test_size : 256;
    return {std::make_shared<RandomDataset>(train_size, model, seed, "random.train"),
            std::make_shared<RandomDataset>(test_size, model, seed, "random.test")};
  }
  DataOptions options;
  options.kind = d.kind;
  options.train = train;
  options.path = d.path;
  options.train_size = d.train_size;
  options.test_size = d.test_size;
  options.seed = seed;
  options.image_size = model.image_size;
  options.max_pixels = d.max_pixels;
  if (d.kind == "idx") options.classes = model.classes;
  if (d.kind == "shards") options.classes = config.model.classes.value_or(0);
  if (d.kind != "shapes" && d.path.empty())
    config.refuse("data.path", "data.kind: ", d.kind, " needs the ", d.kind == "packed" ? "file" : "folder",
                  " of its pictures, e.g. --set data.path=/data/", d.kind);
  return open_datasets(options);
}

DatasetPair make_training_data(const RunConfig& config, const ImageConfig& model) {
  DatasetPair data = make_datasets(config, model);
  const int64_t size = data.train->size(), classes = data.train->classes();
  if (config.train.batch_size > size)
    config.refuse("train.batch_size", "a batch of ", config.train.batch_size, " is larger than the data set of ", size, " training images");
  if (config.model.classes && *config.model.classes < classes)
    config.refuse("model.classes", "the data has ", classes, " classes, more than the model's ", *config.model.classes);
  return data;
}

TransformOptions make_transform(const RunConfig& config, const ImageConfig& model) {
  const DataConfig& d = config.data;
  TransformOptions t;
  t.image_size = model.image_size;
  t.channels = model.channels;
  t.crop = parse_crop(d.crop, "data.crop");
  t.crop_padding = d.crop_padding;
  t.scale = {d.crop_scale.at(0), d.crop_scale.at(1)};
  t.ratio = {d.crop_ratio.at(0), d.crop_ratio.at(1)};
  t.flip = d.flip;
  t.vflip = d.vflip;
  t.augment = parse_augment(d.augment, "data.augment");
  const std::vector<double>& jitter = d.color_jitter;
  t.color_jitter =
      jitter.size() < 3 ? ColorJitter(jitter.at(0)) : ColorJitter(jitter[0], jitter[1], jitter[2], jitter.size() > 3 ? jitter[3] : 0);
  t.grayscale = d.grayscale;
  t.blur = d.blur;
  t.erasing.probability = d.erasing;
  t.erasing.mode = parse_erasing_mode(d.erasing_mode, "data.erasing_mode");
  t.erasing.max_count = d.erasing_count;
  t.random_interpolation = d.interpolation == "random";
  if (!t.random_interpolation) t.interpolation = parse_interpolation(d.interpolation, "data.interpolation");
  t.crop_pct = d.crop_pct;
  t.eval_flip = d.eval_flip;
  default_normalization(d.kind, t.mean, t.std);
  fit_channels(t.mean, t.channels);
  fit_channels(t.std, t.channels);
  const auto take = [&](const char* key, const std::vector<double>& given, std::vector<float>& into) {
    if (given.empty()) return;
    if (static_cast<int64_t>(given.size()) != t.channels)
      config.refuse(key, "has ", given.size(), " values, but the model sees ", t.channels, " channels");
    into.assign(given.begin(), given.end());
  };
  take("data.mean", d.mean, t.mean);
  take("data.std", d.std, t.std);
  if (t.crop == Crop::simple && 2 * t.crop_padding >= t.image_size)
    config.refuse("data.crop_padding", t.crop_padding, " pixels of reflection are not less than half of the picture's side of ",
                  t.image_size);
  if (t.crop_padding > t.image_size)
    config.refuse("data.crop_padding", t.crop_padding, " pixels of padding are more than the picture's side of ", t.image_size);
  try {
    t.validate();
  } catch (const UsageError&) {
    throw;
  } catch (const Error& e) {
    throw UsageError(concat("data: ", e.what()));
  }
  return t;
}

static MixOptions mix_options(const RunConfig& config) {
  const DataConfig& d = config.data;
  const MixOptions mix{d.mixup, d.cutmix, d.mix_prob, d.mix_switch_prob, parse_mix_mode(d.mix_mode, "data.mix_mode"), d.mix_off_epoch};
  if (mix.on() && config.train.batch_size % 2 != 0)
    config.refuse("train.batch_size", config.train.batch_size, " is odd, and mixup and CutMix mix samples in pairs");
  return mix;
}

LoaderOptions make_loader_options(const RunConfig& config, bool train, Device device) {
  const int64_t eval_batch = config.train.eval_batch_size > 0 ? config.train.eval_batch_size : config.train.batch_size;
  LoaderOptions options = train ? LoaderOptions{} : LoaderOptions::evaluation(eval_batch);
  if (train) options.batch_size = config.train.batch_size;
  if (train) options.repeats = config.data.repeats;
  options.rank = config.rank, options.world_size = config.ranks;
  options.pinned = device.kind == DeviceKind::cuda;
  options.workers = config.data.workers;
  options.prefetch = config.data.prefetch;
  options.seed = static_cast<uint64_t>(config.seed);
  if (train) options.mix = mix_options(config);
  options.on_bad_sample = parse_on_bad_sample(config.data.on_bad_sample, "data.on_bad_sample");
  return options;
}

StoragePolicy make_policy(const StorageConfig& storage) {
  std::vector<StorageRule> rules;
  for (const StorageRuleConfig& rule : storage.rules) rules.push_back({rule.match, rule.codec, rule.options, rule.where});
  return StoragePolicy(storage.name, std::move(rules));
}

StorageConfig reference_storage() {
  StorageConfig exact;
  exact.name = "exact";
  exact.rules = {{"*", "exact", {}, ""}};
  exact.rules.push_back({"@(*.@(qkv|q|kv|sr|fc1|fc2|reduction|conv[23])|head?(_dist|.fc))?(.lora_A):x", "rebuild", {}, ""});
  return exact;
}

SentBatch send(Batch batch, int64_t classes, Device device, const cuda::Mark& after) {
  check_labels(batch.labels, classes);
  SentBatch sent{std::move(batch), {}, {}, {}, {}, {}, {}};
  sent.pixels = sent.host.images, sent.labels = sent.host.labels;
  sent.mirrored = sent.host.mirrored, sent.mixing = sent.host.mixing;
  if (device.kind != DeviceKind::cuda) return sent;
  std::vector<Tensor> sources;
  for (Tensor* t : {&sent.pixels, &sent.labels, &sent.mirrored, &sent.mixing}) {
    if (!t->defined()) continue;
    sources.push_back(*t);  // a byte a value: four times less to move than floats
    *t = Tensor::empty(t->shape(), t->dtype(), device, MemoryKind::inputs);
  }
  // All memory is there before anything is on its way to it.
  auto source = sources.begin();
  for (const Tensor* t : {&sent.pixels, &sent.labels, &sent.mirrored, &sent.mixing})
    if (t->defined()) sent.arrival = cuda::copy_to_device_beside(t->raw(), source->raw(), t->bytes(), after), ++source;
  sent.guard = std::shared_ptr<void>(nullptr, [mark = sent.arrival](void*) {
    try {
      if (cuda::passed(mark)) return;
      cuda::wait_for(mark);
      cuda::synchronize("the copy of a batch");
    } catch (const Error&) {  // the GPU is lost, and nothing copies any more; whoever asks it next is told
    }
  });
  return sent;
}

Prepared prepare(const SentBatch& batch, const TransformOptions& transform, DType dtype) {
  if (batch.arrival) cuda::wait_for(batch.arrival);
  const Tensor& pixels = batch.pixels;
  const Shape shape{pixels.dim(0), pixels.dim(3), pixels.dim(1), pixels.dim(2)};
  const Tensor images = Tensor::empty(shape, dtype, pixels.device(), MemoryKind::inputs);
  kernels::normalize_images(pixels, transform.mean, transform.std, batch.mirrored, batch.mixing, images);
  return {images, batch.labels, batch.mixing};
}

BuiltModel::BuiltModel(const RunConfig& config, const NetConfig& model, Device device)
    : device(device),
      images(picture_dtype(config, device)),
      net(Builder(params, static_cast<uint64_t>(config.seed), compute_dtype(config, device), DType::f32, device, lora_options(config)),
          model) {
  choose_trained(config, params);
}

std::string first_bad_parameter(const ParamStore& params) {
  for (const Param& param : params.params()) {
    int64_t at = -1;
    kernels::first_nonfinite(param.value, &at);
    if (at >= 0) return concat(param.name, " (element ", at, ")");
  }
  return "";
}

}  // namespace mesa
