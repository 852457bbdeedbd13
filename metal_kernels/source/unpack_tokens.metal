// Keys or values of a context as they were packed, rotated, in the activations' own precision.
#pragma once

#include "tokens.metal"

namespace turboquant {

// Eight values of two tokens of a head, those of turn `index`, to out (tokens, SIZE).
template <int BITS, int GROUP, int SIZE, bool NVIDIA, typename T>
inline void unpack_tokens(Device<const uint> codes, Device<const half> scales, uint tokens,
                          const thread LaneTable& values_of, Device<T> out, uint index) {
  using Eight = TokenRun<BITS, GROUP, SIZE, SIZE / 8>;
  uint run = index % (SIZE / 8), token = index / (SIZE / 8) * 2, last = tokens - 1;
  Eight one(codes, scales, token < last ? token : last, run);
  Eight two(codes, scales, token + 1 < last ? token + 1 : last, run);
  float values[2][8];
  UNROLL
  for (int c = 0; c < 2; c++) {
    uint4 four = one.template values_with<NVIDIA>(two, c, values_of);
    uint pairs[4] = {four.x, four.y, four.z, four.w};
    UNROLL
    for (int i = 0; i < 4; i++) {
      values[i / 2][4 * c + i % 2 * 2] = low(pairs[i]);
      values[i / 2][4 * c + i % 2 * 2 + 1] = high(pairs[i]);
    }
  }
  UNROLL
  for (int i = 0; i < 2; i++) {
    if (token + i < tokens) {
      store_eight(out + (token + i) * SIZE + 8 * run, values[i]);
    }
  }
}

} // namespace turboquant
