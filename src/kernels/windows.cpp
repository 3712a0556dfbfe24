#include "mesa/kernels/windows.h"

namespace mesa::kernels {

void Windows::validate(int64_t tokens) const {
  check(window_height > 0 && window_width > 0 && height > 0 && width > 0 && height % window_height == 0 && width % window_width == 0,
        "windows of ", window_height, " x ", window_width, " do not tile a grid of ", height, " x ", width);
  check(this->tokens() < int64_t{1} << 31, "a grid of ", height, " x ", width, " has too many tokens for windows");
  check(shift_y >= 0 && shift_y < window_height && shift_x >= 0 && shift_x < window_width, "a shift by ", shift_y, " and ", shift_x,
        " must be less than the window of ", window_height, " x ", window_width);
  check(inner_height > 0 && inner_height <= height && inner_width > 0 && inner_width <= width, "a grid of ", height, " x ", width,
        " cannot hold ", inner_height, " x ", inner_width, " tokens");
  check(tokens == this->tokens(), "windows of a grid of ", height, " x ", width, " for ", tokens, " tokens");
}

}  // namespace mesa::kernels
