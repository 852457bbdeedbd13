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

  // scratch holds 2 * (THREADS + SIMDGROUPS) floats: two buffers in turn, a gap after each 32 against bank conflicts.
  void transform(Shared<float> scratch, int turn, uint index) {
    within_thread();
    UNROLL
    for (int i = 0; i < EACH; i++) {
      at[i] = across_lanes<LANES>(at[i], index % 32);
      if (SIMDGROUPS > 1) {
        Shared<float> buffer = scratch + ((turn * EACH + i) % 2) * (THREADS + SIMDGROUPS);
        buffer[index + index / 32] = at[i];
        barrier();
        uint from = place(index);
        at[i] = across_lanes<SIMDGROUPS>(buffer[from + from / 32], index % 32);
      }
    }
  }
};

// The greatest |x| of a row of `width` values, to every thread. scratch: one float for each simdgroup.
template <int THREADS, typename T>
inline float greatest(Device<const T> x, uint width, Shared<float> scratch, uint index) {
  float most = 0;
  for (uint i = index; i < width; i += THREADS) {
    float value = static_cast<float>(x[i]);
    value = value < 0 ? -value : value;
    most = value > most ? value : most;
  }
  UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    float other = shuffle_xor(most, distance);
    most = other > most ? other : most;
  }
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
template <int ODD, int POWER, int THREADS, bool TRANSFORM, int PARTS, bool SCALED, typename T, typename OUT>
inline void rotate(Device<const T> x, Device<const uint> signs, Device<const float> odd, Device<OUT> out,
                   Device<float> scales, Shared<float> scratch, Shared<float> matrix, uint width, uint padded,
                   uint group, uint index) {
  constexpr int SIZE = ODD * POWER, EACH = Run<POWER, THREADS>::EACH;
  uint blocks = width / SIZE, row = group / blocks, start = group % blocks * SIZE;
  uint slot = POWER < THREADS ? index % POWER : index;
  Device<const T> from = x + row * width;
  uint exponent = 127;
  if (SCALED) {
    exponent = scale_exponent(greatest<THREADS, T>(from, width, matrix, index) * sqrt(float(TRANSFORM ? SIZE : 1)));
    barrier();
  }
  if (ODD > 1) {
    for (uint i = index; i < uint(ODD * ODD); i += THREADS) {
      matrix[i] = odd[i];
    }
  }
  Run<POWER, THREADS> runs[ODD];
  UNROLL
  for (int a = 0; a < ODD; a++) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint column = start + a * POWER + i * THREADS + slot;
      float value = static_cast<float>(from[column]);
      runs[a].at[i] = (signs[column / 32] >> (column % 32)) & 1u ? -value : value;
    }
    if (TRANSFORM) {
      runs[a].transform(scratch, a, index);
    }
  }
  if (ODD > 1) {
    barrier();
  }
  float factor = bits_float(exponent << 23) / (TRANSFORM ? sqrt(float(SIZE)) : 1.0f);
  uint last = TRANSFORM && POWER >= THREADS ? Run<POWER, THREADS>::place(index) : slot;
  for (int b = 0; b < ODD; b++) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      float value = 0;
      UNROLL
      for (int a = 0; a < ODD; a++) {
        float weight = !TRANSFORM || ODD == 1 ? (a == b ? 1.0f : 0.0f) : matrix[a * ODD + b];
        value += weight * runs[a].at[i];
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
