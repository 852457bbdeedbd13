// Which expert's weight a threadgroup multiplies, and by which rows of the activations.
#pragma once

#include "matvec.metal"

namespace turboquant {

template <int BITS, int GROUP, int EXPERTS>
struct Share {
  uint tiles, blocks, expert, rows;
  // Of the expert's rows of activations: the first of all, how many, and which of their blocks is this threadgroup's.
  uint first, count, block;

  Share(uint all_tiles, uint blocks_of_row)
      : tiles(all_tiles / EXPERTS), blocks(blocks_of_row), expert(0), rows(0), first(0), count(0), block(0) {}

  Device<const uint> codes(Device<const uint> all) const {
    return all + expert * tiles * blocks * (128 * BITS);
  }

  Device<const half> scales(Device<const half> all) const {
    return all + expert * tiles * (GROUP ? blocks : 1) * (16 * groups_of_block(GROUP));
  }

  // Block `of_all` of the blocks of all experts, which first_blocks (EXPERTS + 1) counts; false beyond the last.
  bool find(Device<const uint> first_rows, Device<const uint> first_blocks, uint of_all) {
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
