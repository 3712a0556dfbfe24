// The description of a run: a plain struct, read strictly from YAML, with the place of every value kept for error messages.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mesa/base/error.h"

namespace mesa {

/// The fields left empty come from the table entry that `name` selects.
struct ModelConfig {
  std::string name = "vit";
  std::optional<int64_t> image_size, patch_size, width, depth, heads, window;
  std::optional<std::vector<int64_t>> depths;
  std::optional<double> mlp_ratio;
  std::optional<int64_t> channels, classes;
  std::optional<std::string> pool;  ///< token | mean
  std::optional<bool> distilled, token_positions, qkv_bias, pad;
  std::optional<int64_t> registers;
  std::optional<double> layer_scale;
  double drop_rate = 0, attn_drop_rate = 0, drop_path = 0;
  std::string attention = "fused";  ///< fused | explicit | cudnn
  bool operator==(const ModelConfig&) const = default;
};

struct DataConfig {
  std::string kind = "shapes";  ///< shapes | cifar10 | cifar100 | idx | image_folder | shards | packed | random
  std::string path;
  int64_t train_size = 0, test_size = 0;  ///< images; 0 = all (or the built-in size of generated sets)
  int64_t workers = 2;                    ///< loader threads
  int64_t prefetch = 4;                   ///< batches made ahead
  std::string on_bad_sample = "error";    ///< error | skip
  int64_t max_pixels = 100'000'000;
  int64_t repeats = 1;        ///< of each picture, augmented anew
  std::string crop = "none";  ///< none | pad | resized | simple
  int64_t crop_padding = 4;   ///< pixels
  std::vector<double> crop_scale{0.08, 1.0};
  std::vector<double> crop_ratio{0.75, 4.0 / 3};
  double flip = 0, vflip = 0;                   ///< probabilities
  std::string augment;                          ///< empty | rand-... | 3a
  std::vector<double> color_jitter{0};          ///< strength, or [brightness, contrast, saturation] and hue
  double grayscale = 0, blur = 0, erasing = 0;  ///< probabilities
  std::string erasing_mode = "pixel";           ///< const | rand | pixel
  int64_t erasing_count = 1;                    ///< rectangles
  std::string interpolation = "bicubic";        ///< bilinear | bicubic | random
  double crop_pct = 1;
  bool eval_flip = false;
  double mixup = 0, cutmix = 0;  ///< alpha; 0 = none
  double mix_prob = 1, mix_switch_prob = 0.5;
  std::string mix_mode = "batch";  ///< batch | pair | elem
  int64_t mix_off_epoch = 0;       ///< 0 = never
  std::vector<double> mean, std;   ///< per channel, of values in [0, 1]; empty = the data set's own
  bool operator==(const DataConfig&) const = default;
};

struct TrainConfig {
  int64_t epochs = 10;
  int64_t batch_size = 64;
  std::string precision = "fp32";  ///< fp32 | bf16
  bool force_precision = false;
  bool cuda_graph = false;
  bool autotune = false;
  int64_t accumulation = 1;
  double clip_norm = 0;                ///< 0 = off
  std::string loss = "cross_entropy";  ///< cross_entropy | bce
  std::optional<double> bce_threshold;
  double label_smoothing = 0;
  int64_t eval_batch_size = 0;  ///< 0 = batch_size
  int64_t log_interval = 50;    ///< steps
  int64_t max_bad_steps = 10;
  int64_t threads = 0;              ///< 0 = OMP_NUM_THREADS, or all cores
  int64_t steps = 0;                ///< 0 = all
  int64_t checkpoint_interval = 0;  ///< steps; 0 = after each epoch only
  int64_t keep = 0;                 ///< older checkpoints
  std::vector<std::string> stop_signals{"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"};
  double ema_decay = 0;  ///< of the weights' moving average; 0 = none
  bool ema_warmup = false;
  std::vector<std::string> frozen;  ///< globs of parameter names
  double rank_timeout = 60;         ///< seconds
  bool range_sync = true;
  std::string shard = "none";             ///< none | optimizer
  std::string reduce_precision = "fp32";  ///< fp32 | bf16
  bool tensorboard = false;
  std::vector<std::string> histograms;  ///< globs of parameter names and sites
  int64_t health_interval = 0;          ///< steps; 0 = off
  std::string weights;                  ///< checkpoint or safetensors file to begin with; empty = first values
  bool operator==(const TrainConfig&) const = default;
};

/// Low-rank adaptation: what PEFT's LoraConfig calls r, lora_alpha, lora_dropout, target_modules and modules_to_save.
struct LoraConfig {
  int64_t rank = 0;             ///< 0 = off
  std::optional<double> alpha;  ///< empty = rank
  double dropout = 0;
  std::vector<std::string> targets{"*.attn.qkv"};  ///< globs of linears
  std::vector<std::string> train;                  ///< globs of parameters that learn besides
  bool operator==(const LoraConfig&) const = default;
};

/// Learning from a trained model beside the labels.
struct DistillConfig {
  std::string kind = "none";  ///< none | soft | hard
  std::string teacher;        ///< checkpoint or safetensors file
  std::string model;          ///< the teacher's name where its file does not say; empty = it does
  double alpha = 0.5, tau = 1;
  bool operator==(const DistillConfig&) const = default;
};

/// The fields left empty have the defaults of the optimizer that `name` selects, if it has such a thing: see with_defaults.
struct OptimizerConfig {
  std::string name = "adamw";  ///< adamw | sgd | lamb
  double lr = 1e-3;
  int64_t lr_base_batch = 0;  ///< images; 0 = learning rates are what they say
  double weight_decay = 0.05;
  std::optional<double> beta1, beta2, eps;  ///< adamw, lamb
  std::optional<double> momentum;           ///< sgd
  std::optional<bool> nesterov;             ///< sgd
  std::optional<bool> trust_clip;           ///< lamb
  double layer_decay = 1;
  std::vector<std::string> no_decay;  ///< globs of parameter names
  bool operator==(const OptimizerConfig&) const = default;
};
/// The empty fields filled in that its optimizer has.
OptimizerConfig with_defaults(OptimizerConfig config);

struct ScheduleConfig {
  std::string name = "cosine";  ///< cosine | linear | step | constant
  double warmup_epochs = 0, warmup_lr = 1e-6, min_lr = 0;
  std::optional<double> decay_rate, decay_epochs;  ///< step; 0.1 and 30 where empty
  bool operator==(const ScheduleConfig&) const = default;
};

/// One rule of a storage policy, as it was written. `options` are the codec's own (groups, range, decay, rounding, ...).
struct StorageRuleConfig {
  std::string match, codec;
  std::map<std::string, std::string> options;
  std::string where;  ///< "file:line", for errors; not part of the value
  bool operator==(const StorageRuleConfig& o) const { return match == o.match && codec == o.codec && options == o.options; }
};

struct StorageConfig {
  std::string name = "exact";  ///< for display: the file's name without .yaml, or "custom" for rules written in place
  std::vector<StorageRuleConfig> rules{{"*", "exact", {}, "default"}};
  bool operator==(const StorageConfig&) const = default;
};

struct RunConfig {
  ModelConfig model;
  DataConfig data;
  TrainConfig train;
  LoraConfig lora;
  DistillConfig distill;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  StorageConfig storage;
  int64_t seed = 0;
  std::string device = "auto";  ///< auto | cpu | cuda
  std::string output;           ///< folder of the run; empty = chosen by the app
  int64_t rank = 0, ranks = 1;  ///< of this process, set by whoever starts the run: no keys, and not compared

  /// "file:line" or "--set key=value" that gave the key its value, or "default".
  std::string where(const std::string& key) const;
  /// Throws UsageError "<where>: <key>: <text>" (of a default "<key>: <text>"), for values that only the trainer can judge.
  template <class... Parts>
  [[noreturn]] void refuse(const std::string& key, const Parts&... parts) const {
    const std::string place = where(key);
    throw UsageError(concat(place == "default" ? "" : place + ": ", key, ": ", parts...));
  }
  /// Compares values, not the places where they were set.
  bool operator==(const RunConfig& o) const {
    return model == o.model && data == o.data && train == o.train && lora == o.lora && distill == o.distill && optimizer == o.optimizer &&
           schedule == o.schedule && storage == o.storage && seed == o.seed && device == o.device && output == o.output;
  }

  std::map<std::string, std::string> places;
};

/// Reads a config file and its bases, then applies the overrides ("train.epochs=3"). A bare name ("deit_s") is looked up in the current
/// folder and in the config roots. Throws UsageError with file:line, the key, what is wrong and the nearest known key.
RunConfig load_config(const std::string& name, const std::vector<std::string>& overrides = {});

/// The same from text, without touching the disk: `base` and storage by name are refused. `name` stands for the file in errors.
RunConfig parse_config(std::string_view text, const std::string& name, const std::vector<std::string>& overrides = {});

/// The resolved config, complete and self-contained: parse_config(to_yaml(c), ...) == c.
std::string to_yaml(const RunConfig& config);

/// A storage policy by the name of a file in configs/storage, or by path.
StorageConfig load_storage(const std::string& name);

/// Checks what concerns several keys at once (head count, patch size, ...); load_config and parse_config call it.
void check_config(const RunConfig& config);

/// One key of the format, for documents and completion.
struct ConfigKey {
  std::string name, type, default_value, doc;
  std::vector<std::string> choices;  ///< all values there are, where these have names
};
std::vector<ConfigKey> config_keys();
/// The table of all keys in Markdown, one section for each top-level key.
std::string config_reference();

/// Folders that hold shipped configs: those of MESA_CONFIG_DIR (colon-separated), and share/mesa/configs of the tree that the program or
/// this library lies in.
std::vector<std::string> config_roots();

}  // namespace mesa
