// Products of packed weights with COLUMNS columns of activations at a time: 1, 2, 4 or 8.
//
// A threadgroup takes a run of tiles of 16 rows; its simdgroups share out the run's blocks of 256 columns, in order and as
// many each, and add what they have of the same tile at the end, in the same order every time. A group's scale multiplies
// its sum.
#pragma once

#include "activations.metal"
#include "sums.metal"
#include "weight.metal"

namespace turboquant {

// What becomes of sums: times the activations' factors, plus one of ADDED rows, or the one row for all.
template <int ADDED, typename T, typename FACTORS>
struct Result {
  Device<T> out;
  FACTORS factors;
  Device<const T> added;
  uint rows;

  float scaled(float sum, uint output) const thread {
    return rounded<T>(sum * factors[output]);
  }

  void write(uint row, uint output, float value) const thread {
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

  TileRun(const thread Weight<BITS, GROUP>& all, const thread Decoder<BITS, true, NVIDIA>& decoding, uint group,
          uint groups, uint thread_index)
      : weight(all), decoder(decoding), index(thread_index), lane(thread_index % 32), pairs(all.tiles / EACH),
        tile(group * (pairs / groups) + least(group, pairs % groups)), count(pairs / groups + (group < pairs % groups ? 1 : 0)),
        share((EACH * count * all.blocks + SIMDGROUPS - 1) / SIMDGROUPS), begin(thread_index / 32 * share),
        end(least(begin + share, EACH * count * all.blocks)),
        next(all, begin / all.blocks + first_tile(begin / all.blocks, tile, count, pairs), begin % all.blocks, lane) {}

  // What is decoded first is on its way, and the decoder ready after a barrier.
  void start() thread {
    if (begin < end) {
      next.load();
    }
    decoder.template fill<THREADS>(index);
  }

  // Products with `columns` columns, whose outputs begin with `first`; partial (SIMDGROUPS, PIECES, 16, COLUMNS).
  template <int PARTS, typename T, typename X, typename RESULT>
  void multiply(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial, const thread RESULT& result,
                uint first, uint columns) thread {
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

  // What the number of tile j of a run is more than j; pairs come after all others.
  static uint first_tile(uint j, uint tile, uint count, uint pairs) {
    return tile + (PAIRED && j >= count ? pairs - count : 0);
  }

  // This simdgroup's sums, of one tile after the other. GROUP 0: one scale a row, applied at the end.
  template <typename X>
  void add_up(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial) thread {
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
        store(GROUP == 0 && RUNS == 1 ? group : total, partial, j + first_tile(j, tile, count, pairs));
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

  void store(const thread Sums<COLUMNS, NVIDIA>& total, Shared<float> partial, uint of_tile) const thread {
    Sums<COLUMNS, NVIDIA> sums = total;
    if (GROUP == 0) {
      sums.scale(load_pair(weight.scales() + (of_tile * 8 + lane / 4) * 2));
    }
    sums.store(partial, lane);
  }

  // Of a row of tile j and an output, over simdgroups and parts.
  template <int PARTS>
  float sum_of(Shared<float> partial, uint j, uint row, uint output) const thread {
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
  tiles.start();
  uint first = group_y * COLUMNS, end = first + COLUMNS < columns ? first + COLUMNS : columns;
  RowsOfLane<COLUMNS, NVIDIA, Device<const half>> rows(x, 32, held, first, end, index % 32);
  if (NVIDIA) {
    barrier();
  }
  tiles.template multiply<PARTS, T>(rows, partial, result, first / PARTS, end - first);
}

} // namespace turboquant
