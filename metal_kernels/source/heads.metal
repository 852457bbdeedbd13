// Hadamard transforms of the heads of queries, keys and values, in threadgroup memory.

namespace turboquant {

// Transforms the first `count` of `values`, in blocks of ODD * POWER, unnormalised: as `rotate` does, or back. Begins and
// ends with a barrier. matrix (ODD, ODD) is the small Hadamard matrix of the odd factor.
template <int ODD, int POWER, bool BACK, int THREADS>
inline void transform_heads(Shared<float> values, Device<const float> matrix, uint count, uint index) {
  UNROLL
  for (uint distance = 1; distance < uint(POWER); distance *= 2) {
    barrier();
    for (uint i = index; i < count / 2; i += THREADS) {
      uint within = i & (distance - 1), first = 2 * (i - within) + within;
      float one = values[first], two = values[first + distance];
      values[first] = one + two;
      values[first + distance] = one - two;
    }
  }
  if (ODD > 1) {
    barrier();
    for (uint i = index; i < count / ODD; i += THREADS) {
      uint first = i / POWER * (ODD * POWER) + i % POWER;
      float all[ODD];
      UNROLL
      for (int a = 0; a < ODD; a++) {
        all[a] = values[first + a * POWER];
      }
      for (int b = 0; b < ODD; b++) {
        float sum = 0;
        UNROLL
        for (int a = 0; a < ODD; a++) {
          sum += all[a] * matrix[BACK ? b * ODD + a : a * ODD + b];
        }
        values[first + b * POWER] = sum;
      }
    }
  }
  barrier();
}

inline float signed_by(Device<const uint> signs, uint column, float value) {
  return (signs[column / 32] >> (column % 32)) & 1u ? -value : value;
}

} // namespace turboquant
