// Event files for TensorBoard: TFRecord frames around protocol buffers, both written by hand (tensorflow/core/util/event.proto,
// framework/summary.proto, lib/io/record_writer.h).
#pragma once
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "mesa/tensor/tensor.h"
#include "mesa/train/files.h"

namespace mesa {

/// How often values fall into each of equally wide bins. Values that are not finite are left out and counted.
struct Histogram {
  double min = 0, max = 0, sum = 0, sum_of_squares = 0;
  int64_t count = 0, nonfinite = 0;
  std::vector<double> limits, counts;  ///< right end of each bin, and what lies in it
};
/// Of the elements of a floating tensor of any strides, on any device (a copy on a GPU is waited for).
Histogram histogram_of(const Tensor& x, int bins = 64);

/// One start of a run writes one file, events.out.tfevents.<seconds>.mesa.<pid>, later ones in the order of their names. Throws Error on
/// I/O errors; the next event then begins another file, since readers stop at a torn record.
class EventLog {
 public:
  using Scalars = std::span<const std::pair<std::string, double>>;  ///< tag and value; a value that is not measured (NaN) is left out
  /// What files of earlier starts say of `first_step` and later is void from now on: readers drop it (SessionLog START).
  EventLog(std::string folder, int64_t first_step);

  void scalars(int64_t step, Scalars values);
  void histogram(int64_t step, const std::string& tag, const Histogram& histogram);
  const std::string& path() const { return path_; }

 private:
  void open();
  void write(int64_t step, const std::string& what);
  std::string folder_, path_;
  int64_t first_step_;
  std::unique_ptr<OutputFile> file_;
};

/// CRC-32C (Castagnoli) of the bytes.
uint32_t crc32c(std::string_view bytes);

}  // namespace mesa
