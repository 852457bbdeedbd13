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

// Four values of one token, then of another.
template <bool NVIDIA>
struct TwoTokens {
  template <int BITS, int SIZE>
  static uint4 values(const thread Eight<BITS, SIZE>& one, const thread Eight<BITS, SIZE>& two, int c,
                      const thread Table& table) {
    Pairs first = TokenDecoder<BITS, false>::decode(one.codes.four(c), table).times(one.factor());
    Pairs second = TokenDecoder<BITS, false>::decode(two.codes.four(c), table).times(two.factor());
    return uint4{first.first, first.second, second.first, second.second};
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <>
struct TwoTokens<true> {
  template <int BITS, int SIZE>
  static uint4 values(const thread Eight<BITS, SIZE>& one, const thread Eight<BITS, SIZE>& two, int c,
                      const thread Table& table) {
    uint4 all = TokenDecoder<BITS, true>::decode(one.codes.four(c), two.codes.four(c), table);
    uint first = one.factor(), second = two.factor();
    return uint4{multiply_pairs(all.x, first), multiply_pairs(all.y, first), multiply_pairs(all.z, second),
                 multiply_pairs(all.w, second)};
  }
};
#endif

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
  if (token > context.last) {
    return;
  }
  Eight<BITS, SIZE> both[2];
  float values[2][8];
  UNROLL
  for (int i = 0; i < 2; i++) {
    context.load(both[i], token + i, run);
    both[i].codes.align(run);
  }
  UNROLL
  for (int c = 0; c < 2; c++) {
    uint4 pairs = TwoTokens<NVIDIA>::values(both[0], both[1], c, table);
    uint all[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    UNROLL
    for (int i = 0; i < 4; i++) {
      values[i / 2][4 * c + i % 2 * 2] = low(all[i]);
      values[i / 2][4 * c + i % 2 * 2 + 1] = high(all[i]);
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
