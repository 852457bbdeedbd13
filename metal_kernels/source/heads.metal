// Hadamard transforms of the heads of queries, keys and values, in threadgroup memory.
#pragma once

#include "runs.metal"
#include "hadamard.metal"

namespace turboquant {

// Transforms the first `count` of `values`, in blocks of ODD * POWER, unnormalised: as `rotate` does, or back. A simdgroup
// takes a run of POWER values, or 32, at a time. Begins and ends with a barrier.
template <int ODD, int POWER, bool BACK, int THREADS>
inline void transform_heads(Shared<float> values, uint count, uint index) {
  using Mine = Run<POWER, 32>;
  barrier();
  for (uint start = index / 32 * (32 * Mine::EACH); start < count; start += THREADS * Mine::EACH) {
    Mine run;
    UNROLL
    for (int i = 0; i < Mine::EACH; i++) {
      uint at = start + 32 * i + index % 32;
      run.at[i] = at < count ? values[at] : 0.0f;
    }
    run.transform(index % 32);
    UNROLL
    for (int i = 0; i < Mine::EACH; i++) {
      uint at = start + 32 * i + index % 32;
      if (at < count) {
        values[at] = run.at[i];
      }
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
      OddSums<ODD, BACK> sums(all);
      UNROLL
      for (int b = 0; b < ODD; b++) {
        values[first + b * POWER] = sums.at(b);
      }
    }
  }
  barrier();
}

inline float signed_by(Device<const uint> signs, uint column, float value) {
  return (signs[column / 32] >> (column % 32)) & 1u ? -value : value;
}

} // namespace turboquant
