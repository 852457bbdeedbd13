// Products of few rows of activations, as they come, with a weight in tiles: every threadgroup turns all rows, into
// threadgroup memory, while its first codes are on their way, and then takes one tile after the other.
#pragma once

#include "hadamard.metal"
#include "matvec.metal"

namespace turboquant {

// Where turned rows lie: (rows * PARTS, STRIDE) halves, and the factors that restore them. The gap after each row keeps
// two rows out of the same banks.
template <int PADDED>
struct Ready {
  CONSTANT uint STRIDE = PADDED + 32;
  Shared<half> halves;
  Shared<float> factors;
};

// What turning takes: threads, those of a team that turns one block, and values that change places at the same time.
template <int ODD, int POWER, int THREADS, int AT_ONCE, bool TRANSFORM>
struct Turning {
  CONSTANT int SIZE = ODD * POWER, TEAM = POWER < THREADS ? POWER : THREADS;
  CONSTANT int COUNT = THREADS / TEAM, SCRATCH = scratch_of<POWER, TEAM, AT_ONCE>();
  template <int KIND>
  using Mine = Turn<ODD, POWER, TEAM, TRANSFORM, KIND>;
};

// Turns `rows` rows of x. numbers: four floats for each simdgroup.
template <typename TURNING, int THREADS, int AT_ONCE, int PARTS, bool SCALED, int KIND, int WIDTH, int PADDED, typename T>
inline void make_ready(Device<const T> x, Device<const T> weights, float eps, Device<const uint> signs,
                       const thread Ready<PADDED>& ready, Shared<float> scratch, Shared<float> numbers, uint rows,
                       uint index) {
  using Mine = typename TURNING::template Mine<KIND>;
  constexpr uint BLOCKS = WIDTH / TURNING::SIZE, ROUNDS = (BLOCKS + TURNING::COUNT - 1) / TURNING::COUNT;
  constexpr uint STRIDE = Ready<PADDED>::STRIDE, SPARE = PADDED - WIDTH;
  constexpr bool MEASURED = SCALED || KIND == NORMED;
  uint team = index / TURNING::TEAM, place = index % TURNING::TEAM;
  // The first team of the simdgroup: without a block for it there is nothing to do.
  uint leader = TURNING::TEAM < 32 ? index / 32 * 32 / TURNING::TEAM : team;
  // One row's registers at a time.
  ROLLED
  for (uint r = 0; r < rows; r++) {
    Row<KIND, T> row{x + r * WIDTH, weights, WIDTH};
    Measure all{0, 0};
    Mine mine;
    if (ROUNDS == 1 && leader < BLOCKS) {
      mine.load(row, signs, team < BLOCKS ? team * TURNING::SIZE : 0, place);
      if (team < BLOCKS) {
        mine.measure(all);
      }
    } else if (ROUNDS > 1 && MEASURED) {
      row.template measure<THREADS>(all, index);
    }
    if (MEASURED) {
      all = over_threads<THREADS, KIND == NORMED>(all, numbers + r % 2 * (THREADS / 16), index);
    }
    float normal = KIND == NORMED ? 1 / sqrt(all.squares / WIDTH + eps) : 1.0f;
    uint exponent = SCALED ? scale_exponent(all.most * normal / Mine::norm()) : 127;
    Target<PARTS, IN_ROWS, half, Shared<half>> target{
        ready.halves, r, STRIDE, bits_float(exponent << 23) * Mine::norm()};
    ROLLED
    for (uint round = 0; round < ROUNDS; round++) {
      uint block = team + round * TURNING::COUNT, start = block < BLOCKS ? block * TURNING::SIZE : 0;
      bool busy = leader + round * TURNING::COUNT < BLOCKS;
      if (ROUNDS > 1 && busy) {
        mine.load(row, signs, start, place);
      }
      if (TURNING::TEAM > 32 && (round > 0 || (!MEASURED && r > 0))) {
        barrier();
      }
      if (busy) {
        mine.flip(row, normal);
      }
      mine.template transform<AT_ONCE>(scratch + team * TURNING::SCRATCH, place, busy);
      if (block < BLOCKS) {
        mine.write(target, start, place);
      }
    }
    if (index == 0) {
      ready.factors[r] = bits_float((254u - exponent) << 23);
    }
  }
  for (uint i = index; i < rows * PARTS * SPARE; i += THREADS) {
    ready.halves[i % (rows * PARTS) * STRIDE + WIDTH + i / (rows * PARTS)] = static_cast<half>(0.0f);
  }
  barrier();
}

// TEAMS tiles at a time times the rows that are ready, each tile by SLICES simdgroups: tile `group`, and every THREADGROUPS-th
// after it. PAIRED: the first half of the tiles are gates of the second, and gate(first, second) is the result.
template <int BITS, int GROUP, int SLICES, int TEAMS, int PARTS, int COLUMNS, bool NVIDIA, bool PAIRED,
          int THREADGROUPS, int PADDED, typename T>
struct TileWalk {
  CONSTANT uint BLOCKS = PADDED / COLUMNS_OF_BLOCK, EACH = PAIRED ? 2 : 1, PARTIAL = SLICES * 16 * COLUMNS;
  CONSTANT uint STEP = THREADGROUPS * TEAMS;
  Block<BITS, GROUP> next;
  Decoder<BITS, true, NVIDIA> decoder;
  Weight<BITS, GROUP> weight;
  uint end, tile, team, slice, lane;

  TileWalk(const thread Weight<BITS, GROUP>& all, const thread Decoder<BITS, true, NVIDIA>& table, uint group, uint index)
      : next(all, group + index / (32 * SLICES) * THREADGROUPS, index / 32 % SLICES, index % 32),
        decoder(table), weight(all), end(all.tiles / EACH),
        tile(group + index / (32 * SLICES) * THREADGROUPS), team(index / (32 * SLICES)), slice(index / 32 % SLICES),
        lane(index % 32) {
    if (slice < BLOCKS && tile < end) {
      next.load();
    }
    decoder.template fill<32 * SLICES * TEAMS>(index);
  }

  // One team's sums of tile `tile`, and of its pair, to `partial`; what comes after them is on its way.
  void add_up(const thread RowsOfLane<COLUMNS, NVIDIA, Shared<half>>& x, Shared<float> partial) {
    UNROLL
    for (uint j = 0; j < EACH; j++) {
      bool paired = j + 1 < EACH;
      uint wanted = tile + (paired ? end : STEP);
      Sums<COLUMNS, NVIDIA> total;
      total.clear();
      multiply_blocks<BITS, GROUP, SLICES>(next, x, decoder, slice, BLOCKS, lane, paired || wanted < end,
                                           Block<BITS, GROUP>::place_of(weight, wanted, slice, lane), total);
      store_sums<GROUP>(total, weight.scales(), partial + j * PARTIAL, tile + j * end, slice, lane);
    }
  }

  // partial (TEAMS, EACH, SLICES, 16, COLUMNS).
  template <typename RESULT>
  void multiply(const thread Ready<PADDED>& ready, Shared<float> partial, const thread RESULT& result, uint columns) {
    RowsOfLane<COLUMNS, NVIDIA, Shared<half>> x(ready.halves, Ready<PADDED>::STRIDE, 1, 0, columns, lane);
    Shared<float> mine = partial + team * EACH * PARTIAL;
    for (; tile - team * THREADGROUPS < end; tile += STEP) {
      if (tile < end) {
        add_up(x, mine);
      }
      barrier();
      for (uint i = slice * 32 + lane; tile < end && i < 16 * columns / PARTS; i += 32 * SLICES) {
        uint row = i % 16, output = i / 16;
        float value = result.scaled(add_slices<SLICES, PARTS, COLUMNS>(mine, row, output), output);
        if (PAIRED) {
          float up = result.scaled(add_slices<SLICES, PARTS, COLUMNS>(mine + PARTIAL, row, output), output);
          value = gate<T>(value, up);
        }
        result.write(16 * tile + row, output, value);
      }
      barrier();
    }
  }
};

} // namespace turboquant
