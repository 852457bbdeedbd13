// Products of packed weights with many columns of activations, on NVIDIA's Hopper.
//
// A warpgroup, four simdgroups, takes 64 rows, a tile a simdgroup, by COLUMNS columns; a team is WARPGROUPS of them, and a
// threadgroup has TEAMS, no more than blocks, which take every TEAMS-th block and add up their sums at the end. Weights are
// decoded and scaled in registers, two planes at a time, while the matrix units, in the background, multiply those before.
// Activations lie in device memory in pieces (activations.metal), which are copied whole, a unit to a stage, as soon as the
// unit before it there is done with; teams do not wait for each other.
#pragma once

#include "matmul.metal"

namespace turboquant {

#ifdef NVIDIA_INSTRUCTIONS
// Two of the sixteen planes of a block, scaled.
struct Planes {
  uint4 at[2];

  template <int BITS, int GROUP>
  void decode(const thread Block<BITS, GROUP>& block, int first, const thread Permuter<BITS>& decoder) thread {
    uint factors = block.scales.at[first / 2 * 32 / (GROUP ? GROUP : 256)];
    UNROLL
    for (int i = 0; i < 2; i++) {
      at[i] = scaled_plane<BITS, true>(block.words, first / 4, first % 4 + i, decoder, factors);
    }
    settle(at);
  }
};

// A team's units of COLUMNS columns of activations, those of every TEAMS-th block, numbered from 0 on.
template <int COLUMNS, int TEAMS>
struct Stages {
  CONSTANT int COUNT = 4, VECTORS = 8 * COLUMNS, PIECES = 64 * PIECE_ROWS;
  // Where the first unit's lie; the next one's come PIECES halves later.
  Device<const half> pieces;
  // Of this team, and of the team that has the most.
  uint units, most;
  Shared<uint4> staged;
  Shared<Arrival> arrivals;

  Stages(Device<const half> x, uint group, uint blocks, uint team, Shared<uint4> all_staged, Shared<Arrival> all_arrivals)
      : pieces(x + ((group * COLUMNS / PIECE_ROWS * blocks + team) * 4 * PIECES + group * COLUMNS % PIECE_ROWS * 64)),
        units(units_of(blocks, team)), most(units_of(blocks, 0)), staged(all_staged + team * (COUNT * VECTORS)),
        arrivals(all_arrivals + team * COUNT) {}

  // By one thread, a barrier before others wait.
  void begin() const thread {
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      set_up(arrivals + i);
    }
    set_ups_first();
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      ask(i);
    }
  }

  // By one thread: has a unit copied to a stage that all of the team are done with.
  void ask(uint number) const thread {
    if (number < units) {
      expect(arrivals + number % COUNT, 16 * VECTORS);
      copy(staged + number % COUNT * VECTORS, pieces + (number / 4 * (4 * TEAMS) + number % 4) * PIECES, 16 * VECTORS,
           arrivals + number % COUNT);
    }
  }

  Shared<uint4> wait(uint number) const thread {
    wait_for(arrivals + number % COUNT, number / COUNT % 2);
    return staged + number % COUNT * VECTORS;
  }

 private:
  // The first team has the most.
  static uint units_of(uint blocks, uint team) {
    return (blocks + (TEAMS - 1) - team) / TEAMS * 4;
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

  // Planes `first` and the next of a unit.
  void add(const thread Planes& planes, Shared<uint4> stage, int first) thread {
    begin_products();
    UNROLL
    for (int i = 0; i < 2; i++) {
      warpgroup_multiply(at, planes.at[i], stage, first + i);
    }
    end_products();
  }

  // Adds up the sums of SENDERS + 1 teams of THREADS threads in those of team 0; sent: COLUMNS / 2 values of each other thread.
  template <int SENDERS, int THREADS>
  void gather(Shared<float> sent, uint index) thread {
    if (index >= THREADS) {
      UNROLL
      for (int i = 0; i < COLUMNS / 2; i++) {
        sent[i * (SENDERS * THREADS) + (index - THREADS)] = at[i];
      }
    }
    barrier();
    if (index < THREADS) {
      UNROLL
      for (int i = 0; i < COLUMNS / 2; i++) {
        UNROLL
        for (int j = 0; j < SENDERS; j++) {
          at[i] += sent[i * (SENDERS * THREADS) + j * THREADS + index];
        }
      }
    }
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

// Adds the products of a simdgroup's tile and a team's blocks, of which `weights` is the first; index: in the team.
template <int SIMDGROUPS, int BITS, int GROUP, int COLUMNS, int TEAMS>
inline void add_blocks(thread WarpgroupSums<COLUMNS>& sums, const thread Stages<COLUMNS, TEAMS>& stages,
                       thread Block<BITS, GROUP>& weights, const thread Permuter<BITS>& decoder, uint team, uint index) {
  Block<BITS, GROUP> next = weights;
  Planes planes[2];
  planes[0].decode(weights, 0, decoder);
  Shared<uint4> stage = stages.staged;
  for (uint number = 0; number < stages.units; number += 4) {
    next.advance(TEAMS);
    if (number + 4 < stages.units) {
      next.load();
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
      uint unit = number + i / 2;
      if (i % 2 == 0) {
        stage = stages.wait(unit);
      }
      sums.add(planes[i % 2], stage, i % 2 * 2);
      if (i % 2 == 1 && unit > 0 && index == unit % SIMDGROUPS * 32) {
        // In turns, and while there are products to wait for.
        stages.ask(unit + 3);
      }
      wait_for_products<1>();
      if (i % 2 == 0) {
        // Whatever came before these products is done: the stage of the unit before is free.
        team_barrier<32 * SIMDGROUPS>(team);
      }
      if (i == 7) {
        weights = next;
      }
      planes[(i + 1) % 2].decode(weights, (2 * i + 2) % 16, decoder);
    }
  }
  wait_for_products<0>();
  if (TEAMS > 1 && stages.units < stages.most) {
    // As many barriers as the team with the most: where they differ NVIDIA's racecheck takes what teams write for unordered,
    // though all wait for each other before it is read.
    UNROLL
    for (int i = 0; i < 4; i++) {
      team_barrier<32 * SIMDGROUPS>(team);
    }
  }
}

// staged: 4 * 8 * COLUMNS vectors for each team; in the same memory, after them, sent: as `gather` says, and behind that
// results: COLUMNS / PARTS rows of 64 * WARPGROUPS values and 16 bytes, a gap against bank conflicts.
template <int BITS, int GROUP, int WARPGROUPS, int COLUMNS, int TEAMS, int PARTS, bool SCALED, typename T>
inline void warpgroup_matmul(Device<const half> x, const thread Factors<SCALED>& factors,
                             const thread Weight<BITS, GROUP>& weight, const thread Permuter<BITS>& decoder,
                             Device<T> out, Shared<uint4> staged, Shared<float> sent, Shared<T> results,
                             Shared<Arrival> arrivals, uint outputs, uint rows, uint group_x, uint group_y, uint index) {
  constexpr int ROWS = 64 * WARPGROUPS, STRIDE = ROWS + 16 / sizeof(T), THREADS = 128 * WARPGROUPS;
  uint team = TEAMS > 1 ? same_in_simdgroup(index / THREADS) : 0, mine = index - team * THREADS;
  uint tile = group_x * (4 * WARPGROUPS) + mine / 32;
  Block<BITS, GROUP> weights(weight, tile < weight.tiles ? tile : weight.tiles - 1, team, index % 32);
  Stages<COLUMNS, TEAMS> stages(x, group_y, weight.blocks, team, staged, arrivals);
  weights.load();
  if (mine == 0) {
    stages.begin();
  }
  WarpgroupSums<COLUMNS> sums;
  sums.clear();
  barrier();
  add_blocks<THREADS / 32>(sums, stages, weights, decoder, team, mine);
  barrier();
  if (TEAMS > 1) {
    sums.template gather<TEAMS - 1, THREADS>(sent, index);
  }
  uint first = group_y * (COLUMNS / PARTS);
  // NVIDIA's compiler takes sums for done after any wait for products, and may move what reads them ahead of the last wait. Not
  // past a branch, if it cannot know how that ends.
  if (same_in_simdgroup(team) == 0) {
    sums.template store<PARTS>(results, STRIDE, factors, first, outputs, index);
  }
  barrier();
  write_results<COLUMNS / PARTS, ROWS, TEAMS * THREADS>(results, STRIDE, out, group_x * ROWS, rows, first, outputs, index);
}
#endif

} // namespace turboquant
