// Rotated weights to codes and scales: a simdgroup for each group of values that share a scale.
#pragma once

#include "lanes.metal"

namespace turboquant {

// A codebook, ascending, and the edges between its values.
template <int LEVELS>
struct Levels {
  float values[LEVELS];
  float edges[LEVELS];

  float nearest(float x) const thread {
    float value = values[0];
    UNROLL
    for (int i = 1; i < LEVELS; i++) {
      value = x > edges[i] ? values[i] : value;
    }
    return value;
  }

  uint code(float x) const thread {
    uint code = 0;
    UNROLL
    for (int i = 1; i < LEVELS; i++) {
      code += x > edges[i] ? 1 : 0;
    }
    return code;
  }
};

template <int LEVELS>
inline Levels<LEVELS> load_levels(Device<const float> codebook) {
  Levels<LEVELS> levels;
  UNROLL
  for (int i = 0; i < LEVELS; i++) {
    levels.values[i] = codebook[i];
    levels.edges[i] = (codebook[i > 0 ? i - 1 : 0] + codebook[i]) / 2;
  }
  return levels;
}

inline float divisor_of(float scale) {
  return scale > 0 ? scale : 1.0f;
}

struct Fit {
  float scale;
  float gain;
};

// The least-squares scale for the codes that `scale` assigns to `size` values, and how much of them it accounts for.
template <int LEVELS>
inline Fit fit(Device<const float> x, uint size, float scale, const thread Levels<LEVELS>& levels, uint lane) {
  float along = 0, energy = 0, divisor = divisor_of(scale);
  for (uint i = lane; i < size; i += 32) {
    float value = levels.nearest(x[i] / divisor);
    along += x[i] * value;
    energy += value * value;
  }
  along = sum_over_lanes(along);
  energy = sum_over_lanes(energy);
  return Fit{along / energy, along * along / energy};
}

// The best of the scales that FACTORS multiples of the root mean square lead to, refitted; without any, that itself.
template <int LEVELS, int FACTORS>
inline float search_scale(Device<const float> x, uint size, Device<const float> factors,
                          const thread Levels<LEVELS>& levels, uint lane) {
  float energy = 0;
  for (uint i = lane; i < size; i += 32) {
    energy += x[i] * x[i];
  }
  float rms = sqrt(sum_over_lanes(energy) / float(size));
  if (FACTORS == 0) {
    return rms;
  }
  Fit best = Fit{rms, -1.0f};
  for (int f = 0; f < FACTORS; f++) {
    Fit tried = fit<LEVELS>(x, size, rms * factors[f], levels, lane);
    best = tried.gain > best.gain ? tried : best;
  }
  float scale = fit<LEVELS>(x, size, best.scale, levels, lane).scale;
  return scale < 0 ? 0.0f : scale;
}

// Of the words that 32 codes fill, one code of each lane, the one that is this lane's: the first BITS lanes have one.
template <int BITS>
inline uint packed_word(uint code, uint lane) {
  uint word = 0;
  for (int i = 0; i < 32; i++) {
    int shift = i * BITS - 32 * int(lane);
    uint other = uint(shuffle(float(code), uint(i)));
    if (shift > -BITS && shift < 32) {
      word |= shift < 0 ? other >> -shift : other << shift;
    }
  }
  return word;
}

// Group `group` of `size` values, a multiple of 32, of x to its scale and size * BITS / 32 words.
template <int BITS, int FACTORS>
inline void quantize_group(Device<const float> all, Device<const float> codebook, Device<const float> factors,
                           Device<uint> codes, Device<half> scales, uint size, uint group, uint lane) {
  constexpr int LEVELS = 1 << BITS;
  Levels<LEVELS> levels = load_levels<LEVELS>(codebook);
  Device<const float> x = all + group * size;
  float scale = search_scale<LEVELS, FACTORS>(x, size, factors, levels, lane);
  half nearest = static_cast<half>(scale > 65504.0f ? 65504.0f : scale);
  if (lane == 0) {
    scales[group] = nearest;
  }
  float divisor = divisor_of(static_cast<float>(nearest));
  for (uint first = 0; first < size; first += 32) {
    uint word = packed_word<BITS>(levels.code(x[first + lane] / divisor), lane);
    if (lane < uint(BITS)) {
      codes[(group * size + first) / 32 * BITS + lane] = word;
    }
  }
}

} // namespace turboquant
