// Man pages and completions: made of the options themselves, and as man, bash, zsh and fish take them.
#include <algorithm>
#include <regex>

#include "apps/tiny_run.h"
#include "mesa/train/config.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {
constexpr const char* kPrograms[] = {"mesa-train", "mesa-eval", "mesa-bench", "mesa-report"};

std::string described(const std::string& program, const std::string& form) {
  const ProcessResult result = run(program, {"--describe", form});
  INFO(program << " --describe " << form << ": " << result.err);
  REQUIRE(result.code == 0);
  CHECK(result.err.empty());
  return result.out;
}

/// "--config", ... of --help's lines.
std::vector<std::string> long_options(const std::string& program) {
  const std::string help = run(program, {"--help"}).out;
  const std::regex option("(?:^|\n)  (?:-.,)?(--[a-z-]+)");
  std::vector<std::string> out;
  for (std::sregex_iterator at(help.begin(), help.end(), option), end; at != end; ++at) out.push_back((*at)[1]);
  return out;
}

/// False, with a warning, where the program is not installed.
bool there_is(const std::string& program) {
  const bool found = run("/bin/sh", {"-c", "command -v " + program + " > /dev/null"}).code == 0;
  if (!found) WARN("skipped: there is no " << program << " on this machine");
  return found;
}

std::string without(std::string text, char c) {
  text.erase(std::remove(text.begin(), text.end(), c), text.end());
  return text;
}

/// What bash would offer, in alphabetical order, each with a space behind it.
std::string bash_offers(const TinyRun& folder, const std::string& line, const std::string& breaks = " \t\n\"'><=;|&(:") {
  const std::string program = line.substr(0, line.find(' '));
  std::string function = "_" + program;
  std::replace(function.begin(), function.end(), '-', '_');
  folder.write("completion", described(program, "bash"));
  const ProcessResult result = run("/bin/bash",
                                   {"--norc", "-c",
                                    "set -u; source ./completion; COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDBREAKS=$2; " + function +
                                        "; for o in \"${COMPREPLY[@]}\"; do echo \"$o \"; done | LC_ALL=C sort | tr -d '\\n'",
                                    "bash", line, breaks},
                                   {}, folder.path(""));
  INFO(line << ": " << result.err);
  CHECK(result.err.empty());
  return result.out;
}
}  // namespace

TEST_CASE("describe: a man page and completions hold every option of --help, and no hidden one") {
  for (const std::string program : kPrograms) {
    const std::vector<std::string> options = long_options(program);
    REQUIRE(options.size() >= 3);
    for (const char* form : {"man", "bash", "zsh", "fish"}) {
      const std::string text = form == std::string("man") ? without(described(program, form), '\\') : described(program, form);
      for (const std::string& option : options) {
        INFO(program << " " << form << " " << option);
        CHECK_THAT(text, Contains(form == std::string("fish") ? "-l " + option.substr(2) + " " : option));
      }
      CHECK_THAT(text, !Contains("describe for"));
    }
    CHECK(std::find(options.begin(), options.end(), "--describe") == options.end());
  }
  CHECK(run("mesa-train", {"--describe", "poem"}).code == 2);
}

TEST_CASE("describe: man pages have the sections that readers know, and man and mandoc find nothing to complain of") {
  const TinyRun folder;
  const bool man = there_is("man"), mandoc = there_is("mandoc");
  for (const std::string program : kPrograms) {
    const std::string page = described(program, "man");
    folder.write(program + ".1", page);
    for (const char* heading : {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"})
      CHECK_THAT(page, Contains(std::string("\n.SH ") + heading + "\n"));
    CHECK_THAT(page, Contains(".TP\n\\fB2\\fP\nwrong usage") && Contains(".TP\n\\fB0\\fP\ndone\n"));
  }
  folder.write("mesa.yaml.5", described("mesa-train", "yaml"));
  const std::string pages = "mesa-train.1 mesa-eval.1 mesa-bench.1 mesa-report.1 mesa.yaml.5";
  if (mandoc) {
    // A page made outside a clone has no date.
    const ProcessResult lint =
        run("/bin/sh", {"-c", "mandoc -T lint -W warning " + pages + " | grep -v 'missing date'"}, {}, folder.path(""));
    CHECK(lint.out == "");
  }
  if (!man) return;
  const ProcessResult shown = run("/bin/sh", {"-c", "for page in " + pages + "; do man --warnings -E UTF-8 -l ./$page; done"},
                                  {{"MANWIDTH", "500"}}, folder.path(""));
  CHECK(shown.err == "");
  CHECK(shown.code == 0);
  CHECK_THAT(shown.out, Contains("--pack-size PIXELS"));
  CHECK_THAT(shown.out, Contains("75     stopped by a signal and resumable") && Contains("mesa-eval CHECKPOINT [option ...]"));
}

TEST_CASE("describe: mesa.yaml(5) has every key with its default") {
  const std::string page = without(described("mesa-eval", "yaml"), '\\');
  for (const mesa::ConfigKey& key : mesa::config_keys()) {
    INFO(key.name);
    CHECK_THAT(page, Contains(".TP\nfB" + key.name + "fP (" + key.type +
                              (key.default_value.empty() ? "" : ", default fB" + key.default_value + "fP") + ")\n"));
  }
}

TEST_CASE("describe: bash completes options, words, keys with their values, and files") {
  const TinyRun folder;
  std::filesystem::create_directories(folder.path("two words/within"));
  CHECK(bash_offers(folder, "mesa-train --dev") == "--device ");
  CHECK(bash_offers(folder, "mesa-train --device c") == "cpu cuda ");
  CHECK(bash_offers(folder, "mesa-train --quiet --pack-") == "--pack-raw --pack-size ");
  CHECK(bash_offers(folder, "mesa-train --pack-size ") == "");
  CHECK(bash_offers(folder, "mesa-train --config deit3") == "deit3_s ");
  CHECK(bash_offers(folder, "mesa-train --config tin") == "tiny.yaml ");
  CHECK(bash_offers(folder, "mesa-train --set train.tensor") == "train.tensorboard=false train.tensorboard=true ");
  CHECK(bash_offers(folder, "mesa-train --set train.epoc") == "train.epochs= ");
  CHECK(bash_offers(folder, "mesa-train --set storage=int8 --set model.name=swin_b").find("swin_base_") == 0);
  CHECK(bash_offers(folder, "mesa-train --output tw") == "two words ");
  CHECK(bash_offers(folder, "mesa-train --output tin") == "");  // a folder, not a file
  CHECK(bash_offers(folder, "mesa-eval tin") == "tiny.yaml ");
  for (const std::string option : {"--config", "--real", "--per-class", "--confusion"}) {
    CHECK(bash_offers(folder, "mesa-eval tiny.yaml " + option + " tin") == "tiny.yaml ");
    CHECK(bash_offers(folder, "mesa-eval tiny.yaml " + option + "=tin") == "tiny.yaml ");
  }
  CHECK(bash_offers(folder, "mesa-eval --config deit3") == "deit3_s ");
  CHECK(bash_offers(folder, "mesa-report tw") == "two words ");
  CHECK(bash_offers(folder, "mesa-bench --storage exact,int8,mesa_") == "exact,int8,mesa_swin ");
  // Words as the shell reads them: blanks that are escaped or quoted do not end one.
  for (const char* word : {R"(two\ w)", R"("two w)", R"('two w)", R"(two" "w)"})
    CHECK(bash_offers(folder, std::string("mesa-train --output ") + word) == "two words ");
  CHECK(bash_offers(folder, R"(mesa-train --output two\ words/w)") == "two words/within ");
  CHECK(bash_offers(folder, R"(mesa-train --output two\ words   --device  c)") == "cpu cuda ");
  CHECK(bash_offers(folder, R"(mesa-train --output 'it is' --dev)") == "--device ");
  // Keys whose values are paths.
  for (const std::string key : {"data.path=", "train.weights=", "distill.teacher="}) {
    CHECK(bash_offers(folder, "mesa-train --set " + key + "tin") == "tiny.yaml ");
    CHECK(bash_offers(folder, "mesa-train --set " + key + "two\\ words/") == "two words/within ");
    CHECK(bash_offers(folder, "mesa-train --set " + key + "tin", " \t\n") == key + "tiny.yaml ");
    CHECK(bash_offers(folder, "mesa-train --set=" + key + "tin", " \t\n") == "--set=" + key + "tiny.yaml ");
  }
  CHECK(bash_offers(folder, "mesa-train --set data.pa") == "data.path= ");
  CHECK(bash_offers(folder, "mesa-train --set data.kind=tin") == "");
  // Where "=" breaks words bash replaces what stands behind it, elsewhere the whole.
  CHECK(bash_offers(folder, "mesa-train --set train.precision=b") == "bf16 ");
  CHECK(bash_offers(folder, "mesa-train --set train.precision=b", " \t\n") == "train.precision=bf16 ");
  CHECK(bash_offers(folder, "mesa-train --config=vit_m") == "vit_mnist ");
  CHECK(bash_offers(folder, "mesa-train --config=vit_m", " \t\n") == "--config=vit_mnist ");
}

TEST_CASE("describe: fish completes the same") {
  if (!there_is("fish")) return;
  const TinyRun folder;
  const auto offers = [&](const std::string& line) {
    folder.write("completion.fish", described(line.substr(0, line.find(' ')), "fish"));
    const ProcessResult result =
        run("/usr/bin/env",
            {"fish", "--no-config", "-c", "source completion.fish; complete -C '" + line + "' | string replace -r '\\t.*' ''; true"},
            {{"HOME", folder.path("")}}, folder.path(""));
    INFO(line << ": " << result.err);
    CHECK(result.code == 0);
    return result.out;
  };
  CHECK(offers("mesa-train --dev") == "--device\n");
  CHECK(offers("mesa-train --device c") == "cpu\ncuda\n");
  CHECK(offers("mesa-train --config vit_m") == "vit_mnist\n");
  CHECK(offers("mesa-train --config tin") == "tiny.yaml\n");
  CHECK(offers("mesa-train --set train.pre") == "train.precision=bf16\ntrain.precision=fp32\n");
  CHECK(offers("mesa-bench --storage exact,mesa_") == "exact,mesa_swin\n");
  CHECK(offers("mesa-eval tin") == "tiny.yaml\n");
  CHECK(offers("mesa-train tin") == "");  // it takes no arguments
}

TEST_CASE("describe: zsh completes the same") {
  if (!there_is("zsh")) return;
  const TinyRun folder;
  // A shell on a pseudo-terminal, in which the line and two tabs are typed.
  folder.write("type.zsh", R"(zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell "stty rows 200 cols 200; PS1='>' LISTMAX=9999; fpath=($PWD \$fpath); autoload -Uz compinit; compinit -u -D; print rea''dy"
wait_for() {
  local seen= part
  repeat 200; do
    while zpty -rt shell part; do seen+=$part; done
    [[ $seen == *$1* ]] && return 0
    sleep 0.05
  done
  print -r -- "$seen"
  return 1
}
wait_for ready || exit 2
zpty -w -n shell "$1"$'\t\t'
wait_for "$2"
)");
  for (const std::string program : kPrograms) folder.write("_" + program, described(program, "zsh"));
  const auto offers = [&](const std::string& line, const std::string& expected) {
    const ProcessResult result =
        run("/usr/bin/env", {"zsh", "-f", "type.zsh", line, expected}, {{"TERM", "dumb"}, {"HOME", folder.path("")}}, folder.path(""));
    INFO(line << ": " << result.out << result.err);
    CHECK(result.code == 0);
  };
  offers("mesa-train --dev", "auto  cpu   cuda");
  offers("mesa-train --config vit_m", "vit_mnist");
  offers("mesa-train --config tin", "tiny.yaml");
  offers("mesa-train --set train.pre", "train.precision=bf16  train.precision=fp32");
  offers("mesa-train --set data.path=tin", "data.path=tiny.yaml");
  offers("mesa-bench --storage exact,mesa_", "exact,mesa_swin");
  offers("mesa-eval tin", "tiny.yaml");
}
