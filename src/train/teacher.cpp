#include "mesa/train/teacher.h"

#include "mesa/train/lora.h"
#include "mesa/train/safetensors.h"
#include "weight_names.h"

namespace mesa {
namespace {

/// The model in the file, without dropout of any kind.
NetConfig teacher_config(const RunConfig& config, const SafetensorsFile& file, const ImageConfig& student) {
  const auto said = file.metadata.find("mesa.config");
  if (said == file.metadata.end() && config.distill.model.empty())
    config.refuse("distill.teacher", config.distill.teacher, " does not say which model it holds; name it with distill.model");
  RunConfig of;
  if (said != file.metadata.end()) {
    of = parse_config(said->second, config.distill.teacher);
    const TransformOptions theirs = make_transform(of, model_config(of, 0).input()), ours = make_transform(config, student);
    if (theirs.mean != ours.mean || theirs.std != ours.std)
      config.refuse("distill.teacher", "was trained with another data.mean or data.std; set the student's to the teacher's");
  } else {
    of.model.name = config.distill.model;
    of.model.image_size = student.image_size, of.model.channels = student.channels, of.model.classes = student.classes;
  }
  of.model.drop_rate = of.model.attn_drop_rate = of.model.drop_path = 0;
  of.model.attention = "fused";  // whatever it was trained with: the same numbers
  return model_config(of, 0);
}

}  // namespace

Teacher::Teacher(const RunConfig& config, const ImageConfig& student, Device device) {
  const bool plan = device.kind == DeviceKind::meta;
  try {
    const std::string file = weights_file(config.distill.teacher, WeightsKind::automatic, !plan);
    SafetensorsFile weights = read_safetensors(file, plan ? kMeta : kCpu);
    rename_as_here(weights);
    merge_lora(weights, file);
    const NetConfig model = teacher_config(config, weights, student);
    const ImageConfig& input = model.input();
    if (input.image_size != student.image_size || input.channels != student.channels || input.classes != student.classes)
      config.refuse("distill.teacher", "takes ", input.channels, " x ", input.image_size, " x ", input.image_size, " images of ",
                    input.classes, " classes, and the student ", student.channels, " x ", student.image_size, " x ", student.image_size,
                    " of ", student.classes);
    net_.emplace(Builder(params_, 0, compute_dtype(config, device), DType::f32, device), model);
    std::map<std::string, Tensor> named;
    for (const NamedTensor& tensor : weights.tensors) named[tensor.name] = tensor.tensor;
    load_weights(params_, named, file);
    const std::string bad = plan ? "" : first_bad_parameter(params_);
    check(bad.empty(), file, " holds weights that are not finite, first in ", bad);
  } catch (const UsageError&) {
    throw;
  } catch (const Error& e) {
    config.refuse("distill.teacher", e.what());
  }
  for (Param& param : params_.params()) param.trainable = false;
}

}  // namespace mesa
