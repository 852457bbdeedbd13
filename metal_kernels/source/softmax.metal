// Running maxima and sums of weighted values, as flash attention has them: scores are in powers of two.
#pragma once

#include "lanes.metal"

namespace turboquant {

// Below every score; infinities would make differences that are no numbers.
CONSTANT float NOTHING = -3.4e38f;

// Tokens of each part of a context with this room, in whole `multiple`s.
inline uint tokens_of_part(uint room, uint parts, uint multiple) {
  return ((room + parts - 1) / parts + multiple - 1) / multiple * multiple;
}

// The factor that the sums so far shrink by when the maximum goes from `before` to `now`.
inline float shrink(float before, float now) {
  return before == now ? 1.0f : power_of_two(before - now);
}

inline float weight_of(float score, float most) {
  return score == NOTHING ? 0.0f : power_of_two(score - most);
}

// What the threadgroup's simdgroups found, as one: maxima and totals (SIMDGROUPS, ROWS); the new maximum and total of a
// row take the place of the first simdgroup's, and `factors` (SIMDGROUPS, ROWS) what each one's sums shrink by.
template <int ROWS, int SIMDGROUPS>
inline void join(Shared<float> maxima, Shared<float> totals, Shared<float> factors, uint index) {
  barrier();
  if (index < uint(ROWS)) {
    float most = NOTHING, total = 0;
    for (int s = 0; s < SIMDGROUPS; s++) {
      most = larger(most, maxima[s * ROWS + index]);
    }
    for (int s = 0; s < SIMDGROUPS; s++) {
      float factor = weight_of(maxima[s * ROWS + index], most);
      factors[s * ROWS + index] = factor;
      total += factor * totals[s * ROWS + index];
    }
    maxima[index] = most;
    totals[index] = total;
  }
  barrier();
}

// Adds up the parts of one row, a simdgroup every SIMDGROUPSth: parts (count, SIZE + 2) of sums, maximum and total. One
// part more has this maximum and total, and its values are not added here: returned is what they count. shared
// (SIMDGROUPS * SIZE) begins with the result then, after a barrier.
template <int SIZE, int SIMDGROUPS>
inline float add_parts(Device<const float> parts, float most_of_more, float total_of_more, Shared<float> shared,
                       uint count, uint index) {
  constexpr int EACH = (SIZE + 31) / 32;
  uint lane = index % 32, simdgroup = index / 32;
  float most = most_of_more, total = 0;
  for (uint i = lane; i < count; i += 32) {
    most = larger(most, parts[i * (SIZE + 2) + SIZE]);
  }
  most = greatest_over_lanes(most);
  for (uint i = lane; i < count; i += 32) {
    total += weight_of(parts[i * (SIZE + 2) + SIZE], most) * parts[i * (SIZE + 2) + SIZE + 1];
  }
  float more = weight_of(most_of_more, most);
  total = sum_over_lanes(total) + more * total_of_more;
  float mine[EACH];
  UNROLL
  for (int c = 0; c < EACH; c++) {
    mine[c] = 0;
  }
  for (uint i = simdgroup; i < count; i += SIMDGROUPS) {
    float weight = weight_of(parts[i * (SIZE + 2) + SIZE], most);
    UNROLL
    for (int c = 0; c < EACH; c++) {
      uint column = lane + 32 * c;
      mine[c] += column < uint(SIZE) ? weight * parts[i * (SIZE + 2) + column] : 0.0f;
    }
  }
  UNROLL
  for (int c = 0; c < EACH; c++) {
    if (lane + 32 * c < uint(SIZE)) {
      shared[simdgroup * SIZE + lane + 32 * c] = mine[c];
    }
  }
  barrier();
  for (uint column = index; column < uint(SIZE); column += 32 * SIMDGROUPS) {
    float sum = 0;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) {
      sum += shared[s * SIZE + column];
    }
    shared[column] = total > 0 ? sum / total : 0.0f;
  }
  barrier();
  return total > 0 ? more / total : 0.0f;
}

} // namespace turboquant
