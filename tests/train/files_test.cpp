#include "mesa/train/files.h"

#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <vector>

#include "mesa/base/files.h"

using namespace mesa;
namespace fs = std::filesystem;
using Catch::Matchers::Contains;

namespace {

struct Folder {
  fs::path path;
  Folder() {
    char name[] = "/tmp/mesa-files-XXXXXX";
    path = mkdtemp(name);
  }
  ~Folder() {
    set_file_fault({});
    fs::remove_all(path);
  }
  std::string at(const std::string& name) const { return (path / name).string(); }
};

void write_checkpoint(const std::string& path, const std::string& content) {
  write_folder_atomically(path, [&](const std::string& folder) {
    for (const char* name : {"weights", "state", "empty"}) {
      OutputFile out(folder + "/" + name);
      if (std::string(name) != "empty") out.write(content + name);
      out.close();
    }
  });
}

// What a loader would find: the content, verified; "" if there is no folder.
std::string load(const std::string& path) {
  if (!recover_folder(path)) return "";
  verify_folder(path);
  const std::string text = read_text(path + "/weights");
  return text.substr(0, text.size() - 7);
}

std::string error_of(const std::string& folder) {
  try {
    verify_folder(folder);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

// How often the hook is asked during one replacement of a folder.
int count_operations(const std::string& path, bool exchange_works) {
  int count = 0;
  set_file_fault([&](std::string_view operation, const std::string&) {
    ++count;
    return operation == "exchange" && !exchange_works ? EINVAL : 0;
  });
  write_checkpoint(path, "count");
  set_file_fault({});
  return count;
}

}  // namespace

TEST_CASE("files: a folder is written, verified and replaced") {
  const Folder dir;
  const std::string path = dir.at("checkpoints/last");
  write_checkpoint(path, "one ");
  CHECK(load(path) == "one ");
  write_checkpoint(path + "/", "two ");
  CHECK(load(path) == "two ");
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir.at("checkpoints"))) names.insert(entry.path().filename());
  CHECK(names == std::set<std::string>{"last"});
  CHECK(fs::exists(path + "/manifest.json"));
}

TEST_CASE("files: a crash at any operation leaves the old or the new folder") {
  const Folder dir;
  const std::string path = dir.at("last");
  for (const bool exchange_works : {true, false}) {
    write_checkpoint(path, "before ");
    const int operations = count_operations(path, exchange_works);
    CHECK(operations > 15);
    int old_found = 0, new_found = 0;
    for (int crash_at = 1; crash_at <= operations; ++crash_at) {
      INFO("exchange " << exchange_works << ", crash at operation " << crash_at << " of " << operations);
      write_checkpoint(path, "old ");
      const pid_t child = fork();
      if (child == 0) {  // dies without any cleaning up
        int count = 0;
        set_file_fault([&](std::string_view operation, const std::string&) {
          if (++count == crash_at) _exit(9);
          return operation == "exchange" && !exchange_works ? EINVAL : 0;
        });
        try {
          write_checkpoint(path, "new ");
        } catch (...) {
          _exit(1);
        }
        _exit(0);
      }
      int status = 0;
      REQUIRE(waitpid(child, &status, 0) == child);
      CHECK(WEXITSTATUS(status) == 9);
      const std::string found = load(path);
      const bool whole = found == "old " || found == "new ";
      CHECK(whole);
      (found == "old " ? old_found : new_found)++;
      CHECK_FALSE(fs::exists(path + ".tmp"));
      CHECK_FALSE(fs::exists(path + ".old"));
    }
    CHECK(old_found > 0);
    CHECK(new_found > 0);
  }
}

TEST_CASE("files: an I/O error at any operation keeps a whole folder and cleans up") {
  const Folder dir;
  const std::string path = dir.at("last");
  for (const bool exchange_works : {true, false}) {
    write_checkpoint(path, "before ");
    const int operations = count_operations(path, exchange_works);
    for (const int code : {ENOSPC, EIO}) {
      for (int fail_at = 1; fail_at <= operations; ++fail_at) {
        INFO("exchange " << exchange_works << ", error " << code << " at operation " << fail_at << " of " << operations);
        write_checkpoint(path, "old ");
        int count = 0;
        bool failed = false;
        set_file_fault([&](std::string_view operation, const std::string&) {
          if (++count == fail_at) return code;
          return operation == "exchange" && !exchange_works ? EINVAL : 0;
        });
        try {
          write_checkpoint(path, "new ");
        } catch (const Error& e) {
          failed = true;
          CHECK_THAT(e.what(), Contains(dir.path.string()) && Contains(strerror(code)));
        }
        set_file_fault({});
        const std::string found = load(path);
        const bool whole = found == "new " || (failed && found == "old ");
        CHECK(whole);
      }
    }
  }
}

TEST_CASE("files: an error of the writer is passed on and the old folder stays") {
  const Folder dir;
  write_checkpoint(dir.at("last"), "old ");
  const auto failing = [](const std::string& folder) {
    OutputFile(folder + "/part").write("x");
    OutputFile out("/dev/full");
    out.write("x");
    out.close();
  };
  CHECK_THROWS_WITH(write_folder_atomically(dir.at("last"), failing), Contains("cannot write /dev/full: No space left on device"));
  CHECK_FALSE(fs::exists(dir.at("last.tmp")));
  CHECK(load(dir.at("last")) == "old ");
  CHECK_THROWS_WITH(write_folder_atomically(dir.at("last"), [](const std::string& folder) { fs::create_directory(folder + "/sub"); }),
                    Contains("sub is not a plain file"));
  CHECK(load(dir.at("last")) == "old ");
}

TEST_CASE("files: places that cannot be written are named with the reason") {
  const Folder dir;
  std::ofstream(dir.at("file")) << "x";
  CHECK_THROWS_WITH(write_checkpoint(dir.at("file/last"), "x"), Contains(dir.at("file")) && Contains("Not a directory"));
  CHECK_THROWS_WITH(write_checkpoint(dir.at("file"), "x"), Contains("exists and is not a folder"));
  CHECK_THROWS_WITH(write_checkpoint("/proc/mesa/last", "x"), Contains("/proc/mesa"));
  CHECK_THROWS_WITH(OutputFile("/proc/none/x"), Contains("cannot open /proc/none/x: "));
  CHECK_THROWS_WITH(OutputFile(dir.path.string()), Contains("Is a directory"));
  CHECK_THROWS_WITH(make_folders(dir.at("file")), Contains("file"));
  CHECK_THROWS_WITH(read_text(dir.path.string()), Contains("is not a file"));
  CHECK_THROWS_WITH(read_text(dir.at("none")), Contains("No such file"));
  CHECK_THROWS_WITH(read_text(dir.at("file"), 0), Contains("at most 0 are read"));
  CHECK_THROWS_WITH(read_text("/dev/zero", 1000), Contains("is not a file"));
}

TEST_CASE("files: damage is found wherever it is") {
  const Folder dir;
  const std::string path = dir.at("last");
  write_folder_atomically(path, [](const std::string& folder) {
    OutputFile out(folder + "/weights");
    out.write(std::string(1000, 'w') + std::string(1000, '\0'));
    out.close();
  });
  for (const char* name : {"weights", "manifest.json"}) {
    const std::string file = path + "/" + name, whole = read_text(file);
    for (size_t bit = 0; bit<whole.size() * 8; bit += whole.size()> 500 ? 37 : 1) {
      std::string damaged = whole;
      damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
      std::ofstream(file, std::ios::binary) << damaged;
      INFO(name << " bit " << bit);
      CHECK_THAT(error_of(path), Contains(path + "/"));
    }
    for (size_t part = 0; part < 64; ++part) {
      std::ofstream(file, std::ios::binary) << whole.substr(0, whole.size() * part / 64);
      INFO(name << " cut to " << part << "/64");
      CHECK_THAT(error_of(path), Contains(path + "/" + name));
    }
    std::ofstream(file, std::ios::binary) << whole;
    CHECK(error_of(path) == "no error");
  }
  std::ofstream(path + "/weights", std::ios::app) << "more";
  CHECK_THAT(error_of(path), Contains("weights has grown: 2004 bytes instead of 2000"));
  fs::resize_file(path + "/weights", 10);
  CHECK_THAT(error_of(path), Contains("weights is truncated: 10 bytes instead of 2000"));
  fs::remove(path + "/weights");
  CHECK_THAT(error_of(path), Contains("weights is missing"));
  std::ofstream(path + "/manifest.json")
      << "{\n \"files\": {\n  \"../x\": {\n   \"bytes\": 1,\n   \"crc32\": \"00000000\"\n  }\n },\n \"format\": 1\n}\n";
  CHECK_THAT(error_of(path), Contains("manifest.json is damaged"));
  std::ofstream(path + "/manifest.json") << "{\n \"files\": {},\n \"format\": 2\n}\n";
  CHECK_THAT(error_of(path), Contains("has format 2"));
  fs::remove(path + "/manifest.json");
  CHECK_THAT(error_of(path), Contains("manifest.json is missing"));
  CHECK_THAT(error_of(dir.at("none")), Contains("does not exist"));
  std::ofstream(dir.at("file")) << "x";
  CHECK_THAT(error_of(dir.at("file")), Contains("is not a folder"));
}

TEST_CASE("files: logs are appended and a full disk is reported once") {
  const Folder dir;
  {
    OutputFile out(dir.at("log"));
    out.write("a\n");
    out.write(std::string(200'000, 'b'));
    out.write("c\n");
  }
  CHECK(read_text(dir.at("log")) == "a\n" + std::string(200'000, 'b') + "c\n");
  OutputFile more(dir.at("log"), OutputFile::Mode::append);
  more.write("d\n");
  more.flush();
  CHECK(fs::file_size(dir.at("log")) == 200'006);
  more.close();
  CHECK_THROWS_WITH(more.write("e"), Contains("is closed"));

  OutputFile full("/dev/full");
  full.write("x");
  CHECK_THROWS_WITH(full.flush(), Contains("cannot write /dev/full: No space left on device"));
  CHECK_NOTHROW(full.close());
}

TEST_CASE("files: one file is replaced in one step") {
  const Folder dir;
  write_file_atomically(dir.at("x"), "one");
  write_file_atomically(dir.at("x"), "two");
  CHECK(read_text(dir.at("x")) == "two");
  for (const char* operation : {"open", "write", "sync", "rename"}) {
    set_file_fault([&](std::string_view o, const std::string&) { return o == operation ? ENOSPC : 0; });
    CHECK_THROWS_WITH(write_file_atomically(dir.at("x"), "three"), Contains("No space left"));
    set_file_fault({});
    CHECK(read_text(dir.at("x")) == "two");
    CHECK_FALSE(fs::exists(dir.at("x.tmp")));
  }
}

TEST_CASE("files: a write that takes a part of what it was given goes on with the rest") {
  const Folder dir;
  const std::string text(300'001, 'x');
  int writes = 0;
  set_file_fault([&](std::string_view operation, const std::string&) { return operation == "write" && ++writes < 20 ? kShortWrite : 0; });
  {
    OutputFile out(dir.at("log"));
    out.write("a"), out.write(text), out.write("b");
    out.close();
  }
  set_file_fault({});
  CHECK(read_text(dir.at("log")) == "a" + text + "b");
  CHECK(writes > 10);
}

TEST_CASE("files: the folder that is replaced may go on under another name, and one that is removed loses its own first") {
  const Folder dir;
  const std::string path = dir.at("last");
  for (const bool exchange_works : {true, false}) {
    set_file_fault([&](std::string_view operation, const std::string&) { return operation == "exchange" && !exchange_works ? EINVAL : 0; });
    const auto write = [&](const std::string& content, const std::string& former) {
      write_folder_atomically(
          path,
          [&](const std::string& folder) {
            OutputFile out(folder + "/weights");
            out.write(content + "weights");
            out.close();
          },
          former);
    };
    write("one ", dir.at("nobody"));  // nothing to replace
    CHECK_FALSE(fs::exists(dir.at("nobody")));
    write("two ", dir.at("first"));
    CHECK(load(path) == "two ");
    CHECK(load(dir.at("first")) == "one ");
    remove_folder(dir.at("first"));
    CHECK_FALSE(fs::exists(dir.at("first")));
    for (const std::string& failing : {dir.at("first"), path}) {
      set_file_fault([&](std::string_view operation, const std::string& at) { return operation == "rename" && at == failing ? EIO : 0; });
      CHECK_THROWS_WITH(write("three ", dir.at("first")), Contains(failing + ": Input/output error"));
      set_file_fault({});
      CHECK(load(path) == "two ");
      CHECK_FALSE(fs::exists(dir.at("first")));
      CHECK_FALSE(fs::exists(path + ".tmp"));
    }
    fs::remove_all(path);
  }
  write_checkpoint(path, "x ");
  set_file_fault([&](std::string_view operation, const std::string& at) { return operation == "remove" && at.ends_with(".tmp") ? EIO : 0; });
  CHECK_THROWS_WITH(remove_folder(path), Contains("last.tmp"));
  set_file_fault({});
  CHECK_FALSE(fs::exists(path));
  CHECK_FALSE(recover_folder(path));
  CHECK_FALSE(fs::exists(path + ".tmp"));
}
