// Signs, then the Hadamard transform of one block of ODD * POWER values; one threadgroup a block.
//
// A thread holds every THREADS-th value of each run of POWER. The transform of a run is butterflies over the bits of
// an index: those above THREADS within a thread, the low five across lanes, those between across simdgroups, which
// change places with the lowest lane bits by way of threadgroup memory. The odd factor's matrix comes last.

namespace turboquant {

template <int POWER, int THREADS>
struct Run {
  static constexpr int EACH = POWER > THREADS ? POWER / THREADS : 1;
  static constexpr int LANES = POWER < 32 ? POWER : 32;
  static constexpr int SIMDGROUPS = THREADS / 32;
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
    runs[a].within_thread();
    UNROLL
    for (int i = 0; i < EACH; i++) {
      runs[a].at[i] = Run<POWER, THREADS>::template across_lanes<Run<POWER, THREADS>::LANES>(runs[a].at[i], index % 32);
    }
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

// Value `column` of a row of activations; GATED: of silu(gate) * up, whose halves of the row are `width` each.
template <bool GATED, typename T>
inline float value_at(Device<const T> row, uint column, uint width) {
  float value = static_cast<float>(row[column]);
  if (!GATED) {
    return value;
  }
  // Each step in the activations' own precision, as MLX rounds it.
  float weight = static_cast<float>(static_cast<T>(1 / (1 + power_of_two(-1.44269504f * value))));
  float gate = static_cast<float>(static_cast<T>(value * weight));
  return static_cast<float>(static_cast<T>(gate * static_cast<float>(row[width + column])));
}

// The greatest |x| of a row of `width` values, to every thread. scratch: one float for each simdgroup.
template <int THREADS, bool GATED, typename T>
inline float greatest(Device<const T> row, uint width, Shared<float> scratch, uint index) {
  float most = 0;
  for (uint i = index; i < width; i += THREADS) {
    float value = value_at<GATED>(row, i, width);
    value = value < 0 ? -value : value;
    most = value > most ? value : most;
  }
  most = greatest_over_lanes(most);
  if (index % 32 == 0) {
    scratch[index / 32] = most;
  }
  barrier();
  for (int i = 0; i < THREADS / 32; i++) {
    most = scratch[i] > most ? scratch[i] : most;
  }
  return most;
}

// The exponent field of the power of two that takes `bound` to between 2^14 and 2^15.
inline uint scale_exponent(float bound) {
  int field = 2 * 127 + 14 - int((float_bits(bound) >> 23) & 255u);
  return bound == 0 ? 127 : (field < 1 ? 1 : (field > 253 ? 253 : field));
}

// Rotates block `group` of x (rows, width), signs one bit a column (set: minus).
//
// PARTS 0: to out (rows, width). Otherwise to out (rows * PARTS, padded) of halves, zeros after `width`, scaled by
// a power of two whose inverse goes to scales (rows); PARTS 2 writes the half and the half of what it lost.
template <int ODD, int POWER, int THREADS, int AT_ONCE, bool TRANSFORM, int PARTS, bool SCALED, bool GATED, typename T,
          typename OUT>
inline void rotate(Device<const T> x, Device<const uint> signs, Device<const float> odd, Device<OUT> out,
                   Device<float> scales, Shared<float> scratch, Shared<uint4> matrix, uint width, uint padded,
                   uint group, uint index) {
  constexpr int SIZE = ODD * POWER, EACH = Run<POWER, THREADS>::EACH;
  uint blocks = width / SIZE, row = group / blocks, start = group % blocks * SIZE;
  uint slot = POWER < THREADS ? index % POWER : index;
  Device<const T> from = x + row * width * (GATED ? 2 : 1);
  Run<POWER, THREADS> runs[ODD];
  UNROLL
  for (int a = 0; a < ODD; a++) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint column = start + a * POWER + i * THREADS + slot;
      float value = value_at<GATED>(from, column, width);
      runs[a].at[i] = (signs[column / 32] >> (column % 32)) & 1u ? -value : value;
    }
  }
  uint exponent = 127;
  if (SCALED) {
    float most = greatest<THREADS, GATED, T>(from, width, scratch, index);
    exponent = scale_exponent(most * sqrt(float(TRANSFORM ? SIZE : 1)));
    barrier();
  }
  if (ODD > 1) {
    for (uint i = index; i < uint(ODD * ODD / 4); i += THREADS) {
      uint b = 4 * i / ODD, a = 4 * i % ODD;
      matrix[i] = uint4{float_bits(odd[a * ODD + b]), float_bits(odd[(a + 1) * ODD + b]),
                        float_bits(odd[(a + 2) * ODD + b]), float_bits(odd[(a + 3) * ODD + b])};
    }
  }
  if (TRANSFORM) {
    transform_runs<ODD, POWER, THREADS, AT_ONCE>(runs, scratch, index);
  }
  if (ODD > 1) {
    barrier();
  }
  float factor = bits_float(exponent << 23) / (TRANSFORM ? sqrt(float(SIZE)) : 1.0f);
  uint last = TRANSFORM && POWER >= THREADS ? Run<POWER, THREADS>::place(index) : slot;
  for (int b = 0; b < ODD; b++) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      float value = runs[0].at[i];
      if (ODD > 1) {
        value = 0;
        UNROLL
        for (int a = 0; a < ODD / 4 * 4; a += 4) {
          uint4 four = matrix[(b * ODD + a) / 4];
          value += bits_float(four.x) * runs[a].at[i] + bits_float(four.y) * runs[a + 1].at[i] +
                   bits_float(four.z) * runs[a + 2].at[i] + bits_float(four.w) * runs[a + 3].at[i];
        }
      }
      uint column = start + b * POWER + i * THREADS + last;
      value *= factor;
      if (PARTS == 0) {
        if (index < uint(POWER)) {
          out[row * width + column] = static_cast<OUT>(value);
        }
      } else if (index < uint(POWER)) {
        OUT nearest = static_cast<OUT>(value);
        out[row * PARTS * padded + column] = nearest;
        if (PARTS == 2) {
          out[(row * PARTS + 1) * padded + column] = static_cast<OUT>(value - static_cast<float>(nearest));
        }
      }
    }
  }
  if (PARTS > 0 && start == 0) {
    if (index == 0) {
      scales[row] = bits_float((254u - exponent) << 23);
    }
    for (uint i = index; i < (padded - width) * PARTS; i += THREADS) {
      out[(row * PARTS + i / (padded - width)) * padded + width + i % (padded - width)] = static_cast<OUT>(0.0f);
    }
  }
}

} // namespace turboquant
