// Keys or values of one head of a new token: rotated, quantized and packed by one simdgroup.
#pragma once

#include "heads.metal"
#include "lanes.metal"

namespace turboquant {

template <int LEVELS>
inline uint nearest_code(float value, Device<const float> codebook) {
  uint code = 0;
  for (int i = 0; i + 1 < LEVELS; i++) {
    code += value > (codebook[i] + codebook[i + 1]) / 2 ? 1 : 0;
  }
  return code;
}

// The values of one group that a lane has, every 32nd; those beyond the end are zero and count for nothing.
template <int BITS, int GROUP>
struct Group {
  CONSTANT int EACH = (GROUP + 31) / 32, LEVELS = 1 << BITS;
  float at[EACH];

  // The absolute maximum for 8 bits, otherwise the root mean square refitted twice by least squares.
  float scale(Device<const float> codebook, uint lane) const thread {
    float most = 0, energy = 0;
    UNROLL
    for (int i = 0; i < EACH; i++) {
      float size = at[i] < 0 ? -at[i] : at[i];
      most = size > most ? size : most;
      energy += at[i] * at[i];
    }
    if (BITS == 8) {
      return greatest_over_lanes(most);
    }
    float scale = sqrt(sum_over_lanes(energy) / GROUP);
    for (int refit = 0; refit < 2; refit++) {
      float along = 0, square = 0;
      UNROLL
      for (int i = 0; i < EACH; i++) {
        float value = codebook[nearest_code<LEVELS>(scale > 0 ? at[i] / scale : 0.0f, codebook)];
        along += at[i] * value;
        square += lane + 32 * i < uint(GROUP) ? value * value : 0.0f;
      }
      scale = sum_over_lanes(along) / sum_over_lanes(square);
    }
    return scale;
  }

  uint code(float value, float scale, Device<const float> codebook) const thread {
    float scaled = scale > 0 ? value / scale : 0.0f;
    if (BITS == 8) {
      scaled = scaled < -1 ? -1.0f : (scaled > 1 ? 1.0f : scaled);
      return uint(rint((scaled + 1) * 127.5f));
    }
    return nearest_code<LEVELS>(scaled, codebook);
  }
};

// Head `head` of x (heads, SIZE) to codes (heads, SIZE * BITS / 32) and scales (heads, SIZE / GROUP).
template <int BITS, int SIZE, int GROUP, int ODD, int POWER, typename T>
inline void pack_head(Device<const T> x, Device<const uint> signs, Device<const float> codebook, Device<uint> codes,
                      Device<half> scales, Shared<float> values, Shared<uint> chosen, uint head, uint lane) {
  constexpr int WORDS = SIZE * BITS / 32, GROUPS = SIZE / GROUP;
  for (uint i = lane; i < uint(SIZE); i += 32) {
    values[i] = signed_by(signs, i, static_cast<float>(x[head * SIZE + i]));
  }
  transform_heads<ODD, POWER, false, 32>(values, SIZE, lane);
  float factor = 1 / sqrt(float(ODD * POWER));
  for (int g = 0; g < GROUPS; g++) {
    Group<BITS, GROUP> group;
    UNROLL
    for (int i = 0; i < Group<BITS, GROUP>::EACH; i++) {
      uint place = lane + 32 * i;
      group.at[i] = place < uint(GROUP) ? values[g * GROUP + place] * factor : 0.0f;
    }
    float scale = group.scale(codebook, lane);
    half nearest = static_cast<half>(scale < 65504.0f ? scale : 65504.0f);
    if (lane == 0) {
      scales[head * GROUPS + g] = nearest;
    }
    UNROLL
    for (int i = 0; i < Group<BITS, GROUP>::EACH; i++) {
      if (lane + 32 * i < uint(GROUP)) {
        chosen[g * GROUP + lane + 32 * i] = group.code(group.at[i], static_cast<float>(nearest), codebook);
      }
    }
  }
  barrier();
  for (uint word = lane; word < uint(WORDS); word += 32) {
    uint first = word * 32 / BITS, bits = chosen[first] >> (word * 32 - first * BITS);
    for (uint i = first + 1; i * BITS < word * 32 + 32; i++) {
      bits |= chosen[i] << (i * BITS - word * 32);
    }
    codes[head * WORDS + word] = bits;
  }
}

} // namespace turboquant
