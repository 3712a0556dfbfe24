// report.html: what it says, that nothing in a run's folder can break it, and how large it gets.
#include "mesa/train/report.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "mesa/base/files.h"
#include "support/data_files.h"
#include "support/html.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
using Json = nlohmann::ordered_json;

namespace {

/// A run's folder made by hand.
struct RunFiles {
  TemporaryFolder folder;
  std::string path(const std::string& name = "") const { return (folder.path() / name).string(); }
  void write(const std::string& name, const std::string& text) const { folder.write(name, {text.begin(), text.end()}); }
};

const char* const kConfig =
    "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\ntrain: {epochs: 2, batch_size: 16}\n";
const char* const kSummaryHead =
    "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,activation_bytes_per_image,peak_bytes,seconds,step\n";

PictureList pictures(bool predictions, const std::string& name, int count = 3) {
  PictureList list{1, 12, predictions, {}};
  for (int i = 0; i < count; ++i) list.pictures.push_back({i, 1, name, 2, name + "2", 0.875, to_png(test_image(16, 12, i % 2 ? 3 : 1))});
  return list;
}

/// A whole run of two epochs of 50 steps, whose loss is `loss` at the first step.
void write_run(const RunFiles& files, const std::string& in, double loss, const std::string& name = "cat",
               const std::string& storage = "int8") {
  files.write(in + "config.yaml", std::string(kConfig) + "storage: " +
                                      (storage == "exact" ? "[{match: \"*\", codec: exact}]" : "[{match: \"*\", codec: int8}]") + "\n");
  std::string lines;
  for (int step = 1; step <= 100; ++step)
    lines += Json({{"step", step},
                   {"epoch", (step + 49) / 50},
                   {"loss", loss / step},
                   {"lr", 0.001},
                   {"grad_norm", 2.5},
                   {"images_per_second", 812.5},
                   {"data_wait", 0.03},
                   {"activation_bytes_per_image", 64000.0},
                   {"peak_bytes", 123456789},
                   {"bad_steps", 0},
                   {"bad_samples", 0}})
                 .dump() +
             "\n";
  files.write(in + "metrics.jsonl", lines);
  files.write(in + "summary.csv",
              std::string(kSummaryHead) +
                  "1,1.5,1.25,61.5,90.25,0.001,800,64000,123456789,3.25,50\n2,0.5,0.75,88.5,99.5,0.0001,812,64000,123456789,3.5,100\n");
  files.write(in + "memory.csv", "site,shape,codec,exact_bytes,kept_bytes,saturated\nblocks.0.mlp.act:x,\"[16, 4, 96]\"," + storage +
                                     ",24576,6400,0.25\nblocks.1.mlp.act:x,\"[16, 4, 96]\"," + storage +
                                     ",24576,6400,0\npatch_embed.proj:x,\"[16, 4, 192]\",exact,49152,49152,0\n");
  files.write(in + "summary.json", Json({{"top1", 88.5},
                                         {"top5", 99.5},
                                         {"eval_loss", 0.75},
                                         {"train_loss", 0.5},
                                         {"epochs", 2},
                                         {"steps", 100},
                                         {"images_per_second", 806.25},
                                         {"parameters", 468586},
                                         {"activation_bytes_per_image", 64000},
                                         {"exact_activation_bytes_per_image", 247500},
                                         {"peak_bytes", 123456789},
                                         {"device", "cpu"},
                                         {"storage", storage},
                                         {"seed", 0}})
                                       .dump());
  files.write(in + "environment.json", Json({{"mesa", "0.1.0"}, {"device", "cpu"}, {"threads", "2"}}).dump());
  files.write(in + "log.txt",
              "[2026-01-01 00:00:00.000] [run] [info] model\n[2026-01-01 00:00:00.000] [run] [warning] a bad sample is replaced\n");
  write_pictures(files.path(in + "samples.json"), pictures(false, name));
  write_pictures(files.path(in + "mistakes.json"), pictures(true, name));
}

std::string html_of(const std::vector<std::string>& folders) {
  std::vector<RunRecord> runs;
  for (const std::string& folder : folders) runs.push_back(read_run(folder));
  return report_html(runs);
}

/// The JSON that the page's script reads.
Json data_of(const std::vector<Element>& elements) {
  for (const Element& e : elements)
    if (e.attributes.contains("id") && e.attributes.at("id") == "data") return Json::parse(e.text);
  return {};
}

std::string all_text(const std::vector<Element>& elements) {
  std::string out;
  for (const Element& e : elements)
    if (e.name != "script" && e.name != "style") out += e.text + "\n";
  return out;
}

int64_t count(const std::vector<Element>& elements, const std::string& name) {
  return std::count_if(elements.begin(), elements.end(), [&](const Element& e) { return e.name == name; });
}

/// The points of a curve: x, y pairs.
std::vector<std::pair<int64_t, double>> curve(const Json& data, const std::string& chart, const std::string& name) {
  std::vector<std::pair<int64_t, double>> out;
  for (const Json& c : data.at(chart).at("curves")) {
    if (c.at("name") != name) continue;
    const Json& p = c.at("points");
    for (size_t i = 0; i < p.size(); i += 2)
      out.emplace_back(p[i].get<int64_t>(), p[i + 1].is_null() ? std::nan("") : p[i + 1].get<double>());
  }
  return out;
}

}  // namespace

TEST_CASE("report: one run has each chart and the run's numbers") {
  const RunFiles files;
  write_run(files, "", 3.5);
  const std::string written = write_report({files.path()});
  CHECK(written == files.path() + "/report.html");
  const std::string html = read_text(written);
  const auto elements = walk_html(html);
  const Json data = data_of(elements);
  for (const char* chart : {"loss", "accuracy", "lr", "grad-norm", "rate", "wait"}) {
    CHECK_THAT(html, Contains(std::string("id=\"chart-") + chart + "\"") && Contains(std::string("data-chart=\"") + chart + "\""));
    CHECK(data.contains(chart));
  }
  CHECK(count(elements, "svg") == 6);
  CHECK(count(elements, "title") == 7);
  CHECK(count(elements, "desc") == 6);
  const auto loss = curve(data, "loss", "train");
  REQUIRE(loss.size() == 100);
  CHECK(loss[0] == std::pair<int64_t, double>(1, 3.5));
  CHECK(loss[99] == std::pair<int64_t, double>(100, 0.035));
  CHECK(curve(data, "loss", "eval") == std::vector<std::pair<int64_t, double>>{{50, 1.25}, {100, 0.75}});
  CHECK(curve(data, "accuracy", "top-1") == std::vector<std::pair<int64_t, double>>{{50, 61.5}, {100, 88.5}});
  CHECK(curve(data, "wait", "waiting").at(7) == std::pair<int64_t, double>(8, 3.0));
  const std::string text = all_text(elements);
  for (const char* says : {"88.5 %", "best 88.5 %", "806.2", "64.0 kB", "3.9 times less than exact", "123.5 MB", "468.6k", "int8",
                           "blocks.*.mlp.act:x (2 sites)", "49.2 kB, 12.8 kB kept (int8)", "247.5 kB",
                           "train: 3.5 at step 1, 0.035 at step 100; lowest 0.035 at step 100", "a bad sample is replaced", "cat2",
                           "(88 %)", "epochs: 2", "threads"})
    CHECK_THAT(text, Contains(says));
  CHECK_THAT(text, !Contains("Not everything could be read"));
  CHECK(count(elements, "img") == 6);
  for (const Element& e : elements)
    if (e.name == "img") {
      CHECK_THAT(e.attributes.at("alt"), Contains("cat"));
      const std::string prefix = "data:image/png;base64,";
      REQUIRE(e.attributes.at("src").starts_with(prefix));
      const Bytes png = from_base64(e.attributes.at("src").substr(prefix.size()));
      CHECK(decode_image(png.data(), png.size(), "picture").height == 16);
    }
  // Nothing comes from elsewhere, and the page itself forbids it.
  CHECK(html.find("http") == html.find("http-equiv"));
  CHECK(html.find("http", html.find("http-equiv") + 1) == std::string::npos);
  CHECK_THAT(html, Contains("default-src &#39;none&#39;") || Contains("default-src 'none'"));
}

TEST_CASE("report: several runs are drawn over one another, and what differs is listed") {
  const RunFiles files;
  write_run(files, "exact/", 3.5, "cat", "exact");
  write_run(files, "int8/", 3.0);
  const std::string out = files.path("both.html");
  CHECK(write_report({files.path("exact"), files.path("int8/")}, out) == out);
  const auto elements = walk_html(read_text(out));
  const Json data = data_of(elements);
  CHECK(curve(data, "loss", "exact, train").at(0).second == 3.5);
  CHECK(curve(data, "loss", "int8, train").at(0).second == 3.0);
  CHECK(curve(data, "loss", "int8, eval").size() == 2);
  CHECK(data.at("loss").at("curves")[0].at("colour") != data.at("loss").at("curves")[1].at("colour"));
  CHECK(curve(data, "rate", "int8").size() == 100);
  const std::string text = all_text(elements);
  CHECK_THAT(text, Contains("2 runs") && Contains("Differences of the configs") && Contains("storage"));
  CHECK_THAT(text, !Contains("train.epochs"));
  CHECK(count(elements, "img") == 0);
  // Equal names are told apart by their paths.
  write_run(files, "other/int8/", 2.0);
  write_report({files.path("int8"), files.path("other/int8")}, out);
  CHECK_THAT(all_text(walk_html(read_text(out))), Contains(files.path("other/int8")));
}

TEST_CASE("report: text of a run can do nothing but be read") {
  const RunFiles files;
  const std::string evil = "</pre></script><script>alert(1)</script><img src=x onerror=\"alert(2)\"/>&amp;'";
  write_run(files, "", 2, evil, "int8");
  files.write("config.yaml", "# " + evil + "\n" + kConfig);
  files.write("environment.json", Json({{evil, evil}}).dump());
  files.write("log.txt", "[t] [run] [warning] " + evil + "\n");
  files.write("health.csv", "step,site,codec,relative_error,clamped\n5,<script>alert(3)</script>,</script><script>alert(4)//,0.1,0\n");
  files.write("memory.csv", "site,shape,codec,exact_bytes,kept_bytes,saturated\n<script>5</script>,x,<b>,10,5,0\n");
  const std::string html = html_of({files.path()});
  const auto elements = walk_html(html);
  CHECK(count(elements, "script") == 2);
  CHECK(count(elements, "b") == 0);
  CHECK(count(elements, "img") == 6);
  CHECK_THAT(all_text(elements), Contains(evil) && Contains("<script>alert(3)</script>"));
  for (const Element& e : elements)
    for (const auto& [key, value] : e.attributes) CHECK_FALSE(key.starts_with("on"));
  CHECK(data_of(elements).at("error").at("curves")[0].at("name") == "</script><script>alert(4)//");
  SECTION("bytes that are not UTF-8, and controls, are replaced") {
    files.write("environment.json", "{\"device\": \"a\\u0001b\"}");
    files.write("log.txt", std::string("[t] [run] [warning] \xff\xc0\xaf \xed\xa0\x80 \xf4\x90\x80\x80 \xe2\x82 \xc3\xa4\n"));
    const std::string replaced = html_of({files.path()}), mark = "\xef\xbf\xbd";
    CHECK_THAT(replaced, Contains("a" + mark + "b") && Contains("\xc3\xa4") && !Contains("\xff") && !Contains("\xed\xa0\x80"));
    walk_html(replaced);
  }
}

TEST_CASE("report: missing, partial and damaged files make a note, not a crash") {
  const RunFiles files;
  CHECK_THROWS_WITH(read_run(files.path("absent")), Contains("absent does not exist"));
  CHECK_THROWS_WITH(read_run(files.path()), Contains("is not a run's folder"));
  const auto text = [&] { return all_text(walk_html(html_of({files.path()}))); };
  files.write("config.yaml", kConfig);  // a run that has just begun
  CHECK_THAT(text(), Contains("metrics.jsonl is not there") && Contains("summary.csv is not there") && Contains("Nothing to draw yet"));
  write_run(files, "", 3.5);
  const std::vector<std::string> names{"config.yaml",      "metrics.jsonl", "summary.csv",   "memory.csv", "summary.json",
                                       "environment.json", "samples.json",  "mistakes.json", "log.txt",    "health.csv"};
  files.write("health.csv", "step,site,codec,relative_error,clamped\n5,a:x,int8,0.1,0\n10,a:x,int8,,nan\n10,b:x,int4,1e400,0.5\n");
  SECTION("each file cut off anywhere, or with a byte turned") {
    for (const std::string& name : names) {
      const std::string whole = read_text(files.path(name));
      for (size_t i = 0; i < 24; ++i) {
        const size_t at = whole.size() * i / 24;
        files.write(name, whole.substr(0, at));
        CHECK_NOTHROW(text());
        std::string flipped = whole;
        flipped[at] = static_cast<char>(flipped[at] ^ (1 << i % 8));
        files.write(name, flipped);
        CHECK_NOTHROW(text());
      }
      files.write(name, whole);
    }
  }
  SECTION("noise, folders and emptiness in place of files") {
    for (const std::string& name : names) {
      INFO(name);
      const std::string whole = read_text(files.path(name));
      files.write(name, "\x01\x02\xff{[\"\n\n,,,\n");
      CHECK_NOTHROW(text());
      files.write(name, "");
      CHECK_NOTHROW(text());
      std::filesystem::remove(files.path(name));
      CHECK_NOTHROW(text());
      std::filesystem::create_directory(files.path(name));
      CHECK_NOTHROW(text());
      std::filesystem::remove(files.path(name));
      files.write(name, whole);
    }
  }
  SECTION("damaged lines are left out and counted") {
    files.write("metrics.jsonl",
                "{\"step\":10,\"loss\":1}\nnonsense\n{\"loss\":1}\n[1]\n{\"step\":20,\"loss\":\"x\"}\n{\"step\":30,\"loss\":2,\"lr\":1e999}"
                "\n{\"step\":5,\"lo");
    const auto elements = walk_html(html_of({files.path()}));
    CHECK_THAT(all_text(elements), Contains("metrics.jsonl: 5 lines are damaged and left out"));
    CHECK(curve(data_of(elements), "loss", "train").size() == 2);
  }
  SECTION("pictures that are none, too many or too large are not shown") {
    auto json = Json::parse(read_text(files.path("samples.json")));
    const Json whole = json;
    json["pictures"][1]["png"] = "\"><script>alert(1)</script>";
    files.write("samples.json", json.dump());
    CHECK_THAT(text(), Contains("samples.json: ") && Contains("base64"));
    json = whole;
    json["pictures"][0]["png"] = to_base64(to_png(test_image(kPictureSide + 1, 8, 3)));
    files.write("samples.json", json.dump());
    CHECK_THAT(text(), Contains("samples.json: "));
    json = whole;
    for (int i = 0; i < 40; ++i) json["pictures"].push_back(whole["pictures"][0]);
    files.write("samples.json", json.dump());
    CHECK_THAT(text(), Contains("samples.json: "));
  }
  SECTION("values at the ends of what doubles hold") {
    files.write("metrics.jsonl",
                "{\"step\":1,\"loss\":1e308,\"lr\":-1e308}\n{\"step\":9223372036854775807,\"loss\":1e-308,\"lr\":1e308}\n{\"step\":-"
                "9223372036854775807,\"loss\":5e-324}\n");
    files.write("summary.json",
                "{\"activation_bytes_per_image\": 1e308, \"exact_activation_bytes_per_image\": -1, \"peak_bytes\": 9223372036854775807, "
                "\"top1\": 1e308}");
    files.write(
        "memory.csv",
        "site,shape,codec,exact_bytes,kept_bytes,saturated\na:x,[1],int8,9223372036854775807,9223372036854775807,0\nb:x,[1],int8,-5,0,0\n");
    CHECK_NOTHROW(text());
  }
}

TEST_CASE("report: a single value, equal values and none are drawn") {
  const RunFiles files;
  files.write("config.yaml", kConfig);
  files.write("metrics.jsonl", "{\"step\":10,\"epoch\":1,\"loss\":2.5,\"lr\":0,\"grad_norm\":null}\n");
  const std::string html = html_of({files.path()});
  walk_html(html);
  CHECK_THAT(html, Contains("h.1\"/>"));  // a dot
  CHECK_THAT(html, Contains("2.5 at step 10"));
  CHECK(html.find("nan") == std::string::npos);
  CHECK(html.find("inf") == std::string::npos);
}

TEST_CASE("report: of 100,000 steps every spike and gap is there in under 3 MB") {
  const RunFiles files;
  write_run(files, "", 2, "cat");
  PictureList noise{1, 1, true, {}};
  for (size_t i = 0; i < kMostPictures; ++i) {
    Image image{kPictureSide, kPictureSide, 3, {}};
    for (int k = 0; k < kPictureSide * kPictureSide * 3; ++k)
      image.pixels.push_back(static_cast<uint8_t>((k * 2654435761u + i * 40503u) >> 13));
    noise.pictures.push_back({static_cast<int64_t>(i), 1, "cat", 2, "dog", 0.5, to_png(image)});
  }
  write_pictures(files.path("mistakes.json"), noise);
  write_pictures(files.path("samples.json"), noise);
  {
    std::ofstream lines(files.path("metrics.jsonl"));
    for (int step = 1; step <= 100000; ++step) {
      const double loss = 2 + std::sin(step * 0.7) + 1e4 / (1000 + step);
      const std::string value = step == 54321 ? "98.75" : step >= 70000 && step < 71000 ? "null" : concat(loss);
      lines << "{\"step\":" << step << ",\"epoch\":1,\"loss\":" << value << ",\"lr\":" << 1e-3 * step << ",\"grad_norm\":" << loss * 3
            << ",\"images_per_second\":" << 800 + loss << ",\"data_wait\":0.01}\n";
    }
  }
  const std::string html = html_of({files.path()});
  CHECK(html.size() < 3'000'000);
  const auto elements = walk_html(html);
  const auto loss = curve(data_of(elements), "loss", "train");
  CHECK(loss.size() > 1000);
  CHECK(loss.size() < 1300);
  CHECK(std::count(loss.begin(), loss.end(), std::pair<int64_t, double>(54321, 98.75)) == 1);
  CHECK(std::count_if(loss.begin(), loss.end(), [](const auto& p) { return std::isnan(p.second); }) >= 5);
  CHECK(std::is_sorted(loss.begin(), loss.end(), [](const auto& a, const auto& b) { return a.first < b.first; }));
  CHECK_THAT(all_text(elements), Contains("1000 not finite") && Contains("highest 98.75 at step 54321"));
  CHECK_THAT(html, Contains("<path class=\"odd\"") && Contains("<path class=\"line c0 band\"") && Contains("the mean of the steps"));
}

TEST_CASE("report: classes that are confused have a picture and tables, and their names can do nothing") {
  const RunFiles files;
  write_run(files, "", 2);
  CHECK_THAT(html_of({files.path()}), !Contains("Classes of the test set"));
  Confusion c(3, {"<script>alert(1)</script>", "dog", "wolf"});
  c.add({0, 0, 7}), c.add({1, 1, 4}), c.add({1, 2, 6}), c.add({2, 2, 1}), c.add({2, 1, 3}), c.add({2, 0, 1});
  files.write("confusion.json", confusion_json(c, 2));
  const std::string html = html_of({files.path()});
  const auto elements = walk_html(html);
  const std::string text = all_text(elements);
  CHECK_THAT(text, Contains("Classes of the test set") && Contains("dog\nwolf\n6\n") && Contains("wolf\ndog\n3\n"));
  CHECK_THAT(html, !Contains("<script>alert") && Contains("&#60;script&#62;alert"));
  CHECK(std::count_if(elements.begin(), elements.end(), [](const Element& e) {
          return e.name == "img" && e.attributes.at("alt").starts_with("Confusion of 3 classes");
        }) == 1);
  files.write("confusion.json", "{}");
  CHECK_THAT(html_of({files.path()}), Contains("confusion.json: ") && !Contains("Classes of the test set"));
}
