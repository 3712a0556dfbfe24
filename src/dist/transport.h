// What a message-passing library must do for the CPU engine. Libraries stand behind plugins, so that a machine without one runs Mesa, too.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "mesa/base/dtype.h"
#include "mesa/dist/control.h"

namespace mesa {

/// Collectives on host memory, called from one thread at a time. Each returns when it is done; meanwhile it calls `poll` now and then,
/// which may throw to leave.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual RankInfo me() const = 0;
  virtual void all_reduce(void* data, int64_t count, DType dtype) = 0;
  virtual void reduce_scatter(const void* data, void* part, int64_t count_of_part, DType dtype) = 0;
  virtual void all_gather(const void* part, void* data, int64_t bytes_of_part) = 0;
  virtual void broadcast(void* data, int64_t bytes, int64_t root) = 0;
  std::function<void()> poll = [] {};
};

/// What a plugin exports under the name "mesa_open_transport": null and the reason where the library cannot be used.
using OpenTransport = Transport*(std::string* why);

}  // namespace mesa
