// Signs, then the Hadamard transform of one block of ODD * POWER values; one threadgroup a block.
//
// A thread holds every THREADS-th value of each run of POWER. The transform of a run is butterflies over the bits of
// an index: those above THREADS within a thread, the low five across lanes, those between across simdgroups, which
// change places with the lowest lane bits by way of threadgroup memory. The odd factor's matrix comes last.

namespace turboquant {

template <int POWER, int THREADS>
struct Run {
  CONSTANT int EACH = POWER > THREADS ? POWER / THREADS : 1;
  CONSTANT int LANES = POWER < 32 ? POWER : 32;
  CONSTANT int SIMDGROUPS = THREADS / 32;
  float at[EACH];

  template <int BITS>
  static float across_lanes(float value, uint lane) {
    UNROLL
    for (int distance = 1; distance < BITS; distance *= 2) {
      float other = shuffle_xor(value, distance);
      value = lane & distance ? other - value : value + other;
    }
    return value;
  }

  void within_thread() {
    UNROLL
    for (int distance = 1; distance < EACH; distance *= 2) {
      UNROLL
      for (int i = 0; i < EACH; i++) {
        if ((i & distance) == 0) {
          float one = at[i], two = at[i | distance];
          at[i] = one + two;
          at[i | distance] = one - two;
        }
      }
    }
  }

  // The butterflies that one simdgroup can do.
  void transform(uint lane) {
    within_thread();
    UNROLL
    for (int i = 0; i < EACH; i++) {
      at[i] = across_lanes<LANES>(at[i], lane);
    }
  }

  // Which of its run's first THREADS values a thread ends up with.
  static uint place(uint index) {
    uint low = index % SIMDGROUPS, high = index / 32, middle = index % 32 - low;
    return SIMDGROUPS > 1 ? low * 32 + middle + high : index;
  }

  // What this value's lane and simdgroup take from `buffer`, of THREADS + SIMDGROUPS floats, after a barrier.
  void exchange(Shared<float> buffer, int i, uint index) {
    uint from = place(index);
    at[i] = across_lanes<SIMDGROUPS>(buffer[from + from / 32], index % 32);
  }
};

// Transforms COUNT runs. scratch holds AT_ONCE * (THREADS + SIMDGROUPS) floats: as many values change places between two
// barriers, with a gap after each 32 against bank conflicts.
template <int COUNT, int POWER, int THREADS, int AT_ONCE>
inline void transform_runs(thread Run<POWER, THREADS> (&runs)[COUNT], Shared<float> scratch, uint index) {
  constexpr int EACH = Run<POWER, THREADS>::EACH, SIMDGROUPS = THREADS / 32, ALL = COUNT * EACH;
  UNROLL
  for (int a = 0; a < COUNT; a++) {
    runs[a].transform(index % 32);
  }
  if (SIMDGROUPS == 1) {
    return;
  }
  UNROLL
  for (int first = 0; first < ALL; first += AT_ONCE) {
    UNROLL
    for (int v = first; v < (first + AT_ONCE < ALL ? first + AT_ONCE : ALL); v++) {
      scratch[(v - first) * (THREADS + SIMDGROUPS) + index + index / 32] = runs[v / EACH].at[v % EACH];
    }
    barrier();
    UNROLL
    for (int v = first; v < (first + AT_ONCE < ALL ? first + AT_ONCE : ALL); v++) {
      runs[v / EACH].exchange(scratch + (v - first) * (THREADS + SIMDGROUPS), v % EACH, index);
    }
    if (first + AT_ONCE < ALL) {
      barrier();
    }
  }
}

CONSTANT int PLAIN = 0, GATED = 1, NORMED = 2;

// silu(value) * up, each step in the activations' own precision, as MLX rounds it.
template <typename T>
inline T gate(float value, float up) {
  float weight = static_cast<float>(static_cast<T>(1 / (1 + power_of_two(-1.44269504f * value))));
  return static_cast<T>(static_cast<float>(static_cast<T>(value * weight)) * up);
}

// A row of activations, `width` of them, as it is, as silu(gate) * up, which follow each other, or normalised and weighted.
template <int KIND, typename T>
struct Row {
  Device<const T> values, weights;
  uint width;
  // NORMED: one over the root of the mean square.
  float factor;

  float at(uint column) const {
    float value = static_cast<float>(values[column]);
    if (KIND == GATED) {
      return static_cast<float>(gate<T>(value, static_cast<float>(values[width + column])));
    }
    if (KIND == NORMED) {
      float normal = static_cast<float>(static_cast<T>(value * factor));
      return static_cast<float>(static_cast<T>(normal * static_cast<float>(weights[column])));
    }
    return value;
  }
};

// A sum or, with MOST, the greatest over a threadgroup, to every thread. scratch: one float for each simdgroup.
template <int THREADS, bool MOST>
inline float over_threads(float value, Shared<float> scratch, uint index) {
  value = MOST ? greatest_over_lanes(value) : sum_over_lanes(value);
  barrier();
  if (index % 32 == 0) {
    scratch[index / 32] = value;
  }
  barrier();
  value = scratch[0];
  for (int i = 1; i < THREADS / 32; i++) {
    value = MOST ? larger(value, scratch[i]) : value + scratch[i];
  }
  return value;
}

// The greatest |x| of a row, to every thread.
template <int THREADS, int KIND, typename T>
inline float greatest(const thread Row<KIND, T>& row, Shared<float> scratch, uint index) {
  float most = 0;
  for (uint i = index; i < row.width; i += THREADS) {
    float value = row.at(i);
    most = larger(most, value < 0 ? -value : value);
  }
  return over_threads<THREADS, true>(most, scratch, index);
}

// The exponent field of the power of two that takes `bound` to between 2^14 and 2^15.
inline uint scale_exponent(float bound) {
  int field = 2 * 127 + 14 - int((float_bits(bound) >> 23) & 255u);
  return bound == 0 ? 127 : (field < 1 ? 1 : (field > 253 ? 253 : field));
}

// The small matrix (ODD, ODD), transposed, four values at a time; the barrier after it is the caller's.
template <int ODD, int THREADS>
inline void stage_matrix(Device<const float> odd, Shared<uint4> matrix, uint index) {
  for (uint i = index; i < uint(ODD > 1 ? ODD * ODD / 4 : 0); i += THREADS) {
    uint b = 4 * i / ODD, a = 4 * i % ODD;
    matrix[i] = uint4{float_bits(odd[a * ODD + b]), float_bits(odd[(a + 1) * ODD + b]),
                      float_bits(odd[(a + 2) * ODD + b]), float_bits(odd[(a + 3) * ODD + b])};
  }
}

// One block of a row, signs one bit a column (set: minus), turned by THREADS threads.
template <int ODD, int POWER, int THREADS, bool TRANSFORM>
struct Turn {
  CONSTANT int SIZE = ODD * POWER, EACH = Run<POWER, THREADS>::EACH;
  Run<POWER, THREADS> runs[ODD];

  template <int KIND, typename T>
  void load(const thread Row<KIND, T>& row, Device<const uint> signs, uint start, uint index) {
    uint slot = POWER < THREADS ? index % POWER : index;
    UNROLL
    for (int a = 0; a < ODD; a++) {
      UNROLL
      for (int i = 0; i < EACH; i++) {
        uint column = start + a * POWER + i * THREADS + slot;
        float value = row.at(column);
        runs[a].at[i] = (signs[column / 32] >> (column % 32)) & 1u ? -value : value;
      }
    }
  }

  template <int AT_ONCE>
  void transform(Shared<float> scratch, uint index) {
    if (TRANSFORM) {
      transform_runs<ODD, POWER, THREADS, AT_ONCE>(runs, scratch, index);
    }
  }

  // The column of the block that value (b, i) of a thread is.
  static uint column(int b, int i, uint index) {
    uint slot = POWER < THREADS ? index % POWER : index;
    uint last = TRANSFORM && POWER >= THREADS ? Run<POWER, THREADS>::place(index) : slot;
    return b * POWER + i * THREADS + last;
  }

  static bool owns(uint index) {
    return index < uint(POWER);
  }

  static float norm() {
    return TRANSFORM ? 1 / sqrt(float(SIZE)) : 1.0f;
  }

  // Value (b, i), not normalised.
  float value(Shared<uint4> matrix, int b, int i) const {
    if (ODD == 1) {
      return runs[0].at[i];
    }
    float value = 0;
    UNROLL
    for (int a = 0; a < ODD / 4 * 4; a += 4) {
      uint4 four = matrix[(b * ODD + a) / 4];
      value += bits_float(four.x) * runs[a].at[i] + bits_float(four.y) * runs[a + 1].at[i] +
               bits_float(four.z) * runs[a + 2].at[i] + bits_float(four.w) * runs[a + 3].at[i];
    }
    return value;
  }
};

// Writes a value at a place of `out`; PARTS 2: its half, and what that lost `stride` further.
template <int PARTS, typename OUT, typename TO>
inline void write_parts(TO out, uint at, uint stride, float value) {
  OUT nearest = static_cast<OUT>(value);
  out[at] = nearest;
  if (PARTS == 2) {
    out[at + stride] = static_cast<OUT>(value - static_cast<float>(nearest));
  }
}

// Where a value goes in (rows, padded); PIECES: in pieces of 64 rows and 64 columns, which follow each other in the order
// of columns, then of rows. A line of a piece is a row, its columns (p, t, s, h, e), see codes.metal, in the order
// (p, s, h, t, e) that a matrix unit takes them in, and its vectors of eight turned as `descriptor` says.
template <bool PIECES>
inline uint place_of(uint row, uint column, uint padded) {
  if (!PIECES) {
    return row * padded + column;
  }
  uint vector = column / 32 % 2 * 4 + column / 2 % 4, line = (row / 64 * (padded / 64) + column / 64) * 64 + row % 64;
  return line * 64 + 8 * (vector ^ (row % 8)) + column / 8 % 4 * 2 + column % 2;
}

// Rotates block `group` of x (rows, width).
//
// PARTS 0: to out (rows, width). Otherwise to out (rows * PARTS, padded) of halves, zeros after `width`, scaled by
// a power of two whose inverse goes to scales (rows); PARTS 2 writes the half and the half of what it lost.
template <int ODD, int POWER, int THREADS, int AT_ONCE, bool TRANSFORM, int PARTS, bool SCALED, int KIND, bool PIECES,
          typename T, typename OUT>
inline void rotate(Device<const T> x, Device<const uint> signs, Device<const float> odd, Device<OUT> out,
                   Device<float> scales, Shared<float> scratch, Shared<uint4> matrix, uint width, uint padded,
                   uint group, uint index) {
  using Mine = Turn<ODD, POWER, THREADS, TRANSFORM>;
  uint blocks = width / Mine::SIZE, row = group / blocks, start = group % blocks * Mine::SIZE;
  Device<const T> values = x + row * width * (KIND == GATED ? 2 : 1);
  Row<KIND, T> from{values, values, width, 1.0f};
  Mine mine;
  mine.load(from, signs, start, index);
  uint exponent = 127;
  if (SCALED) {
    float most = greatest<THREADS>(from, scratch, index);
    exponent = scale_exponent(most * sqrt(float(TRANSFORM ? Mine::SIZE : 1)));
    barrier();
  }
  stage_matrix<ODD, THREADS>(odd, matrix, index);
  mine.template transform<AT_ONCE>(scratch, index);
  if (ODD > 1) {
    barrier();
  }
  constexpr int EACH_ROW = PARTS > 0 ? PARTS : 1;
  float factor = bits_float(exponent << 23) * Mine::norm();
  for (int b = 0; b < ODD; b++) {
    UNROLL
    for (int i = 0; i < Mine::EACH; i++) {
      float value = mine.value(matrix, b, i) * factor;
      if (Mine::owns(index)) {
        uint column = start + Mine::column(b, i, index), at = place_of<PIECES>(row * EACH_ROW, column, padded);
        write_parts<EACH_ROW, OUT>(out, at, place_of<PIECES>(row * EACH_ROW + 1, column, padded) - at, value);
      }
    }
  }
  if (PARTS > 0 && start == 0) {
    if (index == 0) {
      scales[row] = bits_float((254u - exponent) << 23);
    }
    for (uint i = index; i < (padded - width) * PARTS; i += THREADS) {
      uint part = i / (padded - width), column = width + i % (padded - width);
      out[place_of<PIECES>(row * PARTS + part, column, padded)] = static_cast<OUT>(0.0f);
    }
  }
}

} // namespace turboquant
