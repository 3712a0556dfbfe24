// What the plugin for NCCL exports.
#pragma once
#include <string>

#include "mesa/dist/communicator.h"

namespace mesa {

/// "mesa_nccl_id": what the leader makes and all ranks pass to the next.
using NcclId = void(std::string* id);
/// "mesa_open_nccl": the GPU is the process's first. Throws Error.
using OpenNccl = Communicator*(const RankInfo* me, const std::string* id, Control* control);

}  // namespace mesa
