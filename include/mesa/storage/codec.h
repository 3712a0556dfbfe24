// How one activation waits for the backward pass: the seam where storage formats plug in.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/kernels/codec.h"
#include "mesa/tensor/tensor.h"

namespace mesa {

/// Where an activation is kept: a scope path and a slot, "blocks.3.mlp.act:x", the same path as the parameters beside it.
struct Site {
  std::string path, slot;
  int64_t heads = 1;  ///< attention heads of the layer around it, for head-wise groups
  std::string name() const { return path + ":" + slot; }
};

/// What backward finds: everything needed to decode, the scale included, and nothing that changes later.
struct Packed {
  std::vector<Tensor> parts;  ///< codes first; their meaning is the codec's own
  Shape shape;                ///< of the tensor that was packed
  DType dtype = DType::f32;
  kernels::GroupLayout layout;
};

/// What one call of pack has to know and to tell.
struct PackContext {
  const Site& site;
  RandomKey random;  ///< this site's numbers at this step
  /// [2] i64 where x lives: saturated and non-finite elements are added here. Undefined where the codec shares its input.
  const Tensor& counts;
};

/// A value that the kernel which computes it will pack in the same pass: what is kept, and what that kernel needs. Empty: pack it later.
struct Opened {
  Packed packed;
  kernels::Coding codes;
};

/// One instance serves one site, so a codec may keep running state.
class Codec {
 public:
  virtual ~Codec() = default;
  /// x: any strides, f32|bf16|f64. A codec with running ranges updates them here.
  virtual Packed pack(const Tensor& x, const PackContext& context) = 0;
  /// The same for a value of this form that does not exist yet, if this codec knows how to code it before it has seen it.
  virtual Opened open(const Shape&, DType, Device, const PackContext&) { return {}; }
  /// A tensor of the packed shape and dtype, contiguous unless the codec shares its input.
  virtual Tensor unpack(const Packed& packed) const = 0;
  /// The same in the form that kernels can decode as they read, if this codec's codes have it.
  virtual std::optional<kernels::Coded> coded(const Packed&) const { return {}; }
  /// The bytes that pack keeps for such a tensor: a promise that tests compare with the meter, and the plan of a dry run.
  virtual int64_t packed_bytes(const Shape& shape, DType dtype, const Site& site) const = 0;
  /// The largest |unpack(pack(x)) - x| of an element of a group that spans [lo, hi]. The rounding of the element's own dtype comes on top.
  virtual double error_bound(double lo, double hi) const = 0;
  /// True if pack moves x out of this device's memory, so that nothing of it is kept there.
  virtual bool leaves(Device) const { return false; }
  /// True if pack keeps an x of this dtype itself (its buffer) and unpack returns it.
  virtual bool shares_input(DType) const { return false; }
  /// Running state for the checkpoint: tensors by name. load_state throws if names or shapes do not fit.
  virtual std::map<std::string, Tensor> state() const { return {}; }
  virtual void load_state(const std::map<std::string, Tensor>& state);
  /// Running state as it is now is what roll_back returns to.
  virtual void commit() {}
  virtual void roll_back() {}
  /// Names the memory that the next pack or open uses for running state (never 0 where there is state); and what that call does to the
  /// codec itself, for work on a device that was recorded in the same phase and runs again without the call.
  virtual uint64_t phase() const { return 0; }
  virtual void repeat() {}
};

/// The options of a rule beside `match` and `codec`, as written: {"groups", "256"}.
using CodecOptions = std::map<std::string, std::string>;
using CodecFactory = std::function<std::unique_ptr<Codec>(const CodecOptions&)>;

/// Makes `name` usable in storage rules. A later registration of the same name is an error.
/// `options` names the keys that the factory reads; other keys in a rule are refused with the nearest of these.
void register_codec(const std::string& name, std::vector<std::string> options, CodecFactory factory);
/// Throws Error for an unknown codec, option or value, naming the nearest known one.
std::unique_ptr<Codec> make_codec(const std::string& name, const CodecOptions& options);
std::vector<std::string> codec_names();

}  // namespace mesa
