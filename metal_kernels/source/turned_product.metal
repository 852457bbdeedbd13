// Products of few rows of activations, as they come, with a weight in tiles: every threadgroup turns all rows, into
// threadgroup memory, while the first codes of its run of tiles are on their way.
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

} // namespace turboquant
