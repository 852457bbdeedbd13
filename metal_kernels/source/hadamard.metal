// Signs, then the Hadamard transform of one block of ODD * POWER values; one threadgroup a block, or one of its runs. The odd
// factor comes after the runs' transforms, or before them where runs are shared out.
#pragma once

#include "activations.metal"
#include "lanes.metal"
#include "odd_factor.metal"
#include "runs.metal"

namespace turboquant {

// What follows a table of four words in one array: signs, one bit a column.
inline Device<const uint> signs_of(Device<const uint> fixed) {
  return fixed + 4;
}

CONSTANT int PLAIN = 0, GATED = 1, NORMED = 2;

// What decides a row's scale: the sum of its squares, before it is normalised, and the greatest size of a value.
struct Measure {
  float squares, most;

  void add(float value, float weight) thread {
    squares += value * value;
    value *= weight;
    most = larger(most, value < 0 ? -value : value);
  }
};

// A row of activations, `width` of them, as it is, as silu(gate) * up, which follow each other, or normalised and weighted.
template <int KIND, typename T>
struct Row {
  Device<const T> values, weights;
  uint width;

  template <int COUNT>
  bool in_vectors() const thread {
    return begins_vector<COUNT>(values) && (KIND != NORMED || begins_vector<COUNT>(weights));
  }

  // The row from a column on.
  Row from(uint column) const thread {
    return Row{values + column, weights + column, width};
  }

  // Values that lie beside each other, before they are normalised, and their weights; AT_ONCE: `in_vectors`.
  template <bool AT_ONCE, int COUNT>
  void load(uint column, thread float (&at)[COUNT], thread float (&weight)[COUNT]) const thread {
    load_values<AT_ONCE>(values + column, at);
    if (KIND == NORMED) {
      load_values<AT_ONCE>(weights + column, weight);
    }
    if (KIND == GATED) {
      float up[COUNT];
      load_values<AT_ONCE>(values + (width + column), up);
      UNROLL
      for (int i = 0; i < COUNT; i++) {
        at[i] = gate<T>(at[i], up[i]);
      }
    }
  }

  // One value normalised by `factor`, one over the root of the mean square, and weighted.
  static float normal(float value, float weight, float factor) {
    if (KIND != NORMED) {
      return value;
    }
    return rounded<T>(rounded<T>(value * factor) * weight);
  }

  // Adds what one of THREADS threads sees of the row.
  template <int THREADS>
  void measure(thread Measure& all, uint index) const thread {
    bool at_once = in_vectors<8>();
    for (uint column = 8 * index; column < width; column += 8 * THREADS) {
      float at[8], weight[8];
      if (at_once) {
        load<true>(column, at, weight);
      } else {
        load<false>(column, at, weight);
      }
      UNROLL
      for (int i = 0; i < 8; i++) {
        all.add(at[i], KIND == NORMED ? weight[i] : 1.0f);
      }
    }
  }
};

// Measures of all threads taken together, for each of them; SQUARES: the sum of squares too. numbers: two floats for each
// simdgroup, which nobody has read since the last barrier.
template <int THREADS, bool SQUARES>
inline Measure over_threads(Measure mine, Shared<float> numbers, uint index) {
  Measure all{SQUARES ? sum_over_lanes(mine.squares) : 0.0f, greatest_over_lanes(mine.most)};
  if (index % 32 == 0) {
    numbers[index / 32 * 2] = all.squares;
    numbers[index / 32 * 2 + 1] = all.most;
  }
  barrier();
  all = Measure{0, 0};
  UNROLL
  for (int i = 0; i < THREADS / 32; i++) {
    all.squares += SQUARES ? float(numbers[2 * i]) : 0.0f;
    all.most = larger(all.most, numbers[2 * i + 1]);
  }
  return all;
}

// The exponent field of the power of two that takes `bound` to between 2^14 and 2^15.
inline uint scale_exponent(float bound) {
  int field = 2 * 127 + 14 - int((float_bits(bound) >> 23) & 255u);
  return bound == 0 ? 127 : (field < 1 ? 1 : (field > 253 ? 253 : field));
}

// One block of a row, signs one bit a column (set: minus), turned by THREADS threads.
template <int ODD, int POWER, int THREADS, bool TRANSFORM, int KIND>
struct Turn {
  using Part = Run<POWER, THREADS>;
  CONSTANT int SIZE = ODD * POWER, EACH = Part::EACH, VECTOR = Part::VECTOR, VECTORS = EACH / VECTOR;
  CONSTANT bool MOVED = TRANSFORM && THREADS > 32, PAIRS = EACH > 1;
  Part runs[ODD];
  float weights[KIND == NORMED ? ODD : 1][KIND == NORMED ? VECTORS : 1][VECTOR];
  uint flips[ODD][VECTORS];

  template <typename T>
  void load(const thread Row<KIND, T>& row, Device<const uint> signs, uint start, uint index) thread {
    if (row.template in_vectors<VECTOR>()) {
      load_all<true>(row, signs, start, index);
    } else {
      load_all<false>(row, signs, start, index);
    }
  }

  // All there is to load, before any of it is needed. How far apart values and whole words of signs lie is known to the
  // compiler, which leaves it one address for each.
  template <bool AT_ONCE, typename T>
  void load_all(const thread Row<KIND, T>& row, Device<const uint> signs, uint start, uint index) thread {
    uint first = Part::first_column(index), first_bit = first + (SIZE % 32 == 0 ? 0 : start % 32);
    Row<KIND, T> mine = row.from(start + first);
    Device<const uint> my_signs = signs + start / 32;
    UNROLL
    for (int a = 0; a < ODD; a++) {
      UNROLL
      for (int j = 0; j < VECTORS; j++) {
        uint further = a * POWER + Part::further(j * VECTOR), whole = further % 32 == 0 ? further : 0;
        uint bit = first_bit + further - whole;
        float at[VECTOR];
        mine.template load<AT_ONCE>(further, at, weights[KIND == NORMED ? a : 0][KIND == NORMED ? j : 0]);
        UNROLL
        for (int i = 0; i < VECTOR; i++) {
          runs[a].at[j * VECTOR + i] = at[i];
        }
        flips[a][j] = my_signs[bit / 32 + whole / 32] >> (bit % 32);
      }
    }
  }

  void measure(thread Measure& all) const thread {
    UNROLL
    for (int v = 0; v < ODD * EACH; v++) {
      all.add(runs[v / EACH].at[v % EACH], weight(v / EACH, v % EACH));
    }
  }

  float weight(int a, int i) const thread {
    return KIND == NORMED ? weights[KIND == NORMED ? a : 0][KIND == NORMED ? i / VECTOR : 0][i % VECTOR] : 1.0f;
  }

  // Normalises and flips what was loaded; `factor` as in Row.
  template <typename T>
  void flip(const thread Row<KIND, T>& row, float factor) thread {
    UNROLL
    for (int v = 0; v < ODD * EACH; v++) {
      int a = v / EACH, i = v % EACH;
      float value = row.normal(runs[a].at[i], weight(a, i), factor);
      uint minus = (flips[a][i / VECTOR] >> (i % VECTOR)) << 31;
      runs[a].at[i] = bits_float(float_bits(value) ^ minus);
    }
  }

  template <int AT_ONCE>
  void transform(Shared<float> scratch, uint index, bool busy = true) thread {
    if (TRANSFORM) {
      transform_runs<ODD, POWER, THREADS, AT_ONCE>(runs, scratch, index, busy);
    }
  }

  static bool owns(uint index) {
    return index < uint(POWER);
  }

  static float norm() {
    return TRANSFORM ? 1 / sqrt(float(SIZE)) : 1.0f;
  }

  void column(int i, thread float (&values)[ODD]) const thread {
    UNROLL
    for (int a = 0; a < ODD; a++) {
      values[a] = runs[a].at[i];
    }
  }

  // Value (b, i), not normalised.
  float value(int b, int i) const thread {
    float values[ODD];
    column(i, values);
    return odd_sum<ODD>(values, b);
  }

  // All values (b, i).
  OddSums<ODD, false> sums(int i) const thread {
    float values[ODD];
    column(i, values);
    return OddSums<ODD, false>(values);
  }

  // Writes all values, the first at column `start` of `target`.
  template <typename TARGET>
  void write(const thread TARGET& target, uint start, uint index) const thread {
    if (!owns(index)) {
      return;
    }
    uint first = start + (MOVED ? Part::first_turned(index) : Part::first_column(index));
    UNROLL
    for (int i = 0; i < EACH; i += PAIRS ? 2 : 1) {
      OddSums<ODD, false> one = sums(i), two = sums(PAIRS ? i + 1 : i);
      UNROLL
      for (int b = 0; b < ODD; b++) {
        uint column = first + b * POWER + (MOVED ? Part::turned_further(i) : Part::further(i));
        target.template write<PAIRS>(column, one.at(b), two.at(b));
      }
    }
  }
};

// A row that turned values go to, times `factor`, as OUT. PARTS 2: as two rows, of the nearest OUT and of what that lost.
// `extent` as in `place_of`.
template <int PARTS, int ORDER, typename OUT, typename TO>
struct Target {
  TO out;
  uint row, extent;
  float factor;

  // PAIRS: two values beside each other, the first in an even column.
  template <bool PAIRS>
  void write(uint column, float first, float second) const thread {
    first *= factor;
    second *= factor;
    UNROLL
    for (int part = 0; part < PARTS; part++) {
      OUT one = static_cast<OUT>(first), two = static_cast<OUT>(second);
      uint at = place_of<ORDER>(row * PARTS + part, column, extent);
      if (PAIRS) {
        store_pair(out + at, one, two);
      } else {
        out[at] = one;
      }
      first -= static_cast<float>(one);
      second -= static_cast<float>(two);
    }
  }
};

// Rotates block `group` of `groups` of x (rows, WIDTH); SHARED_OUT: run group % ODD of block group / ODD, all of which is read.
//
// PARTS 0: to out (rows, WIDTH). Otherwise to out (rows * PARTS, PADDED) of halves, zeros after WIDTH, with SCALED times a
// power of two, and after them the exponents of its inverses, as `Factors` reads them; PARTS 2 writes the half and the half
// of what it lost.
template <int ODD, int POWER, int THREADS, int AT_ONCE, bool TRANSFORM, int PARTS, bool SCALED, int KIND, int ORDER,
          bool SHARED_OUT, int WIDTH, int PADDED, typename T, typename OUT>
inline void rotate(Device<const T> x, Device<const uint> signs, Device<OUT> out, Shared<float> scratch,
                   Shared<float> numbers, uint groups, uint group, uint index) {
  using Mine = Turn<ODD, POWER, THREADS, TRANSFORM, KIND>;
  constexpr uint BLOCKS = WIDTH / Mine::SIZE, RUNS = SHARED_OUT ? ODD : 1, EACH_ROW = PARTS > 0 ? PARTS : 1;
  uint run = group % RUNS, row = group / RUNS / BLOCKS, start = group / RUNS % BLOCKS * Mine::SIZE;
  Device<const T> values = x + row * WIDTH * (KIND == GATED ? 2 : 1);
  Row<KIND, T> from{values, values, WIDTH};
  Mine mine;
  mine.load(from, signs, start, index);
  uint exponent = 127;
  if (SCALED) {
    Measure all{0, 0};
    if (BLOCKS == 1) {
      mine.measure(all);
    } else {
      from.template measure<THREADS>(all, index);
    }
    all = over_threads<THREADS, false>(all, numbers, index);
    exponent = scale_exponent(all.most * sqrt(float(TRANSFORM ? Mine::SIZE : 1)));
  }
  mine.flip(from, 1.0f);
  uint rows = groups / (RUNS * BLOCKS) * EACH_ROW, extent = ORDER == IN_RUNS ? rows : PADDED;
  Target<EACH_ROW, ORDER, OUT, Device<OUT>> target{out, row, extent, bits_float(exponent << 23) * Mine::norm()};
  if (SHARED_OUT) {
    Turn<1, POWER, THREADS, true, PLAIN> one;
    UNROLL
    for (int i = 0; i < ODD * Mine::EACH; i++) {
      if (run == uint(i / Mine::EACH)) {
        one.runs[0].at[i % Mine::EACH] = mine.value(i / Mine::EACH, i % Mine::EACH);
      }
    }
    one.template transform<AT_ONCE>(scratch, index);
    one.write(target, start + run * POWER, index);
  } else {
    mine.template transform<AT_ONCE>(scratch, index);
    mine.write(target, start, index);
  }
  if (PARTS > 0 && start == 0 && run == 0) {
    if (SCALED && index == 0) {
      out[rows_held<ORDER>(rows) * PADDED + row] = static_cast<OUT>(static_cast<float>(254u - exponent));
    }
    for (uint i = index; i < uint(PADDED - WIDTH) * PARTS; i += THREADS) {
      uint part = i % EACH_ROW, column = WIDTH + i / EACH_ROW;
      out[place_of<ORDER>(row * PARTS + part, column, extent)] = static_cast<OUT>(0.0f);
    }
  }
}

} // namespace turboquant
