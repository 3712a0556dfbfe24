// Manual pages in the macros of man(7).
#include <algorithm>
#include <cctype>
#include <sstream>

#include "command_line.h"
#include "mesa/base/error.h"
#include "mesa/train/config.h"
#include "mesa/train/version.h"

namespace mesa {
namespace {

/// Text for troff: hyphens that one can copy, `code` in bold, and no line that looks like a request.
std::string roff(const std::string& text) {
  std::string out;
  bool code = false, line_begins = true;
  for (const char c : text) {
    if (line_begins && (c == '.' || c == '\'')) out += "\\&";
    line_begins = c == '\n';
    if (c == '`') {
      code = !code;
      out += code ? "\\fB" : "\\fP";
    } else if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else {
      out += c;
    }
  }
  return out;
}
std::string bold(const std::string& text) { return "\\fB" + roff(text) + "\\fP"; }
std::string italic(const std::string& text) { return "\\fI" + roff(text) + "\\fP"; }
std::string section(const std::string& title, const std::string& body) { return body.empty() ? "" : ".SH " + title + "\n" + body; }
/// A term and, indented under it, what it means.
std::string entry(const std::string& term, const std::string& text) { return ".TP\n" + term + "\n" + text + "\n"; }
/// As it stands, indented.
std::string literally(const std::string& text) { return text.empty() ? "" : ".RS 4\n.nf\n" + roff(text) + "\n.fi\n.RE\n"; }

std::string heading(const std::string& name, int number, const char* title) {
  std::string upper = name;
  for (char& c : upper) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return concat(".\\\" Made by mesa-train --describe; do not edit.\n.TH ", roff(upper), " ", number, " \"", version_date(), "\" \"mesa ",
                version_number(), "\" \"", title, "\"\n");
}

/// "trains a vision transformer": the first sentence, as whatis(1) wants it.
std::string summary(const std::string& description) {
  std::string text = description.substr(0, description.find(". "));
  if (!text.empty() && text.back() == '.') text.pop_back();
  if (!text.empty()) text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  return text;
}

std::string usage(const Option& option) {
  std::string names;
  for (const std::string& name : option.names) names += (names.empty() ? "" : ", ") + bold(name);
  if (option.is_flag()) return names;
  const std::string value = option.optional_value && option.value[0] != '[' ? "[" + italic(option.value) + "]" : italic(option.value);
  return names.empty() ? value : names + " " + value;
}

std::string synopsis(const std::string& program, const std::vector<Option>& options) {
  std::string needed;
  for (const Option& option : options)
    if (option.required) needed += " " + usage(option);
  return bold(program) + needed + " [" + italic("option") + " ...]\n";
}

std::string entries(const std::vector<Option>& options, bool arguments) {
  std::string out;
  for (const Option& option : options) {
    if (option.is_argument() != arguments) continue;
    const std::string fallback = option.default_value.empty() || option.is_flag() ? "" : " (default: " + option.default_value + ")";
    out += entry(usage(option), roff(option.doc + fallback));
  }
  return out;
}

/// The paragraphs of --help's end: those that begin with "Examples:" and "Exit codes:", and the others.
struct Footer {
  std::string notes, examples, exit_codes;
};
Footer read_footer(const std::string& text) {
  Footer footer;
  for (size_t from = 0; from < text.size();) {
    const size_t end = std::min(text.find("\n\n", from), text.size());
    const std::string paragraph = text.substr(from, end - from), examples = "Examples:\n", exit_codes = "Exit codes: ";
    if (paragraph.compare(0, examples.size(), examples) == 0)
      footer.examples = paragraph.substr(examples.size());
    else if (paragraph.compare(0, exit_codes.size(), exit_codes) == 0)
      footer.exit_codes = paragraph.substr(exit_codes.size());
    else
      footer.notes += (footer.notes.empty() ? "" : "\n\n") + paragraph;
    from = end + 2;
  }
  return footer;
}

/// "0 done; 1 failed." -> an entry each.
std::string exit_status(const std::string& codes) {
  std::string out;
  for (size_t from = 0; from < codes.size();) {
    const size_t end = std::min(codes.find_first_of(";,", from), codes.size());
    std::string one = codes.substr(from, end - from);
    one.erase(0, one.find_first_not_of(' '));
    if (!one.empty() && one.back() == '.') one.pop_back();
    const size_t space = one.find(' ');
    check(space != std::string::npos && std::isdigit(static_cast<unsigned char>(one[0])), "'", one, "' is no exit code and what it means");
    out += entry(bold(one.substr(0, space)), roff(one.substr(space + 1)));
    from = end + 1;
  }
  return out;
}

std::string environment() {
  return entry(bold("MESA_CPU"), "plain or avx2: use no newer vector instructions than these.") +
         entry(bold("MESA_CONFIG_DIR"), "Folders, separated by colons, where configs are looked for before the installed ones.") +
         entry(bold("OMP_NUM_THREADS"), "How many threads compute where " + bold("train.threads") + " is 0.");
}

std::string files() {
  return entry(italic("/usr/share/mesa/configs"),
               "Configs, models and storage policies to be named without a folder, here and in\n" + bold("mesa.yaml") +
                   "(5). Where Mesa is installed elsewhere they are beside it: ../share/mesa/configs from the program.") +
         entry(italic("/usr/share/doc/mesa"), "The documents.");
}

std::string see_also(const std::string& self) {
  std::string out;
  for (const char* page : {"mesa-train", "mesa-eval", "mesa-bench", "mesa-report", "mesa.yaml"})
    if (page != self) out += (out.empty() ? "" : ",\n") + bold(page) + (std::string(page) == "mesa.yaml" ? "(5)" : "(1)");
  return out + "\n";
}

std::string key_entries() {
  std::string out, before = "?";
  for (const ConfigKey& key : config_keys()) {
    const size_t dot = key.name.find('.');
    const std::string top = dot == std::string::npos ? "" : key.name.substr(0, dot);
    if (top != before) out += ".SS " + (top.empty() ? "Top level" : top) + "\n";
    before = top;
    const std::string fallback = key.default_value.empty() ? "" : ", default " + bold(key.default_value);
    out += entry(bold(key.name) + " (" + roff(key.type) + fallback + ")", roff(key.doc) + ".");
  }
  return out;
}

}  // namespace

std::string man_page(const CLI::App& app) {
  const std::vector<Option> options = command_line(app);
  const Footer footer = read_footer(app.get_footer());
  const std::string name = app.get_name();
  return heading(name, 1, "User Commands") + section("NAME", roff(name) + " \\- " + roff(summary(app.get_description())) + "\n") +
         section("SYNOPSIS", synopsis(name, options)) +
         section("DESCRIPTION", roff(app.get_description()) + "\n" + literally(footer.notes)) +
         section("ARGUMENTS", entries(options, true)) + section("OPTIONS", entries(options, false)) +
         section("EXIT STATUS", exit_status(footer.exit_codes)) + section("ENVIRONMENT", environment()) + section("FILES", files()) +
         section("EXAMPLES", literally(footer.examples)) + section("SEE ALSO", see_also(name));
}

std::string config_man_page() {
  const std::string description = "A run of " + bold("mesa-train") +
                                  "(1) is described by a file in YAML. Every key has a default, and a wrong one is refused with\nits file, "
                                  "its line and the nearest known key. " +
                                  bold("base") + " names files to start from, whose keys those of this file replace. On the command line " +
                                  bold("--set train.epochs=3") + "\ngives a key another value, and " + bold("--dry-run") +
                                  " prints all of them as they are resolved.\n";
  const std::string storage =
      "How the activations that wait for the backward pass are kept: the name of a policy, a path, or a list of rules, of which the last "
      "that\n"
      "matches a site holds.\n" +
      literally("storage:\n  - {match: \"*\",          codec: int8, groups: 256}\n  - {match: \"blocks.0.*\", codec: bf16}");
  return heading("mesa.yaml", 5, "File Formats") + section("NAME", "mesa.yaml \\- what a run of mesa\\-train does\n") +
         section("DESCRIPTION", description) +
         section(
             "EXAMPLE",
             literally(
                 "base: deit_s.yaml\ndata: {kind: image_folder, path: /imagenet}\ntrain: {epochs: 300, batch_size: 128}\nstorage: int8")) +
         section("KEYS", key_entries()) + section("STORAGE", storage) + section("FILES", files()) +
         section("SEE ALSO", see_also("mesa.yaml"));
}

}  // namespace mesa
