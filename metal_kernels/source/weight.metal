// A packed weight in tiles of 16 rows and blocks of 256 columns, as a lane reads it.
#pragma once

#include "codes.metal"

namespace turboquant {

CONSTANT int COLUMNS_OF_BLOCK = 256;

// Scales of a row of a block; GROUP 0: one for the whole row.
constexpr int groups_of_block(int group) {
  return group == 0 ? 1 : COLUMNS_OF_BLOCK / group;
}

// A weight in one array: codes (tiles, blocks, 128 * BITS), scales, then a table to decode with and the rotation.
template <int BITS, int GROUP>
struct Weight {
  CONSTANT uint CODES = 128 * BITS, SCALES = 8 * groups_of_block(GROUP);
  uint tiles, blocks;
  Device<const uint> codes, words, fixed;

  Weight(Device<const uint> all, uint all_tiles, uint blocks_of_row)
      : tiles(all_tiles), blocks(blocks_of_row), codes(all), words(all + tiles * blocks * CODES),
        fixed(words + tiles * (GROUP ? blocks : 1) * SCALES) {}

  uint padded() const thread {
    return blocks * COLUMNS_OF_BLOCK;
  }

  Device<const half> scales() const thread {
    return as_halves(words);
  }

  // The weight of one of COUNT experts, whose tiles follow each other.
  template <int COUNT>
  Weight expert(uint which) const thread {
    Weight one = *this;
    one.tiles = tiles / COUNT;
    one.codes = codes + which * one.tiles * blocks * CODES;
    one.words = words + which * one.tiles * (GROUP ? blocks : 1) * SCALES;
    return one;
  }
};
// The pairs of scales (rows g and g + 8) of a lane for the groups of one block: scales (tiles, blocks, 8, groups, 2).
template <int GROUPS>
struct Scales {
  uint at[GROUPS];

  // `mine` is where those of rows g and g + 8 begin.
  void load(Device<const half> mine) thread {
    UNROLL
    for (int i = 0; i < GROUPS / 4; i++) {
      uint4 four = load4(mine + 8 * i);
      at[4 * i] = four.x;
      at[4 * i + 1] = four.y;
      at[4 * i + 2] = four.z;
      at[4 * i + 3] = four.w;
    }
    UNROLL
    for (int i = GROUPS / 4 * 4; i < GROUPS; i++) {
      at[i] = load_pair(mine + 2 * i);
    }
  }
};

// A lane's share of one block of one tile, and where to find the next.
template <int BITS, int GROUP>
struct Block {
  CONSTANT int GROUPS = groups_of_block(GROUP);
  Device<const uint> codes;
  Device<const half> factors;
  Words<BITS> words;
  Scales<GROUPS> scales;

  Block(const thread Weight<BITS, GROUP>& weight, uint tile, uint block, uint lane)
      : codes(weight.codes + (tile * weight.blocks + block) * (128 * BITS) + 4 * lane),
        factors(weight.scales() + ((GROUP ? tile * weight.blocks + block : tile) * 8 + lane / 4) * (2 * GROUPS)) {}

  void load() thread {
    words = load_words<BITS>(codes);
    scales.load(factors);
  }

  void advance(uint by) thread {
    codes = codes + by * (128 * BITS);
    factors = factors + (GROUP ? by * (16 * GROUPS) : 0);
  }
};
} // namespace turboquant
