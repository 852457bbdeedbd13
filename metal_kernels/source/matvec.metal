// Products of packed weights with COLUMNS columns of activations at a time: 1, 2, 4 or 8.
//
// A threadgroup takes a run of tiles of 16 rows; its simdgroups share out the run's blocks of 256 columns, in order and as
// many each, and add what they have of the same tile at the end, in the same order every time. Activations come as
// halves, rows of whole blocks: a "column" of the product is one such row; with PARTS = 2 two of them, high and low part,
// make one. Sums are float, and a group's scale multiplies its sum.
#pragma once

#include "activations.metal"
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

  uint padded() const {
    return blocks * COLUMNS_OF_BLOCK;
  }

  Device<const half> scales() const {
    return as_halves(words);
  }

  // The weight of one of COUNT experts, whose tiles follow each other.
  template <int COUNT>
  Weight expert(uint which) const {
    Weight one = *this;
    one.tiles = tiles / COUNT;
    one.codes = codes + which * one.tiles * blocks * CODES;
    one.words = words + which * one.tiles * (GROUP ? blocks : 1) * SCALES;
    return one;
  }
};

// NVIDIA's matrix units have eight columns. Where there are fewer rows of activations, several runs of 32 of their values
// take them side by side: lane (g, t) loads those of row g % COLUMNS and of run g / COLUMNS, and of the products only those
// count whose column belongs to the run that the weights are of.
template <int COLUMNS, bool NVIDIA>
constexpr int runs_of_load() {
  return NVIDIA ? 8 / COLUMNS : 1;
}

// Where the rows of x that a lane reads begin; the last row stands in for those beyond it, whose results are dropped.
// X points to a device's or a threadgroup's memory, rows `stride` apart and 32 columns, a run, `step` for each of them.
template <int COLUMNS, bool NVIDIA, typename X>
struct RowsOfLane {
  CONSTANT int EACH = NVIDIA ? 1 : COLUMNS;
  X x;
  uint step, offsets[EACH];

  RowsOfLane(X all, uint stride, uint run_step, uint first, uint end, uint lane)
      : x(all + 8 * (lane % 4)), step(run_step) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint row = first + (NVIDIA ? lane / 4 % COLUMNS : i), run = NVIDIA ? lane / 4 / COLUMNS : 0;
      offsets[i] = (row < end ? row : end - 1) * stride + run * step * 32;
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Activations {
  uint4 at[COLUMNS];

  // Columns 32p + 8t to 32p + 8t + 7 of a unit, `position` of them before it; rows as in RowsOfLane.
  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, NVIDIA, X>& rows, uint position) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] = load4(rows.x + rows.offsets[i] + position * rows.step);
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Sums {
  CONSTANT int VALUES = 2 * COLUMNS;
  float at[VALUES];

  void clear() {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] = 0;
    }
  }

  // Plane q's matrix times the activations.
  void add(uint4 pairs, const thread Activations<COLUMNS, NVIDIA>& x, int q) {
    uint4 w = pairs;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      uint x0 = q % 2 ? x.at[i].z : x.at[i].x, x1 = q % 2 ? x.at[i].w : x.at[i].y;
      at[i] += low(w.x) * low(x0) + high(w.x) * high(x0) + low(w.z) * low(x1) + high(w.z) * high(x1);
      at[COLUMNS + i] += low(w.y) * low(x0) + high(w.y) * high(x0) + low(w.w) * low(x1) + high(w.w) * high(x1);
    }
  }

  // The sums of run `run` of a block, times the scales of rows g and g + 8.
  void add_scaled(const thread Sums<COLUMNS, NVIDIA>& other, uint scales, int, uint) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] += low(scales) * other.at[i];
      at[COLUMNS + i] += high(scales) * other.at[COLUMNS + i];
    }
  }

  void scale(uint scales) {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] *= i < COLUMNS ? low(scales) : high(scales);
    }
  }

  // To partial (16, COLUMNS); the four lanes of a row have a quarter of its columns each.
  void store(Shared<float> partial, uint lane) {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] += shuffle_xor(at[i], 1);
      at[i] += shuffle_xor(at[i], 2);
    }
    if (lane % 4 == 0) {
      UNROLL
      for (int i = 0; i < COLUMNS; i++) {
        partial[(lane / 4) * COLUMNS + i] = at[i];
        partial[(lane / 4 + 8) * COLUMNS + i] = at[COLUMNS + i];
      }
    }
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <int COLUMNS>
struct Activations<COLUMNS, true> {
  uint4 at;

  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, true, X>& rows, uint position) {
    at = load4(rows.x + rows.offsets[0] + position * rows.step);
  }
};

// The matrix unit's own spread of the 16 x 8 sums: rows g and g + 8, columns 2t and 2t + 1.
template <int COLUMNS>
struct Sums<COLUMNS, true> {
  CONSTANT int RUNS = runs_of_load<COLUMNS, true>(), LANES = COLUMNS > 2 ? COLUMNS / 2 : 1;
  float at[4];

  void clear() {
    UNROLL
    for (int i = 0; i < 4; i++) {
      at[i] = 0;
    }
  }

  void add(uint4 pairs, const thread Activations<COLUMNS, true>& x, int q) {
    matrix_multiply(at, pairs, q % 2 ? x.at.z : x.at.x, q % 2 ? x.at.w : x.at.y);
  }

  // Columns of lanes whose run this is not are another run's weights times this one's activations.
  void add_scaled(const thread Sums<COLUMNS, true>& other, uint scales, int run, uint lane) {
    if (RUNS == 1 || lane % 4 / LANES == uint(run % RUNS * COLUMNS / (2 * LANES))) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        if (COLUMNS > 1 || i % 2 == 0) {
          at[i] += (i < 2 ? low(scales) : high(scales)) * other.at[COLUMNS > 1 ? i : i + run % 2];
        }
      }
    }
  }

  void scale(uint scales) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      at[i] *= i < 2 ? low(scales) : high(scales);
    }
  }

  void store(Shared<float> partial, uint lane) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      UNROLL
      for (int distance = LANES; distance < 4; distance *= 2) {
        at[i] += shuffle_xor(at[i], distance);
      }
      int column = 2 * (lane % 4) + i % 2;
      if (column < COLUMNS) {
        partial[(lane / 4 + i / 2 * 8) * COLUMNS + column] = at[i];
      }
    }
  }
};
#endif

// The pairs of scales (rows g and g + 8) of a lane for the groups of one block: scales (tiles, blocks, 8, groups, 2).
template <int GROUPS>
struct Scales {
  uint at[GROUPS];

  // `mine` is where those of rows g and g + 8 begin.
  void load(Device<const half> mine) {
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

  void load() {
    words = load_words<BITS>(codes);
    scales.load(factors);
  }

  void advance(uint by) {
    codes = codes + by * (128 * BITS);
    factors = factors + (GROUP ? by * (16 * GROUPS) : 0);
  }
};

// What becomes of sums: times the activations' factors, plus one of ADDED rows, or the one row for all.
template <int ADDED, typename T, typename FACTORS>
struct Result {
  Device<T> out;
  FACTORS factors;
  Device<const T> added;
  uint rows;

  float scaled(float sum, uint output) const {
    return rounded<T>(sum * factors[output]);
  }

  void write(uint row, uint output, float value) const {
    if (row < rows) {
      float more = ADDED > 0 ? static_cast<float>(added[(ADDED > 1 ? output : 0) * rows + row]) : 0;
      out[output * rows + row] = static_cast<T>(value + more);
    }
  }
};

// The tiles of threadgroup `group` of all, and the blocks of them that a simdgroup takes, of at most PIECES of them. PAIRED:
// with each tile comes its pair from the second half of all, and gate(first, second) is the result.
template <int BITS, int GROUP, int SIMDGROUPS, int PIECES, int COLUMNS, bool NVIDIA, bool PAIRED>
struct TileRun {
  CONSTANT uint EACH = PAIRED ? 2 : 1, PIECE = 16 * COLUMNS, THREADS = 32 * SIMDGROUPS;
  Weight<BITS, GROUP> weight;
  Decoder<BITS, true, NVIDIA> decoder;
  // Where pairs begin, the first tile, and how many; blocks of a simdgroup, the first of this one and its end.
  uint index, lane, pairs, tile, count, share, begin, end;
  Block<BITS, GROUP> next;

  // What is decoded first is on its way, and the decoder ready after a barrier.
  TileRun(const thread Weight<BITS, GROUP>& all, const thread Decoder<BITS, true, NVIDIA>& decoding, uint group,
          uint groups, uint thread_index)
      : weight(all), decoder(decoding), index(thread_index), lane(thread_index % 32), pairs(all.tiles / EACH),
        tile(group * (pairs / groups) + least(group, pairs % groups)), count(pairs / groups + (group < pairs % groups ? 1 : 0)),
        share((EACH * count * all.blocks + SIMDGROUPS - 1) / SIMDGROUPS),
        begin(thread_index / 32 * share), end(least(begin + share, EACH * count * all.blocks)),
        next(all, tile_at(begin / all.blocks), begin % all.blocks, lane) {
    if (begin < end) {
      next.load();
    }
    decoder.template fill<THREADS>(index);
  }

  // Products with `columns` columns, whose outputs begin with `first`; partial (SIMDGROUPS, PIECES, 16, COLUMNS).
  template <int PARTS, typename T, typename X, typename RESULT>
  void multiply(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial, const thread RESULT& result,
                uint first, uint columns) {
    add_up(x, partial + index / 32 * (PIECES * PIECE));
    barrier();
    uint outputs = columns / PARTS;
    for (uint i = index; i < 16 * outputs * count; i += THREADS) {
      uint row = i % 16, output = i / 16 % outputs, j = i / 16 / outputs;
      float value = result.scaled(sum_of<PARTS>(partial, j, row, output), first + output);
      if (PAIRED) {
        value = gate<T>(value, result.scaled(sum_of<PARTS>(partial, count + j, row, output), first + output));
      }
      result.write(16 * (tile + j) + row, first + output, value);
    }
  }

 private:
  static uint least(uint a, uint b) {
    return a < b ? a : b;
  }

  // Tile j of the run, pairs after all others.
  uint tile_at(uint j) const {
    return tile + (PAIRED && j >= count ? pairs - count : 0) + j;
  }

  // This simdgroup's sums, of one tile after the other. GROUP 0: one scale a row, applied at the end.
  template <typename X>
  void add_up(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial) {
    constexpr int RUNS = runs_of_load<COLUMNS, NVIDIA>(), EACH_GROUP = GROUP ? GROUP : COLUMNS_OF_BLOCK;
    constexpr int LOADS = 8 / RUNS, AHEAD = NVIDIA && LOADS > 1 ? 2 : 1;
    constexpr uint ONES = 0x3c003c00u;
    uint j = begin / weight.blocks, block = begin % weight.blocks;
    Sums<COLUMNS, NVIDIA> total, group;
    total.clear();
    group.clear();
    Activations<COLUMNS, NVIDIA> now, coming[AHEAD];
    UNROLL
    for (int i = 0; i < AHEAD; i++) {
      if (begin < end) {
        coming[i].load(x, block * COLUMNS_OF_BLOCK + i * (32 * RUNS));
      }
    }
    for (uint at = begin; at < end; at++) {
      bool more = at + 1 < end, ends = block + 1 == weight.blocks;
      uint after = ends ? 0 : block + 1;
      Words<BITS> words = next.words;
      Scales<Block<BITS, GROUP>::GROUPS> factors = next.scales;
      next.advance(PAIRED && ends && j + 1 == count ? (pairs - count) * weight.blocks + 1 : 1);
      if (more) {
        next.load();
      }
      UNROLL
      for (int run = 0; run < 8; run++) {
        if (run % RUNS == 0) {
          int later = run + AHEAD * RUNS, place = run / RUNS % AHEAD;
          now = coming[place];
          if (later < 8 || more) {
            coming[place].load(x, (later < 8 ? block : after) * COLUMNS_OF_BLOCK + 32 * (later % 8));
          }
          loads_first();
        }
        UNROLL
        for (int half_run = 0; half_run < 2; half_run++) {
          group.add(decoder.decode(words, run / 2, 2 * (run % 2) + half_run), now, half_run);
        }
        if (RUNS > 1 || (GROUP != 0 && 32 * (run + 1) % EACH_GROUP == 0)) {
          total.add_scaled(group, GROUP ? factors.at[32 * run / EACH_GROUP] : ONES, run, lane);
          group.clear();
        }
      }
      if (ends || !more) {
        store(GROUP == 0 && RUNS == 1 ? group : total, partial, tile_at(j));
        total.clear();
        if (GROUP == 0 && RUNS == 1) {
          group.clear();
        }
        partial = partial + PIECE;
        j++;
      }
      block = after;
    }
  }

  void store(const thread Sums<COLUMNS, NVIDIA>& total, Shared<float> partial, uint of_tile) const {
    Sums<COLUMNS, NVIDIA> sums = total;
    if (GROUP == 0) {
      sums.scale(load_pair(weight.scales() + (of_tile * 8 + lane / 4) * 2));
    }
    sums.store(partial, lane);
  }

  // Of a row of tile j and an output, over simdgroups and parts.
  template <int PARTS>
  float sum_of(Shared<float> partial, uint j, uint row, uint output) const {
    uint from = j * weight.blocks;
    float sum = 0;
    for (uint s = from / share; s * share < from + weight.blocks; s++) {
      uint piece = s * PIECES + j - s * share / weight.blocks;
      UNROLL
      for (int part = 0; part < PARTS; part++) {
        sum += partial[piece * PIECE + row * COLUMNS + output * PARTS + part];
      }
    }
    return sum;
  }
};

// Columns `group_y` of x, made ready before as some of `held`, times a weight.
template <int BITS, int GROUP, int SIMDGROUPS, int PIECES, int PARTS, int COLUMNS, bool NVIDIA, typename T, typename RESULT>
inline void matvec(Device<const half> x, const thread Weight<BITS, GROUP>& weight,
                   const thread Decoder<BITS, true, NVIDIA>& decoder, const thread RESULT& result, Shared<float> partial,
                   uint held, uint columns, uint group_x, uint groups, uint group_y, uint index) {
  TileRun<BITS, GROUP, SIMDGROUPS, PIECES, COLUMNS, NVIDIA, false> tiles(weight, decoder, group_x, groups, index);
  uint first = group_y * COLUMNS, end = first + COLUMNS < columns ? first + COLUMNS : columns;
  RowsOfLane<COLUMNS, NVIDIA, Device<const half>> rows(x, 32, held, first, end, index % 32);
  if (NVIDIA) {
    barrier();
  }
  tiles.template multiply<PARTS, T>(rows, partial, result, first / PARTS, end - first);
}

} // namespace turboquant
