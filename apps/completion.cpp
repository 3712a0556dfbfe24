// Scripts that complete a command line: https://www.gnu.org/software/bash/manual/html_node/Programmable-Completion.html, zshcompsys(1), and
// complete(1) of fish.
#include <algorithm>

#include "command_line.h"
#include "mesa/base/error.h"

namespace mesa {
namespace {

std::string join(const std::vector<std::string>& parts, const std::string& between) {
  std::string out;
  for (const std::string& part : parts) out += (out.empty() ? "" : between) + part;
  return out;
}

std::string replace(const std::string& text, char what, const std::string& by) {
  std::string out;
  for (const char c : text) out += c == what ? by : std::string(1, c);
  return out;
}

/// What is said of an option in a list of many: its doc up to the first semicolon.
std::string brief(const Option& option) { return option.doc.substr(0, option.doc.find(';')); }

std::vector<std::string> words_of(const Option& option) {
  std::vector<std::string> out = option.choices;
  const std::vector<std::string> more = words(option.kind);
  out.insert(out.end(), more.begin(), more.end());
  return out;
}

/// Keys whose values are files or folders.
constexpr const char* kPathKeys = "data.path|train.weights|distill.teacher";

bool takes_files(const Option& option) {
  return option.kind == ValueKind::file || option.kind == ValueKind::config || option.kind == ValueKind::policy;
}

std::string bash_assignments(const Option& option) {
  std::string out;
  if (const auto words = words_of(option); !words.empty()) out += " words='" + join(words, " ") + "'";
  if (takes_files(option)) out += " files=-f";
  if (option.kind == ValueKind::folder) out += " files=-d";
  if (option.list) out += " list=1";
  if (option.kind == ValueKind::setting) out += std::string(" paths='") + kPathKeys + "'";
  return out;
}

std::string quoted_for_zsh(const std::string& text) { return "'" + replace(text, '\'', "'\\''") + "'"; }

std::string zsh_action(const Option& option) {
  const std::vector<std::string> words = words_of(option);
  if (option.kind == ValueKind::setting) {
    std::string open, complete;  // what is still to be typed on, and what is whole
    for (const std::string& word : words) (word.back() == '=' ? open : complete) += " " + word;
    return std::string("{if compset -P \"(") + kPathKeys + ")=\"; then _files; else compadd -S \"\" --" + open + "; compadd --" + complete +
           "; fi}";
  }
  const std::string files = option.kind == ValueKind::folder ? "_files -/" : takes_files(option) ? "_files" : "";
  if (words.empty()) return files.empty() ? " " : files;
  if (option.list) return "{_sequence compadd -- " + join(words, " ") + "}";
  if (files.empty()) return "(" + join(words, " ") + ")";
  return "{compadd -- " + join(words, " ") + "; " + files + "}";
}

std::string zsh_spec(const Option& option) {
  const std::string action = option.is_flag() ? "" : ":" + replace(option.value, ':', "\\:") + ":" + zsh_action(option);
  if (option.is_argument()) return quoted_for_zsh((option.repeatable ? "*" : "1") + action);
  std::string doc = replace(brief(option), '\\', "\\\\");
  for (const char special : {'[', ']', ':'}) doc = replace(doc, special, std::string("\\") + special);
  const std::string end = (option.is_flag() ? "[" : "=[") + doc + "]" + (option.optional_value ? ":" : "") + action;
  if (option.names.size() == 1) return quoted_for_zsh((option.repeatable ? "*" : "") + option.names[0] + end);
  // Of several names one excludes the others; only long ones take a value behind "=".
  std::string out;
  for (const std::string& name : option.names) {
    const bool is_long = name.compare(0, 2, "--") == 0;
    out += (out.empty() ? "" : " ") +
           quoted_for_zsh("(" + join(option.names, " ") + ")" + name + (is_long || option.is_flag() ? end : end.substr(1)));
  }
  return out;
}

std::string quoted_for_fish(const std::string& text) { return "'" + replace(replace(text, '\\', "\\\\"), '\'', "\\'") + "'"; }

}  // namespace

std::string bash_completion(const CLI::App& app) {
  const std::vector<Option> options = command_line(app);
  std::string arms, names, arguments;
  for (const Option& option : options) {
    if (option.is_argument()) arguments += bash_assignments(option);
    names += (names.empty() ? "" : " ") + join(option.names, " ");
    if (!option.is_argument() && !option.is_flag()) arms += "    " + join(option.names, "|") + ")" + bash_assignments(option) + " ;;\n";
  }
  const std::string function = "_" + replace(app.get_name(), '-', "_");
  return "# bash completion of " + app.get_name() + "\n" + function + R"(() {
  local options=')" +
         names + R"('
  local line=${COMP_LINE:0:COMP_POINT} option='' word='' glued='' words='' files='' list='' paths='' quote='' c
  while [[ $line ]]; do  # the last two words as the shell reads them; not COMP_WORDS, which are broken at "="
    c=${line:0:1} line=${line:1}
    if [[ $c == "$quote" ]]; then quote=''
    elif [[ $c == \\ && $quote != "'" ]]; then word+=${line:0:1} line=${line:1}
    elif [[ $c == [\'\"] && -z $quote ]]; then quote=$c
    elif [[ $c == [[:space:]] && -z $quote ]]; then option=${word:-$option} word=''
    else word+=$c
    fi
  done
  [[ $word == --*=* ]] && option=${word%%=*} glued=$option= word=${word#*=}
  case $option in
)" + arms +
         "    *)" + (arguments.empty() ? " words=$options" : arguments) + R"( ;;
  esac
  [[ $word == -* && -z $glued ]] && words=$options files='' list=''
  [[ $paths && $word =~ ^($paths)= ]] && glued+=${BASH_REMATCH[0]} word=${word#*=} words='' files=-f
  local lead=''
  [[ $list && $word == *,* ]] && lead=${word%,*},
  mapfile -t COMPREPLY < <(compgen ${words:+-W "$words"} ${files:+"$files"} -- "${word#"$lead"}")
  COMPREPLY=("${COMPREPLY[@]/#/$lead}")
  [[ $files ]] && compopt -o filenames 2>/dev/null
  [[ $list || ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
  if [[ $COMP_WORDBREAKS != *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]/#/$glued}")
  elif [[ $word == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
  fi
}
complete -F )" +
         function + " " + app.get_name() + "\n";
}

std::string zsh_completion(const CLI::App& app) {
  std::string out = "#compdef " + app.get_name() + "\n_arguments -S";
  for (const Option& option : command_line(app)) out += " \\\n  " + zsh_spec(option);
  return out + "\n";
}

std::string fish_completion(const CLI::App& app) {
  std::string out = "# fish completion of " + app.get_name() + "\n";
  bool arguments = false;
  for (const Option& option : command_line(app)) {
    out += "complete -c " + app.get_name();
    arguments = arguments || option.is_argument();
    for (const std::string& name : option.names) out += name[1] == '-' ? " -l " + name.substr(2) : " -s " + name.substr(1);
    if (!option.is_flag()) out += option.is_argument() ? (takes_files(option) ? " -F" : " -f") : takes_files(option) ? " -r -F" : " -x";
    std::vector<std::string> words = words_of(option);
    if (option.kind == ValueKind::folder) words.push_back("(__fish_complete_directories)");
    if (option.list) words = {"(__fish_complete_list , \"string split ' ' '" + join(words, " ") + "'\")"};
    if (!words.empty()) out += " -a " + quoted_for_fish(join(words, " "));
    out += " -d " + quoted_for_fish(brief(option)) + "\n";
  }
  return arguments ? out : out + "complete -c " + app.get_name() + " -f\n";
}

}  // namespace mesa
