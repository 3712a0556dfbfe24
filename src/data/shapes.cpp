// Ten shapes drawn from their signed distance fields: a real task for a transformer, with nothing to download.
//
// A picture is one shape at a random place, size and angle, in a random colour on a background with a gradient and stripes, and noise over
// all. Neither colour nor brightness tells the class and no pixel has a meaning of its own, so that a linear classifier stays near chance.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numbers>

#include "mesa/base/error.h"
#include "mesa/base/random.h"
#include "mesa/data/dataset.h"

namespace mesa {

namespace {
constexpr int kSide = 32;
constexpr int kClasses = 10;

struct Vec2 {
  float x, y;
};
float length(Vec2 p) { return std::sqrt(p.x * p.x + p.y * p.y); }

// Distances in units of the radius, negative inside; every shape fits the unit circle. (Inigo Quilez, "2D distance functions".)
float box(Vec2 p, float half_width, float half_height) { return std::max(std::fabs(p.x) - half_width, std::fabs(p.y) - half_height); }
float circle(Vec2 p) { return length(p) - 0.85f; }
float ring(Vec2 p) { return std::fabs(length(p) - 0.75f) - 0.2f; }
float square(Vec2 p) { return box(p, 0.7f, 0.7f); }
float triangle(Vec2 p) { return std::max(0.8660254f * std::fabs(p.x) + 0.5f * p.y, -p.y) - 0.5f; }
float cross(Vec2 p) { return std::min(box(p, 0.95f, 0.28f), box(p, 0.28f, 0.95f)); }
float crescent(Vec2 p) { return std::max(length(p) - 0.95f, 0.75f - length({p.x - 0.5f, p.y})); }
float bar(Vec2 p) { return box(p, 0.95f, 0.25f); }
float dots(Vec2 p) { return length({std::fabs(p.x) - 0.58f, p.y}) - 0.4f; }
float corner(Vec2 p) { return std::min(box({p.x + 0.4f, p.y}, 0.22f, 0.75f), box({p.x, p.y - 0.53f}, 0.62f, 0.22f)); }

/// Five points: folded by the mirror lines into one half point, which a single edge bounds.
float star(Vec2 p) {
  constexpr Vec2 kMirror1{0.809016994f, -0.587785252f}, kMirror2{-0.809016994f, -0.587785252f};
  constexpr float kInner = 0.42f;
  p.x = std::fabs(p.x);
  const float a = 2 * std::max(kMirror1.x * p.x + kMirror1.y * p.y, 0.0f);
  p = {p.x - a * kMirror1.x, p.y - a * kMirror1.y};
  const float b = 2 * std::max(kMirror2.x * p.x + kMirror2.y * p.y, 0.0f);
  p = {std::fabs(p.x - b * kMirror2.x), p.y - b * kMirror2.y - 1};
  constexpr Vec2 kEdge{kInner * 0.587785252f, kInner * 0.809016994f - 1};  // from the tip to the inner corner
  const float norm = std::sqrt(kEdge.x * kEdge.x + kEdge.y * kEdge.y);
  return (p.y * kEdge.x - p.x * kEdge.y) / norm;
}

const std::vector<std::string>& shape_names() {
  static const std::vector<std::string> names{"circle", "ring", "square", "triangle", "star", "cross", "crescent", "bar", "dots", "corner"};
  return names;
}

using Color = std::array<float, 3>;

/// Three channels between two levels.
Color random_color(RandomStream& random, double from, double to) {
  Color color;
  for (float& c : color) c = static_cast<float>(random.uniform(from, to));
  return color;
}

/// What is drawn where. Lengths in pixels.
struct Scene {
  Vec2 center;
  float radius, cosine, sine;
  Color shape, low, high;  // the background goes from `low` to `high` along `gradient`
  Vec2 gradient, wave;     // per pixel; the stripes are a triangle wave
  float stripes, noise;    // amplitudes in levels

  explicit Scene(RandomStream& random) {
    const auto draw = [&](double from, double to) { return static_cast<float>(random.uniform(from, to)); };
    radius = draw(9.5, 14.5);
    center = {draw(radius, kSide - radius), draw(radius, kSide - radius)};
    const float angle = draw(0, 2 * std::numbers::pi);
    cosine = std::cos(angle);
    sine = std::sin(angle);
    low = random_color(random, 0, 110);
    high = random_color(random, 0, 110);
    shape = random_color(random, 165, 255);
    const float slope = draw(0, 2 * std::numbers::pi), direction = draw(0, 2 * std::numbers::pi), period = draw(3, 12);
    gradient = {std::cos(slope) / kSide, std::sin(slope) / kSide};
    wave = {std::cos(direction) / period, std::sin(direction) / period};
    stripes = draw(0, 16);
    noise = draw(0, 32);
  }
};

/// One byte of noise for every channel of every pixel, sixteen from each call of the generator.
void fill_noise(RandomKey key, std::array<uint8_t, 3 * kSide * kSide>& noise) {
  constexpr uint64_t kApart = uint64_t{1} << 32;  // counters that the scene's own draws never reach
  for (size_t i = 0; i < noise.size(); i += 16) {
    const Philox4 block = philox(kApart + i / 16, key.step, key.key);
    std::memcpy(noise.data() + i, block.word, 16);
  }
}

/// The shape is a template argument so that its distance is inlined into the loop over a row.
template <float (*distance)(Vec2)>
void draw(const Scene& scene, const std::array<uint8_t, 3 * kSide * kSide>& noise, uint8_t* pixels) {
  const float inverse = 1 / scene.radius, noise_scale = scene.noise / 255;
  for (int y = 0; y < kSide; ++y) {
    std::array<float, kSide> coverage, along, level;
    for (int x = 0; x < kSide; ++x) {
      const Vec2 p{static_cast<float>(x) + 0.5f, static_cast<float>(y) + 0.5f};
      const Vec2 q{(p.x - scene.center.x) * inverse, (p.y - scene.center.y) * inverse};
      const float d = distance({scene.cosine * q.x + scene.sine * q.y, scene.cosine * q.y - scene.sine * q.x});
      coverage[x] = std::clamp(0.5f - d * scene.radius, 0.0f, 1.0f);
      along[x] = std::clamp(0.5f + (p.x - kSide / 2) * scene.gradient.x + (p.y - kSide / 2) * scene.gradient.y, 0.0f, 1.0f);
      const float phase = p.x * scene.wave.x + p.y * scene.wave.y + 64;  // positive, so that the cast rounds down
      level[x] = scene.stripes * (std::fabs(phase - static_cast<float>(static_cast<int>(phase)) - 0.5f) - 0.25f);
    }
    const uint8_t* noise_row = noise.data() + 3 * kSide * y;
    for (int x = 0; x < kSide; ++x)
      for (int c = 0; c < 3; ++c) {
        const float ground = scene.low[c] + along[x] * (scene.high[c] - scene.low[c]) + level[x];
        const float value =
            ground + coverage[x] * (scene.shape[c] - ground) + (static_cast<float>(noise_row[3 * x + c]) - 127.5f) * noise_scale;
        pixels[3 * (kSide * y + x) + c] = static_cast<uint8_t>(std::clamp(value + 0.5f, 0.0f, 255.0f));
      }
  }
}

constexpr std::array kDraw{draw<circle>, draw<ring>,     draw<square>, draw<triangle>, draw<star>,
                           draw<cross>,  draw<crescent>, draw<bar>,    draw<dots>,     draw<corner>};

class Shapes : public Dataset {
 public:
  Shapes(int64_t size, uint64_t seed, const char* split) : size_(size), seed_(seed), split_(split) {}
  int64_t size() const override { return size_; }
  int64_t classes() const override { return kClasses; }
  const std::vector<std::string>& class_names() const override { return shape_names(); }

  /// Labels go round, so that every stretch of the set is balanced.
  Sample get(int64_t index) const override {
    check(index >= 0 && index < size_, "sample ", index, " of a data set of ", size_);
    const RandomKey key = RandomKey::of(seed_, split_, static_cast<uint64_t>(index));
    RandomStream random(key);
    const Scene scene(random);
    std::array<uint8_t, 3 * kSide * kSide> noise;
    fill_noise(key, noise);
    Sample sample{{kSide, kSide, 3, std::vector<uint8_t>(noise.size())}, index % kClasses};
    kDraw[sample.label](scene, noise, sample.image.pixels.data());
    return sample;
  }
  std::string describe(int64_t index) const override { return concat(split_, " ", index); }

 private:
  int64_t size_;
  uint64_t seed_;
  const char* split_;
};
}  // namespace

DatasetPair open_shapes(const DataOptions& options) {
  constexpr int64_t kTrainSize = 10'000, kTestSize = 2'000;
  return {std::make_shared<Shapes>(options.train_size > 0 ? options.train_size : kTrainSize, options.seed, "shapes.train"),
          std::make_shared<Shapes>(options.test_size > 0 ? options.test_size : kTestSize, options.seed, "shapes.test")};
}

}  // namespace mesa
