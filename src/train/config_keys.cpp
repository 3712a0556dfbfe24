#include "config_keys.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <sstream>

namespace mesa::config {
namespace {

constexpr Allowed any() { return {}; }
constexpr Allowed between(double low, double high) { return {low, high, false, false, "", 0}; }
constexpr Allowed at_least(double low) { return {low, 1e15, false, false, "", 0}; }
constexpr Allowed above(double low) { return {low, 1e15, true, false, "", 0}; }
constexpr Allowed fraction() { return {0, 1, false, true, "", 0}; }  // [0, 1)
constexpr Allowed probability() { return {0, 1, false, false, "", 0}; }
constexpr Allowed one_of(const char* choices) { return {0, 0, false, false, choices, 0}; }
constexpr Allowed count(double low = 1, double high = 1e9) { return between(low, high); }
constexpr Allowed size(double high = 65536) { return between(1, high); }
constexpr Allowed pair(double low, double high) { return {low, high, true, false, "", 2}; }

// The name of a key is the name of its field.
#define KEY(field, allowed, doc)                                                        \
  Key {                                                                                 \
#field, +[](RunConfig & c) -> decltype((c.field)) { return c.field; }, allowed, doc \
  }

const Key kKeys[] = {
    KEY(model.name, any(),
        "Architecture: `vit` (give all sizes), or a table entry such as `deit_small_patch16_224` (timm's names), in short `deit_small`"),
    KEY(model.image_size, size(), "Height and width of the input in pixels"),
    KEY(model.patch_size, size(), "Height and width of a patch; divides the image size"),
    KEY(model.width, size(), "Embedding dimension; a multiple of `model.heads`. Of a ResNet the channels of its stem"),
    KEY(model.depth, size(1000), "Number of encoder blocks (ViT)"),
    KEY(model.depths, size(1000), "Number of blocks of each stage, such as `[2, 2, 6, 2]` (Swin, PVT, ResNet)"),
    KEY(model.heads, size(1024), "Attention heads; of a Swin's first stage, and width and heads double at each"),
    KEY(model.window, size(64), "Side of the windows of attention in tokens (Swin)"),
    KEY(model.pad, any(), "Pad grids of tokens that windows do not tile (Swin), in place of refusing them"),
    KEY(model.mlp_ratio, pair(0, 64), "Hidden width of the MLP over the embedding width"),
    KEY(model.channels, size(64), "Channels of the input image"),
    KEY(model.classes, size(1e6), "Number of classes"),
    KEY(model.pool, one_of("token|mean"), "What the head reads: the class token, or the mean over the patches"),
    KEY(model.distilled, any(), "A distillation token with a head of its own; logits are the mean of both heads"),
    KEY(model.registers, count(0, 1024), "Register tokens, which nothing reads"),
    KEY(model.token_positions, any(), "Position embeddings for the tokens in front of the patches, too"),
    KEY(model.layer_scale, (Allowed{0, 10, false, false, "", 0}), "First value of the factors on each branch's channels; 0 = none"),
    KEY(model.qkv_bias, any(), "Bias in the q, k, v projection"),
    KEY(model.drop_rate, fraction(), "Dropout after the embedding, the projections and the MLP layers"),
    KEY(model.attn_drop_rate, fraction(), "Dropout on the attention weights"),
    KEY(model.drop_path, fraction(), "Stochastic depth of the last block; rises linearly from 0 over the depth"),
    KEY(model.attention, one_of("fused|explicit|cudnn"),
        "`fused` never forms the N x N map; `explicit` is matmul, softmax, matmul; `cudnn` is fused by cuDNN (a GPU and bf16)"),

    KEY(data.kind, one_of("shapes|cifar10|cifar100|idx|image_folder|shards|packed|random"),
        "Data set; `shapes` is drawn, `random` is noise for benchmarks"),
    KEY(data.path, any(), "Folder of the data set; of `packed` its file"),
    KEY(data.train_size, count(0), "Training images to use; 0 = all (10,000 of `shapes`, 1,024 of `random`)"),
    KEY(data.test_size, count(0), "Test images to use; 0 = all (2,000 of `shapes`, 256 of `random`)"),
    KEY(data.workers, count(0, 1024), "Loader threads; 0 = one for every four processors, at least one"),
    KEY(data.prefetch, count(1, 4096), "Batches made ahead of training"),
    KEY(data.on_bad_sample, one_of("error|skip"),
        "A damaged image stops the run; or it is replaced (left out in evaluation), counted and listed"),
    KEY(data.max_pixels, count(1, 1e12), "Images that claim more pixels are refused before memory is taken"),
    KEY(data.repeats, count(1, 64), "Repeated augmentation: appearances of each image that an epoch takes"),
    KEY(data.crop, one_of("none|pad|resized|simple"),
        "Training crop: none, shifted by zero padding, random resized crop, or random square inside reflected padding"),
    KEY(data.crop_padding, count(0, 65536), "Pixels of padding on each side for `crop: pad` and `crop: simple`"),
    KEY(data.crop_scale, pair(0, 1), "Smallest and largest share of the area for `crop: resized`"),
    KEY(data.crop_ratio, pair(0, 100), "Smallest and largest aspect ratio for `crop: resized`"),
    KEY(data.flip, probability(), "Probability of a horizontal flip"),
    KEY(data.vflip, probability(), "Probability of a vertical flip"),
    KEY(data.augment, any(),
        "Random operations: empty, `rand-...` (RandAugment, such as `rand-m9-mstd0.5-inc1`), or `3a` (3-Augment); see augmentation.md"),
    KEY(data.color_jitter, (Allowed{0, 1, false, false, "", 0, true}),
        "Strength of brightness, contrast and saturation jitter, or all three, or with hue (at most 0.5): `[0.4, 0.4, 0.4, 0.1]`; beside "
        "`augment: rand-...` none"),
    KEY(data.grayscale, probability(), "Probability of a gray image"),
    KEY(data.blur, probability(), "Probability of a Gaussian blur"),
    KEY(data.erasing, probability(), "Probability of random erasing"),
    KEY(data.erasing_mode, one_of("const|rand|pixel"), "Erase with the mean, with a random colour, or with random pixels"),
    KEY(data.erasing_count, count(1, 64), "Largest number of rectangles to erase; they share the area"),
    KEY(data.interpolation, one_of("bilinear|bicubic|random"),
        "Filter of every resize and of geometric operations; `random`: drawn each time in training, bicubic in evaluation"),
    KEY(data.crop_pct, (Allowed{0, 1, true, false, "", 0}), "Share of the resized image that the evaluation's centre crop keeps"),
    KEY(data.eval_flip, any(), "Evaluate each image and its mirror image, too: logits are the mean of both"),
    KEY(data.mixup, at_least(0), "Mixup: alpha of Beta(alpha, alpha), from which the share of a sample in its mixture comes; 0 = none"),
    KEY(data.cutmix, at_least(0), "CutMix: the same for the share of the area; where both are on, one is drawn"),
    KEY(data.mix_prob, probability(), "Probability of mixing at all"),
    KEY(data.mix_switch_prob, probability(), "Probability of CutMix where Mixup is on, too"),
    KEY(data.mix_mode, one_of("batch|pair|elem"), "One draw for each batch, each pair of samples, or each sample"),
    KEY(data.mix_off_epoch, count(0, 1e6), "Nothing is mixed from this epoch on; 0 = to the end"),
    KEY(data.mean, between(-1e6, 1e6), "Per-channel mean of values in [0, 1]; empty = the data set's own"),
    KEY(data.std, (Allowed{0, 1e6, true, false, "", 0}), "Per-channel standard deviation; empty = the data set's own"),

    KEY(train.epochs, count(1, 1e6), "Passes over the training set"),
    KEY(train.batch_size, count(1, 1e6), "Images of one forward and backward pass"),
    KEY(train.precision, one_of("fp32|bf16"),
        "`bf16`: matrix products in bf16; master weights, norms, softmax, loss and statistics in fp32"),
    KEY(train.force_precision, any(), "Run bf16 even on a CPU without avx512_bf16 (slow)"),
    KEY(train.accumulation, count(1, 1e6), "Batches whose gradients are added before one update"),
    KEY(train.clip_norm, at_least(0), "Largest norm of the whole gradient; 0 = no clipping"),
    KEY(train.loss, one_of("cross_entropy|bce"), "`bce`: each class is a yes or no of its own (sigmoid), averaged over batch and classes"),
    KEY(train.bce_threshold, fraction(), "`bce`: targets above this are 1 and the others 0, as in DeiT III (0); empty = as they are"),
    KEY(train.label_smoothing, fraction(), "Share of the target spread over all classes"),
    KEY(train.eval_batch_size, count(0, 1e6), "Batch size of the evaluation; 0 = `train.batch_size`"),
    KEY(train.log_interval, count(1), "Steps between two log lines"),
    KEY(train.max_bad_steps, count(1, 1e6), "Steps with a non-finite loss or gradient in a row that stop the run"),
    KEY(train.threads, count(0, 4096), "Compute threads; 0 = `OMP_NUM_THREADS`, or all cores"),
    KEY(train.steps, count(0, 1e12), "Stop after this many steps in all; 0 = train all epochs"),
    KEY(train.tensorboard, any(), "Write event files for TensorBoard into the run's folder"),
    KEY(train.histograms, any(),
        "Globs of what TensorBoard shows as histograms: parameters and their gradients after each epoch, sites each "
        "`train.health_interval`"),
    KEY(train.health_interval, count(0, 1e12), "Steps between two measurements of how well each site is stored (health.csv); 0 = none"),
    KEY(train.checkpoint_interval, count(0, 1e12), "Steps between checkpoints; 0 = after each epoch only"),
    KEY(train.keep, count(0, 1e6), "Older checkpoints that stay beside `last` and `best`, as `checkpoints/step-N`"),
    KEY(train.stop_signals, one_of("SIGTERM|SIGINT|SIGHUP|SIGUSR1|SIGUSR2|SIGQUIT|SIGALRM|SIGXCPU"),
        "Signals after which the run finishes its step, saves and exits with 75; all others do what they do to any program"),
    KEY(train.rank_timeout, between(8, 86400),
        "Seconds that one of several ranks may stay silent or keep the others waiting before all end"),
    KEY(train.range_sync, any(),
        "With several ranks: running ranges are the mean over all; else each has its own, and a resumed run has rank 0's"),
    KEY(train.shard, one_of("none|optimizer"),
        "With several ranks: `optimizer` gives each its part of the optimizer's state and work (ZeRO-1) in place of all of it"),
    KEY(train.reduce_precision, one_of("fp32|bf16"), "With several ranks: what gradients are added up in"),
    KEY(train.cuda_graph, any(), "Record the passes of a GPU and run them as one: for small models"),
    KEY(train.autotune, any(),
        "On a GPU: time the algorithms that the library has for each product (and the sums for biases in it or apart) at its first use, "
        "and keep the fastest; a resumed run finds them in its folder"),
    KEY(train.weights, any(),
        "Begin with the weights of this checkpoint or safetensors file: positions are resized, a head of other classes begins anew"),
    KEY(train.ema_decay, fraction(),
        "Keep a moving average of the weights with this decay, evaluate it too, and judge `best` by it; 0 = off"),
    KEY(train.ema_warmup, any(), "Begin the average with smaller decays: update t has at most 1 - t^(-2/3)"),
    KEY(train.frozen, any(), "Globs of parameter names that are not trained, such as `[blocks.0.*, pos_embed]`"),

    KEY(lora.rank, count(0, 65536), "Rank of LoRA's factors beside each target; all but these and the head is frozen; 0 = off"),
    KEY(lora.alpha, above(0), "The factors' product counts alpha / rank; empty = `lora.rank`"),
    KEY(lora.dropout, fraction(), "Dropout on what the factors read"),
    KEY(lora.targets, any(), "Globs of the linears that get factors, such as `[blocks.*.attn.*, blocks.*.mlp.fc1]`"),
    KEY(lora.train, any(), "Globs of parameters that learn beside the factors and the head, such as `[\"*.bias\"]`"),

    KEY(distill.kind, one_of("none|soft|hard"), "What is learned from a teacher: its probabilities (`soft`) or its choices (`hard`)"),
    KEY(distill.teacher, any(), "Checkpoint or safetensors file of the teacher"),
    KEY(distill.model, any(), "The teacher's `model.name`, for a file that does not say"),
    KEY(distill.alpha, probability(), "Share of the teacher in the loss"),
    KEY(distill.tau, above(0), "Temperature of both distributions (`soft`)"),

    KEY(optimizer.name, one_of("adamw|sgd|lamb"), "Optimizer"),
    KEY(optimizer.lr, above(0), "Peak learning rate"),
    KEY(optimizer.lr_base_batch, count(0),
        "Images of an update that the learning rates are meant for: all are multiplied by the run's number over this one; 0 = off"),
    KEY(optimizer.weight_decay, at_least(0),
        "Weight decay, decoupled from the gradient but for `sgd`; not on biases, norms, tokens and position embedding"),
    KEY(optimizer.no_decay, any(), "Globs of further parameters without weight decay, such as `[head.*]`"),
    KEY(optimizer.beta1, fraction(), "Decay of the first moment (`adamw`, `lamb`); empty = 0.9"),
    KEY(optimizer.beta2, fraction(), "Decay of the second moment (`adamw`, `lamb`); empty = 0.999"),
    KEY(optimizer.eps, above(0), "Added to the root of the second moment; empty = 1e-8 of `adamw`, 1e-6 of `lamb`"),
    KEY(optimizer.momentum, fraction(), "Momentum of `sgd`; 0 = none, which keeps no buffer; empty = 0.9"),
    KEY(optimizer.nesterov, any(), "Nesterov's momentum (`sgd`); empty = false"),
    KEY(optimizer.trust_clip, any(), "No trust ratio above 1 (`lamb`); empty = false"),
    KEY(optimizer.layer_decay, (Allowed{0, 1, true, false, "", 0}),
        "Each layer learns at this times the rate of the next, from the embeddings to the head; 1 = all alike"),

    KEY(schedule.name, one_of("cosine|linear|step|constant"), "Learning rate after the warm-up"),
    KEY(schedule.warmup_epochs, at_least(0), "Length of the linear warm-up in epochs (fractions allowed)"),
    KEY(schedule.warmup_lr, at_least(0), "Learning rate of the first step of the warm-up"),
    KEY(schedule.min_lr, at_least(0), "Learning rate at the end of `cosine` and `linear`; at most `optimizer.lr`"),
    KEY(schedule.decay_rate, (Allowed{0, 1, true, false, "", 0}), "Factor of the learning rate at each step of `step`; empty = 0.1"),
    KEY(schedule.decay_epochs, above(0), "Epochs between two steps of `step` (fractions allowed); empty = 30"),

    KEY(seed, between(0, 9e18), "Seed of initialization, data order, augmentation, dropout and stochastic rounding"),
    KEY(device, one_of("auto|cpu|cuda"), "Where to train; `auto` takes the best that this build and machine have"),
    KEY(output, any(), "Folder of the run; empty = `runs/<date>-<model>-<image size>`"),
};
#undef KEY

std::string number_text(double x) {
  std::array<char, 32> text;
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), x).ptr};
}

struct Reader {
  const Key& key;
  const Value& value;

  template <class... Parts>
  [[noreturn]] void wrong(const Value& at, const Parts&... parts) const {
    refuse(at, key.name, ": ", parts...);
  }

  const std::string& plain(const Value& v, const char* needed) const {
    if (v.is(Value::Kind::null)) wrong(v, "has no value; ", needed, " is needed");
    if (!v.is(Value::Kind::scalar) || v.quoted) wrong(v, v.describe(), " is not ", needed);
    return v.text;
  }

  void in_range(double x, const Value& v) const {
    const Allowed& a = key.allowed;
    if ((a.low_open ? x > a.low : x >= a.low) && (a.high_open ? x < a.high : x <= a.high)) return;
    std::string text = "must be ";
    if (std::isfinite(a.low)) text += (a.low_open ? "above " : "at least ") + number_text(a.low);
    if (std::isfinite(a.high) && (a.high < 1e15 || x > a.high))
      text += (a.high_open ? " and below " : " and at most ") + number_text(a.high);
    wrong(v, text, ", not ", v.text);
  }

  int64_t integer(const Value& v) const {
    const std::string& text = plain(v, "a whole number");
    int64_t x = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), x);
    if (code == std::errc::result_out_of_range) wrong(v, text, " is out of range");
    if (code != std::errc{} || end != text.data() + text.size()) wrong(v, v.describe(), " is not a whole number");
    in_range(static_cast<double>(x), v);
    return x;
  }

  double number(const Value& v) const {
    const std::string& text = plain(v, "a number");
    double x = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), x);
    if (code == std::errc::result_out_of_range) wrong(v, text, " is out of range");
    if (text == ".nan" || text == ".NaN" || text == ".inf" || text == "-.inf" || text == ".Inf") wrong(v, "must be finite, not ", text);
    if (code != std::errc{} || end != text.data() + text.size()) wrong(v, v.describe(), " is not a number");
    if (!std::isfinite(x)) wrong(v, "must be finite, not ", text);
    in_range(x, v);
    return x;
  }

  bool boolean(const Value& v) const {
    const std::string& text = plain(v, "true or false");
    if (text != "true" && text != "false") wrong(v, v.describe(), " is not true or false");
    return text == "true";
  }

  std::string text(const Value& v) const {
    if (v.is(Value::Kind::null)) wrong(v, "has no value; text is needed");
    if (!v.is(Value::Kind::scalar)) wrong(v, v.describe(), " where text is needed");
    if (*key.allowed.choices == 0) return v.text;
    const std::vector<std::string> allowed = choices(key);
    if (std::find(allowed.begin(), allowed.end(), v.text) != allowed.end()) return v.text;
    const std::string near = allowed.size() > 1 ? nearest(v.text, allowed) : "";
    wrong(v, v.describe(), " is not one of ", type_name(key), near.empty() ? "" : "; did you mean '" + near + "'?");
  }

  template <class F>
  auto list(F&& read) const {
    if (key.allowed.single && value.is(Value::Kind::scalar)) return std::vector<decltype(read(value))>{read(value)};
    if (!value.is(Value::Kind::list)) wrong(value, value.describe(), " where a list is needed, such as [a, b]");
    if (key.allowed.length != 0 && value.items.size() != key.allowed.length)
      wrong(value, "needs ", key.allowed.length, " values, not ", value.items.size());
    std::vector<decltype(read(value))> out;
    for (const Value& item : value.items) out.push_back(read(item));
    return out;
  }

  void into(int64_t& field) const { field = integer(value); }
  void into(double& field) const { field = number(value); }
  void into(bool& field) const { field = boolean(value); }
  void into(std::string& field) const { field = text(value); }
  void into(std::vector<std::string>& field) const {
    field = list([&](const Value& v) { return text(v); });
  }
  void into(std::vector<int64_t>& field) const {
    field = list([&](const Value& v) { return integer(v); });
  }
  void into(std::vector<double>& field) const {
    field = list([&](const Value& v) { return number(v); });
  }
  template <class T>
  void into(std::optional<T>& field) const {
    if (value.is(Value::Kind::null)) return field.reset();  // back to the model's own
    T x{};
    into(x);
    field = std::move(x);
  }
};

struct Writer {
  std::string of(int64_t x) const { return std::to_string(x); }
  std::string of(double x) const { return number_text(x); }
  std::string of(bool x) const { return x ? "true" : "false"; }
  std::string of(const std::string& x) const { return quote(x); }
  template <class T>
  std::string of(const std::optional<T>& x) const {
    return x ? of(*x) : "";
  }
  template <class T>
  std::string of(const std::vector<T>& x) const {
    std::string out = "[";
    for (size_t i = 0; i < x.size(); ++i) out += (i ? ", " : "") + of(x[i]);
    return out + "]";
  }
};

struct TypeName {
  std::string of(const int64_t&) const { return "whole number"; }
  std::string of(const double&) const { return "number"; }
  std::string of(const bool&) const { return "true or false"; }
  std::string of(const std::string&) const { return "text"; }
  template <class T>
  std::string of(const std::optional<T>&) const {
    return of(T{});
  }
  template <class T>
  std::string of(const std::vector<T>&) const {
    return "list of " + of(T{}) + "s";
  }
};

}  // namespace

std::span<const Key> keys() { return kKeys; }

const Key* find_key(std::string_view name) {
  for (const Key& key : kKeys)
    if (name == key.name) return &key;
  return nullptr;
}

void assign(const Key& key, const Value& value, RunConfig& config) {
  std::visit([&](auto field) { Reader{key, value}.into(field(config)); }, key.field);
}

std::string write(const Key& key, RunConfig& config) {
  const std::string text = std::visit([&](auto field) { return Writer{}.of(field(config)); }, key.field);
  const bool alone = key.allowed.single && text.find(',') == std::string::npos;
  return alone ? text.substr(1, text.size() - 2) : text;
}

std::vector<std::string> choices(const Key& key) {
  if (std::holds_alternative<Ref<bool>>(key.field) || std::holds_alternative<Ref<std::optional<bool>>>(key.field)) return {"true", "false"};
  std::vector<std::string> out;
  std::istringstream in(key.allowed.choices);
  for (std::string choice; std::getline(in, choice, '|');) out.push_back(choice);
  return out;
}

std::string type_name(const Key& key) {
  if (*key.allowed.choices != 0) {
    std::string list;
    for (const std::string& choice : choices(key)) list += (list.empty() ? "" : ", ") + choice;
    return (std::holds_alternative<Ref<std::vector<std::string>>>(key.field) ? "list of " : "") + list;
  }
  RunConfig defaults;
  const std::string type = std::visit([&](auto field) { return TypeName{}.of(field(defaults)); }, key.field);
  return key.allowed.single ? type.substr(8, type.size() - 9) + " or " + type : type;  // "list of numbers"
}

std::string quote(const std::string& text) {
  const auto is_plain = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '/' || c == '.' || c == '-'; };
  bool plain = !text.empty() && (std::isalpha(static_cast<unsigned char>(text[0])) || text[0] == '/' || text[0] == '_');
  for (char c : text) plain = plain && is_plain(c);
  if (plain && text != "null" && text != "true" && text != "false") return text;
  std::string out = "\"";
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      constexpr char kHex[] = "0123456789abcdef";
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace mesa::config
