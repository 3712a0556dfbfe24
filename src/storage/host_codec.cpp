// host: the tensor itself, in the host's memory while it waits. From a GPU it is copied out beside the work of the forward pass, and back
// one step ahead of the backward pass; on the CPU it is where it is.
#include <map>

#include "builtin_codecs.h"
#include "mesa/base/cuda.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {

/// Copies on their way out of and into the GPU, of all sites together: backward asks for them in the reverse of the order they left in.
/// One training thread packs and unpacks.
class Traffic {
 public:
  static Traffic& get() {
    static Traffic& traffic = *new Traffic;  // tensors may outlive any order of destruction
    return traffic;
  }

  Tensor send(const Tensor& x) {
    forget_the_dead();
    const Tensor host = Tensor::empty(x.shape(), x.dtype(), kPinned, MemoryKind::activations);
    Entry& entry = entries_[host.buffer()->id()];
    entry.host = entry.busy = host.buffer();
    entry.shape = x.shape();
    entry.dtype = x.dtype();
    entry.source = x;
    entry.left = cuda::copy_to_host_beside(host.raw(), x.raw(), x.bytes());
    release_sources();
    return host;
  }

  Tensor fetch(const Tensor& host) {
    const auto found = entries_.find(host.buffer()->id());
    check(found != entries_.end(), "a tensor in host memory that was not sent there");
    begin(found->second);
    cuda::wait_for(found->second.arriving);
    const Tensor x = std::move(found->second.back);
    found->second.back = Tensor();  // whoever asks again fetches again
    if (found != entries_.begin()) begin(std::prev(found)->second);
    return x;
  }

 private:
  struct Entry {
    std::weak_ptr<Buffer> host;
    std::shared_ptr<Buffer> busy;  // the same while a copy writes or reads it, whoever else lets go of it
    Shape shape;
    DType dtype = DType::f32;
    Tensor source;  // on the device; must stay until it has left
    Tensor back;    // on its way to the device again
    cuda::Mark left, arriving;
    /// True while somebody else holds this memory.
    bool wanted() const { return host.use_count() > (busy ? 1 : 0); }
    /// True while a copy from or to it may still run.
    bool moving() const { return !cuda::passed(left) || (arriving && !cuda::passed(arriving)); }
  };
  /// How many tensors may wait for their copies while the forward pass goes on: each is memory that is not yet free.
  static constexpr int kLeaving = 2;

  /// Starts the way back, unless it has begun or nobody will ask for it.
  static void begin(Entry& entry) {
    if (entry.back.defined() || !entry.wanted()) return;
    entry.busy = entry.host.lock();
    cuda::wait_for(entry.left);
    entry.source = Tensor();
    entry.back = Tensor::empty(entry.shape, entry.dtype, kCuda);
    entry.arriving = cuda::copy_to_device_beside(entry.back.raw(), entry.busy->data(), entry.back.bytes());
  }

  void release_sources() {
    int leaving = 0;
    for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
      if (!entry->second.source.defined() || (++leaving <= kLeaving && !cuda::passed(entry->second.left))) continue;
      cuda::wait_for(entry->second.left);  // whatever takes this memory next comes later on the stream
      entry->second.source = Tensor();
    }
  }

  /// Lets go of memory whose copies are done, and of entries that no Saved holds any more.
  void forget_the_dead() {
    for (auto item = entries_.begin(); item != entries_.end();) {
      Entry& entry = item->second;
      if (entry.busy && !entry.moving()) entry.busy.reset(), entry.source = Tensor();
      item = entry.host.expired() ? entries_.erase(item) : std::next(item);
    }
  }

  std::map<uint64_t, Entry> entries_;  // by the host buffer's id, which rises: the order of sending
};

class HostCodec : public Codec {
 public:
  Packed pack(const Tensor& x, const PackContext&) override {
    if (!leaves(x.device())) return {{x}, x.shape(), x.dtype(), {}};
    Tensor whole = x;
    if (!x.is_contiguous()) {
      whole = empty_like(x);
      kernels::copy(x, whole);
    }
    return {{Traffic::get().send(whole)}, x.shape(), x.dtype(), {}};
  }
  Tensor unpack(const Packed& packed) const override {
    const Tensor& kept = packed.parts[0];
    return kept.device() == kPinned ? Traffic::get().fetch(kept) : kept;
  }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site&) const override { return shape.numel() * size_of(dtype); }
  double error_bound(double, double) const override { return 0; }
  bool leaves(Device device) const override { return is_gpu(device); }
  bool shares_input(DType) const override { return true; }
};

}  // namespace

std::unique_ptr<Codec> make_host_codec() { return std::make_unique<HostCodec>(); }

}  // namespace mesa
