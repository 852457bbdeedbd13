// Sums and maxima over a simdgroup, which all its lanes get.
#pragma once

namespace turboquant {

inline float sum_over_lanes(float value) {
  UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    value += shuffle_xor(value, distance);
  }
  return value;
}

inline float greatest_over_lanes(float value) {
  UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    value = larger(value, shuffle_xor(value, distance));
  }
  return value;
}

} // namespace turboquant
