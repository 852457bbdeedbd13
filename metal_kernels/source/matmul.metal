// Products of packed weights with many columns of activations, on matrix units.
//
// A threadgroup takes ROW_GROUPS * TILES * 16 rows by COLUMN_GROUPS * PIECES * 8 columns, one simdgroup for each pair
// of a row and a column group. A unit of 64 input columns at a time, weights are decoded and scaled in registers, in
// the matrix units' own order, and activations wait in threadgroup memory, the next unit's on their way meanwhile.
// The weight is never written anywhere.
#pragma once

#include "activations.metal"
#include "matrix.metal"
#include "weight.metal"

namespace turboquant {

// The activations of one unit, (COLUMNS, 8 vectors of 8 halves), in turns with the next one's in `tile`.
template <int COLUMNS, int THREADS, typename UNIT>
struct Staged {
  CONSTANT int EACH = COLUMNS * 8 / THREADS;
  uint4 at[EACH];

  void load(Device<const half> x, uint held, uint first, uint end, uint position, uint index) thread {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint vector = index + i * THREADS, row = first + vector / 8;
      at[i] = uint4{0, 0, 0, 0};
      if (row < end) {
        at[i] = load4(x + place_of<IN_RUNS>(row, position + 8 * (vector % 8), held));
      }
    }
  }

  void store(Shared<uint4> tile, uint index) thread {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint vector = index + i * THREADS;
      tile[UNIT::place(vector / 8, vector % 8)] = at[i];
    }
  }
};

// Plane q of a unit, each row times its scale.
template <int BITS, bool NVIDIA, typename DECODER>
inline uint4 scaled_plane(const thread Words<BITS>& words, int unit, int q, const thread DECODER& decoder, uint scales) {
  uint4 pairs = decoder.decode(words, unit, q);
  uint upper = MatrixUnit<NVIDIA>::twice(scales, false), lower = MatrixUnit<NVIDIA>::twice(scales, true);
  return uint4{multiply_pairs(pairs.x, upper), multiply_pairs(pairs.y, lower), multiply_pairs(pairs.z, upper),
               multiply_pairs(pairs.w, lower)};
}

template <int TILES, int PIECES>
struct Results {
  float at[TILES][PIECES][4];

  void clear() thread {
    UNROLL
    for (int i = 0; i < TILES * PIECES * 4; i++) {
      at[i / (4 * PIECES)][i / 4 % PIECES][i % 4] = 0;
    }
  }

  // Half a unit, two planes, of all tiles times all pieces.
  template <typename UNIT>
  void add(const thread uint4 (&planes)[2 * TILES], Shared<uint4> tile, uint first_column, int p, uint seat) thread {
    UNROLL
    for (int i = 0; i < PIECES; i++) {
      uint4 x = UNIT::operands(tile, first_column + 8 * i, uint(p), seat);
      UNROLL
      for (int j = 0; j < TILES; j++) {
        UNIT::multiply(at[j][i], planes[2 * j], x.x, x.y);
        UNIT::multiply(at[j][i], planes[2 * j + 1], x.z, x.w);
      }
    }
  }

  template <int PARTS, typename T, typename FACTORS>
  void write(Device<T> out, const thread FACTORS& factors, uint first_tile, uint rows, uint first, uint end, uint seat) thread {
    UNROLL
    for (int i = 0; i < TILES * PIECES * 2; i++) {
      uint row = 16 * (first_tile + i / (2 * PIECES)) + seat / 4 + 8 * (i % 2);
      uint column = first + 8 * (i / 2 % PIECES) + 2 * (seat % 4);
      float one = at[i / (2 * PIECES)][i / 2 % PIECES][2 * (i % 2)];
      float two = at[i / (2 * PIECES)][i / 2 % PIECES][2 * (i % 2) + 1];
      if (PARTS == 2 && row < rows && column < end) {
        out[column / 2 * rows + row] = static_cast<T>((one + two) * factors[column / 2]);
      }
      if (PARTS == 1 && row < rows && column < end) {
        out[column * rows + row] = static_cast<T>(one * factors[column]);
      }
      if (PARTS == 1 && row < rows && column + 1 < end) {
        out[(column + 1) * rows + row] = static_cast<T>(two * factors[column + 1]);
      }
    }
  }
};

// Of x, `columns` of the `held` rows that lie there.
template <int BITS, int GROUP, int TILES, int PIECES, int ROW_GROUPS, int COLUMN_GROUPS, int PARTS, bool NVIDIA,
          bool SCALED, typename T>
inline void matmul(Device<const half> x, const thread Factors<SCALED>& restoring, const thread Weight<BITS, GROUP>& weight,
                   const thread Decoder<BITS, false, NVIDIA>& decoder, Device<T> out, Shared<uint4> staged, uint held,
                   uint columns, uint rows, uint group_x, uint group_y, uint index) {
  constexpr int COLUMNS = 8 * PIECES * COLUMN_GROUPS, THREADS = 32 * ROW_GROUPS * COLUMN_GROUPS;
  constexpr int EACH = GROUP ? GROUP : 256;
  using Unit = MatrixUnit<NVIDIA>;
  uint simdgroup = index / 32, seat = Unit::seat(index % 32);
  uint first_tile = (group_x * ROW_GROUPS + simdgroup / COLUMN_GROUPS) * TILES;
  uint first = group_y * COLUMNS, mine = simdgroup % COLUMN_GROUPS * 8 * PIECES;
  uint tiles = weight.tiles, blocks = weight.blocks;
  Results<TILES, PIECES> results;
  results.clear();
  uint second_tile = first_tile + 1 < tiles ? first_tile + 1 : tiles - 1;
  Block<BITS, GROUP> next[2] = {
      Block<BITS, GROUP>(weight, first_tile < tiles ? first_tile : tiles - 1, 0, seat),
      Block<BITS, GROUP>(weight, second_tile, 0, seat)};
  UNROLL
  for (int j = 0; j < TILES; j++) {
    next[j].load();
  }
  decoder.template fill<THREADS>(index);
  Staged<COLUMNS, THREADS, Unit> coming;
  coming.load(x, held, first, columns, 0, index);
  coming.store(staged, index);
  barrier();
  for (uint block = 0; block < blocks; block++) {
    Words<BITS> words[TILES];
    Scales<Block<BITS, GROUP>::GROUPS> factors[TILES];
    UNROLL
    for (int j = 0; j < TILES; j++) {
      words[j] = next[j].words;
      factors[j] = next[j].scales;
      next[j].advance(1);
      if (block + 1 < blocks) {
        next[j].load();
      }
    }
    loads_first();
    UNROLL
    for (int unit = 0; unit < 4; unit++) {
      bool more = unit < 3 || block + 1 < blocks;
      if (more) {
        coming.load(x, held, first, columns, block * 256 + 64 * (unit + 1), index);
        loads_first();
      }
      UNROLL
      for (int p = 0; p < 2; p++) {
        uint4 planes[2 * TILES];
        UNROLL
        for (int j = 0; j < 2 * TILES; j++) {
          uint factor = factors[j / 2].at[(64 * unit + 32 * p) / EACH];
          planes[j] = scaled_plane<BITS, NVIDIA>(words[j / 2], unit, 2 * p + j % 2, decoder, factor);
        }
        results.template add<Unit>(planes, staged + unit % 2 * COLUMNS * 8, mine, p, seat);
      }
      if (more) {
        coming.store(staged + (unit + 1) % 2 * COLUMNS * 8, index);
      }
      barrier();
    }
  }
  results.template write<PARTS, T>(out, restoring, first_tile, rows, first + mine, columns, seat);
}

} // namespace turboquant
