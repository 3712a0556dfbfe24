#include "mesa/dist/communicator.h"

#include "host_communicator.h"
#include "mesa/base/threads.h"

namespace mesa {

void Communicator::barrier() {
  const Tensor one = to(Tensor::from<int64_t>({1}, {1}), device());
  all_reduce(one);
  finish();
}

namespace {

class SingleCommunicator : public Communicator {
 public:
  explicit SingleCommunicator(const RankInfo& me) : Communicator(me) {}
  void all_reduce(const Tensor&) override {}
  void reduce_scatter(const Tensor& x, const Tensor& part) override { copy_unless_same(x, part); }
  void all_gather(const Tensor& part, const Tensor& x) override { copy_unless_same(part, x); }
  void broadcast(const Tensor&, int64_t) override {}
  void finish() override {}
  bool connected() const override { return size() > 1; }

 private:
  static void copy_unless_same(const Tensor& from, const Tensor& to) {
    if (!to.is_meta() && from.raw() != to.raw()) transfer(from.reshape(to.shape()), to);
  }
};

void check_whole(const Tensor& x) {
  check(x.is_contiguous() && x.device().kind == DeviceKind::cpu, "MPI takes contiguous tensors in host memory");
}

}  // namespace

std::unique_ptr<Communicator> single_communicator(const RankInfo& me) { return std::make_unique<SingleCommunicator>(me); }

HostCommunicator::HostCommunicator(Transport& transport, Control* control)
    : Communicator(transport.me()), transport_(transport), control_(control) {
  transport_.poll = [this] {
    if (control_ != nullptr) control_->throw_if_failed();
  };
  const SignalsBlocked blocked;
  thread_ = std::thread([this] { work(); });
}

HostCommunicator::~HostCommunicator() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void HostCommunicator::all_reduce(const Tensor& x) {
  check_whole(x);
  begin([this, x] { transport_.all_reduce(x.raw(), x.numel(), x.dtype()); });
}

void HostCommunicator::reduce_scatter(const Tensor& x, const Tensor& part) {
  check_whole(x), check_whole(part);
  check(x.numel() == part.numel() * size() && x.dtype() == part.dtype(), "reduce_scatter: ", x.shape(), " into ", size(), " parts ",
        part.shape());
  begin([this, x, part] { transport_.reduce_scatter(x.raw(), part.raw(), part.numel(), x.dtype()); });
}

void HostCommunicator::all_gather(const Tensor& part, const Tensor& x) {
  check_whole(x), check_whole(part);
  check(x.bytes() == part.bytes() * size(), "all_gather: ", size(), " parts ", part.shape(), " into ", x.shape());
  begin([this, x, part] { transport_.all_gather(part.raw(), x.raw(), part.bytes()); });
}

void HostCommunicator::broadcast(const Tensor& x, int64_t root) {
  check_whole(x);
  begin([this, x, root] { transport_.broadcast(x.raw(), x.bytes(), root); });
}

void HostCommunicator::begin(std::function<void()> collective) {
  {
    const std::lock_guard lock(mutex_);
    rethrow();
    queue_.push_back(std::move(collective));
    ++begun_;
  }
  changed_.notify_all();
}

void HostCommunicator::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return error_ || done_ == begun_; });
  rethrow();
}

void HostCommunicator::rethrow() {
  if (error_) std::rethrow_exception(error_);
}

std::exception_ptr HostCommunicator::reason(std::exception_ptr error) {
  if (control_ != nullptr) try {
      control_->throw_if_failed(Control::kDeath);
    } catch (...) {
      return std::current_exception();
    }
  return error;
}

void HostCommunicator::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty() || error_) return;  // after an error there is no order any more
    const auto collective = std::move(queue_.front());
    queue_.pop_front();
    const int64_t number = done_ + 1;
    lock.unlock();
    std::exception_ptr error;
    try {
      if (control_ != nullptr) control_->at_collective(number, true);
      collective();
      if (control_ != nullptr) control_->at_collective(number, false);
    } catch (...) {
      error = reason(std::current_exception());
    }
    lock.lock();
    if (error)
      error_ = error;
    else
      done_ = number;
    changed_.notify_all();
  }
}

}  // namespace mesa
