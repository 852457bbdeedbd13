// Which expert's weight a threadgroup multiplies, and by which rows of the activations.
#pragma once

namespace turboquant {

template <int EXPERTS>
struct Share {
  uint expert;
  // Of the expert's rows of activations: the first of all, how many, and which of their blocks is this threadgroup's.
  uint first, count, block;

  // Block `of_all` of the blocks of all experts, which first_blocks (EXPERTS + 1) counts; false beyond the last.
  bool find(Device<const uint> first_rows, Device<const uint> first_blocks, uint of_all) thread {
    if (of_all >= first_blocks[EXPERTS]) {
      return false;
    }
    uint low = 0, high = EXPERTS;
    while (high - low > 1) {
      uint middle = (low + high) / 2;
      if (first_blocks[middle] <= of_all) {
        low = middle;
      } else {
        high = middle;
      }
    }
    expert = low;
    first = first_rows[low];
    count = first_rows[low + 1] - first;
    block = of_all - first_blocks[low];
    return true;
  }
};

} // namespace turboquant
