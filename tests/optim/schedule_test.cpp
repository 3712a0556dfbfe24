#include "mesa/optim/schedule.h"

#include <catch2/catch.hpp>

using namespace mesa;

TEST_CASE("schedule: linear warm-up, cosine to the floor, constant") {
  Schedule s;
  s.lr = 1, s.warmup_lr = 0.1, s.min_lr = 0.2, s.warmup_steps = 10, s.total_steps = 110;
  CHECK(s.at(0) == Approx(0.1));
  CHECK(s.at(5) == Approx(0.55));
  CHECK(s.at(10) == Approx(1));
  CHECK(s.at(60) == Approx(0.6));
  CHECK(s.at(110) == Approx(0.2));
  CHECK(s.at(1000) == Approx(0.2));
  for (int64_t i = 10; i < 110; ++i) CHECK(s.at(i + 1) < s.at(i));
  s.kind = Schedule::Kind::constant;
  CHECK(s.at(5) == Approx(0.55));
  CHECK(s.at(90) == Approx(1));
  s = {};
  CHECK(s.at(0) == Approx(s.lr));  // no warm-up: the first step is at full rate
}

TEST_CASE("schedule: a line to the floor, as Swin's linear schedule") {
  Schedule s;
  s.kind = Schedule::Kind::linear;
  s.lr = 1, s.warmup_lr = 0, s.min_lr = 0.2, s.warmup_steps = 10, s.total_steps = 110;
  CHECK(s.at(5) == Approx(0.5));
  CHECK(s.at(10) == Approx(1));
  CHECK(s.at(35) == Approx(0.8));
  CHECK(s.at(60) == Approx(0.6));
  CHECK(s.at(110) == Approx(0.2));
  CHECK(s.at(500) == Approx(0.2));
}

TEST_CASE("schedule: steps, counted from the beginning of the run") {
  Schedule s;
  s.kind = Schedule::Kind::step;
  s.lr = 2, s.warmup_lr = 0, s.warmup_steps = 4, s.total_steps = 100, s.decay_rate = 0.5, s.decay_steps = 10;
  CHECK(s.at(2) == Approx(1));
  for (int64_t i : {4, 9}) CHECK(s.at(i) == Approx(2));
  for (int64_t i : {10, 19}) CHECK(s.at(i) == Approx(1));
  CHECK(s.at(20) == Approx(0.5));
  CHECK(s.at(99) == Approx(2.0 / 512));
}
