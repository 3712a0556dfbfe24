// A library that is opened when it is first asked for, so that programs start on machines that lack it.
#pragma once
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <initializer_list>
#include <string>

namespace mesa::kernels::cuda {

/// Looked for where the system's linker does (LD_LIBRARY_PATH, ld.so.conf), then in CUDA's toolkit: CUDA_HOME, CUDA_PATH, /usr/local/cuda.
struct SharedLibrary {
  void* handle = nullptr;
  std::string why;  ///< it is not there, or cannot be loaded; "" if it can

  explicit SharedLibrary(const std::string& name) {
    if (open(name)) return;
    for (const char* root : std::initializer_list<const char*>{std::getenv("CUDA_HOME"), std::getenv("CUDA_PATH"), "/usr/local/cuda"})
      for (const char* folder : {"/lib64/", "/lib/"})
        if (root != nullptr && access((root + (folder + name)).c_str(), F_OK) == 0 && open(root + (folder + name))) return;
  }

  /// Null if the library, or this function of it, is not there.
  template <class F>
  F* find(const char* name) const {
    return handle == nullptr ? nullptr : reinterpret_cast<F*>(dlsym(handle, name));
  }

 private:
  bool open(const std::string& path) {
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* error = handle == nullptr ? dlerror() : nullptr;
    why = error != nullptr ? error : "";
    return handle != nullptr;
  }
};

/// Hidden: the library's own parts have to find its functions, and not those that pass on.
#define MESA_HIDDEN [[gnu::visibility("hidden")]]
/// Defines a function of `library` (a SharedLibrary) that passes its arguments on, and answers `missing` where the library lacks it.
#define MESA_PASS_ON(library, missing, name, parameters, arguments)           \
  MESA_HIDDEN decltype(missing) name parameters {                             \
    static decltype(&name) const there = library.find<decltype(name)>(#name); \
    return there != nullptr ? there arguments : missing;                      \
  }

}  // namespace mesa::kernels::cuda
