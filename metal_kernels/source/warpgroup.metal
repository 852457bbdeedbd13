// Products of packed weights with many columns of activations, on NVIDIA's Hopper.
//
// A warpgroup, four simdgroups, takes 64 rows, a tile a simdgroup, by COLUMNS columns; a threadgroup has WARPGROUPS of
// them. COUNT planes at a time, weights are decoded and scaled in registers while the matrix units, in the background,
// multiply the planes before. Activations lie in device memory in pieces (hadamard.metal), which are copied whole: unit
// u of each block to stage u, asked for as soon as the unit before it in that stage is done.
#pragma once

#include "matmul.metal"

namespace turboquant {

#ifdef NVIDIA_INSTRUCTIONS
// COUNT of the sixteen planes of a block, scaled.
template <int COUNT>
struct Planes {
  uint4 at[COUNT];

  template <int BITS, int GROUP>
  void decode(const thread Block<BITS, GROUP>& block, int first, const thread Permuter<BITS>& decoder) thread {
    constexpr int EACH = GROUP ? GROUP : 256;
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      uint factors = block.scales.at[(first + i) / 2 * 32 / EACH];
      at[i] = scaled_plane<BITS, true>(block.words, (first + i) / 4, (first + i) % 4, decoder, factors);
    }
    settle(at);
  }
};

// Four units of COLUMNS columns of activations, whose pieces begin at `pieces`, and a row of pieces after `stride`.
template <int COLUMNS>
struct Stages {
  CONSTANT int VECTORS = 8 * COLUMNS, PIECE = 64 * 64;
  Device<const half> pieces;
  uint stride;
  Shared<uint4> staged;
  Shared<Arrival> arrived;

  // By one thread, a barrier before others wait.
  void begin() const thread {
    UNROLL
    for (int i = 0; i < 4; i++) {
      set_up(arrived + i);
    }
    UNROLL
    for (int i = 0; i < 3; i++) {
      ask(i);
    }
  }

  // By one thread.
  void ask(uint unit) const thread {
    expect(arrived + unit % 4, 16 * VECTORS);
    UNROLL
    for (int i = 0; i < COLUMNS / 64; i++) {
      copy(stage(unit) + i * (PIECE / 8), pieces + i * stride + unit * PIECE, 2 * PIECE, arrived + unit % 4);
    }
  }

  // What takes the place of the unit before.
  void ask_later(uint unit, uint units, uint index) const thread {
    if (index == 0 && unit + 3 < units) {
      ask(unit + 3);
    }
  }

  void wait(uint unit) const thread {
    wait_for(arrived + unit % 4, unit / 4 % 2);
  }

  Shared<uint4> stage(uint unit) const thread {
    return staged + unit % 4 * VECTORS;
  }
};

// Sums of a warpgroup's rows and COLUMNS columns, spread over lanes as in matrix.metal.
template <int COLUMNS>
struct WarpgroupSums {
  float at[COLUMNS / 2];

  void clear() thread {
    UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
      at[i] = 0;
    }
  }

  // Planes `first` and those after it of a unit.
  template <int COUNT>
  void add(const thread Planes<COUNT>& planes, Shared<uint4> stage, int first) thread {
    begin_products();
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      warpgroup_multiply(at, planes.at[i], stage, first + i);
    }
    end_products();
  }

  // Results of one thread to `results` (COLUMNS / PARTS, stride), their first output `first`.
  template <int PARTS, typename T, typename FACTORS>
  void store(Shared<T> results, int stride, const thread FACTORS& factors, uint first, uint end, uint index) const thread {
    uint row = index / 32 * 16 + index % 32 / 4;
    UNROLL
    for (int i = 0; i < COLUMNS / PARTS / 4; i++) {
      // With two parts, the two columns that a thread has of each piece of eight are one output.
      uint output = PARTS == 2 ? 4 * i + index % 4 : 8 * (i / 2) + 2 * (index % 4) + i % 2;
      float factor = factors[first + output < end ? first + output : end - 1];
      UNROLL
      for (int half_tile = 0; half_tile < 2; half_tile++) {
        int from = PARTS == 2 ? 4 * i + 2 * half_tile : 4 * (i / 2) + i % 2 + 2 * half_tile;
        float sum = PARTS == 2 ? at[from] + at[from + PARTS - 1] : at[from];
        results[output * stride + row + 8 * half_tile] = static_cast<T>(sum * factor);
      }
    }
  }
};

// From results (outputs, stride) to out (outputs of all, rows), from row first_row and output `first` on.
template <int OUTPUTS, int ROWS, int THREADS, typename T>
inline void write_results(Shared<T> results, int stride, Device<T> out, uint first_row, uint rows, uint first,
                          uint end, uint index) {
  constexpr uint EACH = 16 / sizeof(T);
  for (uint i = index; i < OUTPUTS * ROWS / EACH; i += THREADS) {
    uint output = i / (ROWS / EACH), row = i % (ROWS / EACH) * EACH;
    Shared<T> from = results + output * stride + row;
    Device<T> to = out + (first + output) * rows + first_row + row;
    if (first + output < end && rows % EACH == 0 && first_row + row < rows) {
      copy_vector(to, from);
    } else if (first + output < end) {
      for (uint j = 0; j < EACH && first_row + row + j < rows; j++) {
        to[j] = from[j];
      }
    }
  }
}

// staged: 4 * 8 * COLUMNS vectors; in the same memory, after them, results: COLUMNS / PARTS rows of 64 * WARPGROUPS
// values and 16 bytes, a gap against bank conflicts.
template <int BITS, int GROUP, int WARPGROUPS, int COLUMNS, int COUNT, int PARTS, bool SCALED, typename T>
inline void warpgroup_matmul(Device<const half> x, const thread Factors<SCALED>& factors,
                             const thread Weight<BITS, GROUP>& weight, const thread Permuter<BITS>& decoder,
                             Device<T> out, Shared<uint4> staged, Shared<T> results, Shared<Arrival> arrived,
                             uint outputs, uint rows, uint group_x, uint group_y, uint index) {
  constexpr int ROWS = 64 * WARPGROUPS, STRIDE = ROWS + 16 / sizeof(T);
  uint tile = group_x * (4 * WARPGROUPS) + index / 32, tiles = weight.tiles, blocks = weight.blocks, units = 4 * blocks;
  Block<BITS, GROUP> weights(weight, tile < tiles ? tile : tiles - 1, 0, index % 32), next = weights;
  weights.load();
  Stages<COLUMNS> stages{x + group_y * COLUMNS * (64 * units), 64 * 64 * units, staged, arrived};
  if (index == 0) {
    stages.begin();
  }
  WarpgroupSums<COLUMNS> sums;
  sums.clear();
  Planes<COUNT> planes[2];
  barrier();
  planes[0].decode(weights, 0, decoder);
  for (uint block = 0; block < blocks; block++) {
    UNROLL
    for (int first = 0; first < 16; first += COUNT) {
      uint unit = 4 * block + first / 4;
      if (first % 4 == 0) {
        stages.wait(unit);
      }
      sums.add(planes[first / COUNT % 2], staged + first / 4 * (8 * COLUMNS), first % 4);
      if (COUNT < 4 && first % 4 > 0) {
        // While there are products to wait for.
        stages.ask_later(unit, units, index);
      }
      wait_for_products<1>();
      if (first % 4 == 0) {
        // Whatever came before these products is done: the stage of the unit before is free.
        barrier();
        if (COUNT == 4) {
          stages.ask_later(unit, units, index);
        }
      }
      if (first == 8) {
        next.advance(1);
        if (block + 1 < blocks) {
          next.load();
        }
      }
      if (first + COUNT == 16) {
        weights = next;
      }
      planes[(first / COUNT + 1) % 2].decode(weights, (first + COUNT) % 16, decoder);
    }
  }
  wait_for_products<0>();
  barrier();
  uint first = group_y * (COLUMNS / PARTS);
  sums.template store<PARTS>(results, STRIDE, factors, first, outputs, index);
  barrier();
  write_results<COLUMNS / PARTS, ROWS, 128 * WARPGROUPS>(results, STRIDE, out, group_x * ROWS, rows, first, outputs,
                                                         index);
}
#endif

} // namespace turboquant
