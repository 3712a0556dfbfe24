// Collectives through MPI: a plugin, loaded where a run was started by mpirun or srun.
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "transport.h"

namespace mesa {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 28;  // of one call: MPI counts in int, and some libraries in int bytes

void check_mpi(int code, const char* what) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  fail(what, ": ", std::string(text, static_cast<size_t>(length)));
}

MPI_Datatype type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return MPI_FLOAT;
    case DType::f64: return MPI_DOUBLE;
    case DType::bf16: return MPI_UINT16_T;  // added up by add_bf16
    case DType::i64: return MPI_INT64_T;
    default: fail("MPI adds no tensors of ", to_string(dtype), " here");
  }
}

void add_bf16(void* in, void* to, int* count, MPI_Datatype*) {
  const auto* x = static_cast<const bf16*>(in);
  auto* sum = static_cast<bf16*>(to);
  for (int i = 0; i < *count; ++i) sum[i] = bf16(float(sum[i]) + float(x[i]));
}

class MpiTransport : public Transport {
 public:
  MpiTransport() {
    MPI_Comm_dup(MPI_COMM_WORLD, &comm_);
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    int rank = 0, size = 1, local = 0;
    MPI_Comm_rank(comm_, &rank);
    MPI_Comm_size(comm_, &size);
    MPI_Comm host;
    MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &local);
    MPI_Comm_free(&host);
    char name[256] = "?";
    gethostname(name, sizeof name - 1);
    me_ = {rank, size, local, name};
    check_mpi(MPI_Op_create(&add_bf16, 1, &sum_bf16_), "MPI_Op_create");
  }
  /// Only a run that ended well finalizes: MPI would wait for ranks that are gone.
  ~MpiTransport() override {
    MPI_Op_free(&sum_bf16_);
    MPI_Comm_free(&comm_);
    MPI_Finalize();
  }
  RankInfo me() const override { return me_; }

  void all_reduce(void* data, int64_t count, DType dtype) override {
    const MPI_Datatype type = type_of(dtype);
    each_part(count, [&](int64_t from, int n, MPI_Request* request) {
      return MPI_Iallreduce(MPI_IN_PLACE, at(data, from * size_of(dtype)), n, type, sum_of(dtype), comm_, request);
    });
  }
  void reduce_scatter(const void* data, void* part, int64_t count, DType dtype) override {
    check(count <= kMostElements, "a part of ", count, " elements is too large for one MPI call");
    const int64_t bytes = count * size_of(dtype);
    const bool in_place = part == static_cast<const char*>(data) + bytes * me_.rank;
    if (in_place) part_.resize(static_cast<size_t>(bytes));  // MPI's own idea of "in place" is the first part on all ranks
    void* const to = in_place ? part_.data() : part;
    MPI_Request request;
    check_mpi(MPI_Ireduce_scatter_block(data, to, static_cast<int>(count), type_of(dtype), sum_of(dtype), comm_, &request),
              "MPI_Reduce_scatter");
    wait(request);
    if (in_place) std::memcpy(part, to, static_cast<size_t>(bytes));
  }
  void all_gather(const void* part, void* data, int64_t bytes) override {
    const int64_t width = bytes % 4 == 0 ? 4 : 1, count = bytes / width;
    check(count <= kMostElements, "a part of ", bytes, " bytes is too large for one MPI call");
    const MPI_Datatype type = width == 4 ? MPI_UINT32_T : MPI_BYTE;
    const bool in_place = part == at(data, bytes * me_.rank);
    MPI_Request request;
    check_mpi(
        MPI_Iallgather(in_place ? MPI_IN_PLACE : part, static_cast<int>(count), type, data, static_cast<int>(count), type, comm_, &request),
        "MPI_Allgather");
    wait(request);
  }
  void broadcast(void* data, int64_t bytes, int64_t root) override {
    each_part(bytes, [&](int64_t from, int n, MPI_Request* request) {
      return MPI_Ibcast(at(data, from), n, MPI_BYTE, static_cast<int>(root), comm_, request);
    });
  }

 private:
  MPI_Op sum_of(DType dtype) const { return dtype == DType::bf16 ? sum_bf16_ : MPI_SUM; }
  static void* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

  template <class Begin>
  void each_part(int64_t count, const Begin& begin) {
    for (int64_t from = 0; from < count; from += kMostElements) {
      MPI_Request request;
      check_mpi(begin(from, static_cast<int>(std::min(count - from, kMostElements)), &request), "an MPI collective");
      wait(request);
    }
  }

  /// MPI moves data only while it is called. Waiting gives the processor away: what a rank computes meanwhile needs it.
  void wait(MPI_Request& request) {
    constexpr int kEager = 400, kNap = 50;  // calls before naps; microseconds
    for (int i = 0, done = 0;; ++i) {
      check_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test");
      if (done != 0) return;
      if (i < kEager)
        sched_yield();
      else
        usleep(kNap);
      if (i % 64 == 63) poll();
    }
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Op sum_bf16_ = MPI_OP_NULL;
  std::vector<char> part_;
  RankInfo me_;
};

}  // namespace
}  // namespace mesa

extern "C" __attribute__((visibility("default"))) mesa::Transport* mesa_open_transport(std::string* why) {
  int provided = 0;
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
    *why = "MPI_Init failed";
    return nullptr;
  }
  if (provided < MPI_THREAD_SERIALIZED) {
    *why = "this MPI cannot be called from another thread than the main one";
    return nullptr;
  }
  return new mesa::MpiTransport;
}
