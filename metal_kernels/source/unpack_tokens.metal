// Keys or values of a context as they were packed, rotated, in the activations' own precision.
#pragma once

#include "tokens.metal"

namespace turboquant {

// Eight codes of a token and their scale, as they come from memory.
template <int BITS, int SIZE>
struct Eight {
  Stream<BITS, 8, SIZE / 8> codes;
  half scale;

  uint factor() const {
    float both = static_cast<float>(scale) * scale_factor<BITS>();
    return pack_halves(both, both);
  }
};

// The keys or the values of a context. Tokens beyond `last` are the last one.
template <int BITS, int GROUP, int SIZE>
struct Context {
  Device<const uint> codes;
  Device<const half> scales;
  uint last;

  void load(thread Eight<BITS, SIZE>& eight, uint token, uint run) const {
    uint at = token < last ? token : last;
    eight.codes.fetch(codes + at * (SIZE * BITS / 32), run);
    eight.scale = scales[at * (SIZE / GROUP) + run * 8 / GROUP];
  }
};

// Eight values of two tokens, those of turn `index`, to out (tokens, SIZE).
template <int BITS, int GROUP, int SIZE, bool NVIDIA, typename T>
inline void unpack_tokens(const thread Context<BITS, GROUP, SIZE>& context, const thread Table& table, Device<T> out,
                          uint index) {
  uint run = index % (SIZE / 8), token = index / (SIZE / 8) * 2;
  Eight<BITS, SIZE> both[2];
  float values[2][8];
  UNROLL
  for (int i = 0; i < 2; i++) {
    context.load(both[i], token + i, run);
    both[i].codes.align(run);
  }
  UNROLL
  for (int c = 0; c < 2; c++) {
    uint4 pairs = TokenDecoder<BITS, NVIDIA>::decode(both[0].codes.four(c), both[1].codes.four(c), table);
    uint all[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    UNROLL
    for (int i = 0; i < 4; i++) {
      uint pair = multiply_pairs(all[i], both[i / 2].factor());
      values[i / 2][4 * c + i % 2 * 2] = low(pair);
      values[i / 2][4 * c + i % 2 * 2 + 1] = high(pair);
    }
  }
  UNROLL
  for (int i = 0; i < 2; i++) {
    if (token + i <= context.last) {
      store_eight(out + (token + i) * SIZE + 8 * run, values[i]);
    }
  }
}

} // namespace turboquant
