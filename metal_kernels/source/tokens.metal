// Keys and values as a cache holds them: the codes of a token's head are a stream of bits, low bits first.
#pragma once

#include "codes.metal"

namespace turboquant {

// How many words, at most, the runs of `size` bits of a head touch.
constexpr int words_of_run(int size, int runs) {
  int most = 0;
  for (int run = 0; run < runs; run++) {
    int touched = (run * size % 32 + size + 31) / 32;
    most = touched > most ? touched : most;
  }
  return most;
}

// A lane's run of COUNT codes, one of RUNS that a head has, moved to begin at bit 0.
template <int BITS, int COUNT, int RUNS>
struct Stream {
  CONSTANT int SIZE = COUNT * BITS, WORDS = (SIZE + 31) / 32, TOUCHED = words_of_run(SIZE, RUNS);
  CONSTANT bool ALIGNED = SIZE % 32 == 0, INSIDE = (RUNS - 1) * SIZE / 32 + TOUCHED <= SIZE * RUNS / 32;
  uint at[WORDS + 1];

  // Run `which` of the head that begins with word `head` of all.
  void load(Device<const uint> all, uint head, uint which) thread {
    uint word = which * SIZE / 32, last = SIZE * RUNS / 32 - 1;
    Device<const uint> run = bytes_after(all, 4 * (head + word));
    at[WORDS] = 0;
    if (SIZE % 64 == 0) {
      load_vectors(run);
      return;
    }
    UNROLL
    for (int i = 0; i < TOUCHED; i++) {
      at[i] = INSIDE || word + i < last ? run[i] : bytes_after(all, 4 * (head + last))[0];
    }
    if (!ALIGNED) {
      UNROLL
      for (int i = 0; i < WORDS; i++) {
        at[i] = shift_right(at[i], at[i + 1], which * SIZE % 32);
      }
      at[WORDS] = 0;
    }
  }

  // Where a run begins its words can be read four or two at once.
  void load_vectors(Device<const uint> run) thread {
    UNROLL
    for (int i = 0; i + 2 <= WORDS; i += SIZE % 128 == 0 ? 4 : 2) {
      if (SIZE % 128 == 0) {
        uint4 four = load4(run + i);
        at[i] = four.x;
        at[i + 1] = four.y;
        at[i + 2 <= WORDS ? i + 2 : i] = four.z;
        at[i + 3 <= WORDS ? i + 3 : i] = four.w;
      } else {
        uint2 two = load2(run + i);
        at[i] = two.x;
        at[i + 1] = two.y;
      }
    }
  }

  // Codes 4c to 4c + 3 in the low bits.
  uint four(int c) const thread {
    int bit = 4 * BITS * c, word = bit / 32, shift = bit % 32;
    return shift + 4 * BITS <= 32 ? at[word] >> shift : shift_right(at[word], at[word + 1], uint(shift));
  }
};

struct Pairs {
  uint first, second;

  Pairs times(uint scales) const thread {
    return Pairs{multiply_pairs(first, scales), multiply_pairs(second, scales)};
  }
};

// A step of an even grid from -1 to 1, short of its last step's 1 + 1 / 255, from 1024 + its number.
inline float even_value(float raised) {
  return (raised - 1151.5f) * (1.0f / 128);
}

// The halves of four codes of the grid: a half between 1024 and 2047 counts with its low bits.
inline Pairs even_values(uint codes) {
  uint even = (codes & 0x00ff00ffu) | 0x64006400u, odd = ((codes >> 8) & 0x00ff00ffu) | 0x64006400u;
  return Pairs{pack_halves(even_value(low(even)), even_value(low(odd))),
               pack_halves(even_value(high(even)), even_value(high(odd)))};
}

// What a scale is multiplied by, so that `even_values` times it are the codebook's.
template <int BITS>
inline float scale_factor() {
  return BITS == 8 ? 256.0f / 255 : 1.0f;
}

// Lanes hold the values of all codes, in their order; of 4 bits the table has the negative ones, from the nearest to zero.
template <int BITS>
inline LaneTable token_values(Device<const uint> table, uint lane) {
  bool positive = BITS == 4 && lane % 16 >= 8;
  uint index = BITS == 4 && !positive ? 7 - lane % 8 : lane % 8;
  return LaneTable(half_of(uint4{table[0], table[1], table[2], table[3]}, index) ^ (positive ? 0x8000u : 0u));
}

// Twice four codes, in the low bits of `one` and `two`, as halves: two pairs each; values as `token_values` gives them.
template <int BITS, bool NVIDIA>
struct TokenDecoder {
  static uint4 decode(uint one, uint two, const thread LaneTable& values) {
    if (BITS == 8) {
      Pairs first = even_values(one), second = even_values(two);
      return uint4{first.first, first.second, second.first, second.second};
    }
    constexpr uint MASK = (1u << BITS) - 1;
    return look_up<BITS, 1>(join_bits(one, two), MASK | (MASK << 16), false, values);
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <>
struct TokenDecoder<8, true> {
  static uint4 decode(uint one, uint two, const thread LaneTable&) {
    Pairs first = even(one), second = even(two);
    return uint4{first.first, first.second, second.first, second.second};
  }

 private:
  static Pairs even(uint codes) {
    uint first = add_pairs(byte_permute(codes, 0x64646464u, 0x4140u), 0xe400e400u);
    uint second = add_pairs(byte_permute(codes, 0x64646464u, 0x4342u), 0xe400e400u);
    Pairs steps = Pairs{add_pairs(first, 0xd7f8d7f8u), add_pairs(second, 0xd7f8d7f8u)};
    return steps.times(0x20002000u);
  }
};

// Every second run of BITS bits, of which a word begins with bit `begin` of two.
template <int BITS>
constexpr uint every_second(int begin) {
  uint bits = 0;
  for (int i = 0; i < 32; i++) {
    bits |= (begin + i) % (2 * BITS) < BITS ? 1u << i : 0u;
  }
  return bits;
}

// Codes of two tokens next to each other, a pair's number from every second code: of even codes, and of odd ones.
template <int BITS, int WORDS>
struct CodesOfTwo {
  CONSTANT uint FIRST[3] = {
      every_second<BITS>(0), every_second<BITS>(32 % (2 * BITS)), every_second<BITS>(64 % (2 * BITS))};
  uint even[WORDS], odd[WORDS];

  CodesOfTwo(const thread uint (&one)[WORDS + 1], const thread uint (&two)[WORDS + 1]) {
    UNROLL
    for (int i = 0; i < WORDS; i++) {
      uint up = i > 0 ? shift_right(two[i > 0 ? i - 1 : 0], two[i], 32 - BITS) : two[0] << BITS;
      even[i] = select_bits(first_of_two(i), one[i], up);
      odd[i] = select_bits(first_of_two(i), shift_right(one[i], one[i + 1], BITS), two[i]);
    }
  }

  // Bits of word `word` that belong to the first of two codes.
  static constexpr uint first_of_two(int word) {
    return word % 3 == 0 ? FIRST[0] : word % 3 == 1 ? FIRST[1] : FIRST[2];
  }
};
#endif

// A lane's run of one head of a token, its codes and where its scales are.
template <int BITS, int GROUP, int SIZE, int RUNS>
struct TokenRun {
  CONSTANT int COUNT = SIZE / RUNS, WORDS = SIZE * BITS / 32, GROUPS = SIZE / GROUP;
  CONSTANT int STREAM_WORDS = Stream<BITS, COUNT, RUNS>::WORDS;
  CONSTANT bool ONE_SCALE = GROUP % COUNT == 0;
  Stream<BITS, COUNT, RUNS> codes;
  Device<const half> scales;
  uint first_scale, which, scale;

  TokenRun(Device<const uint> all, Device<const half> all_scales, uint token, uint run)
      : codes(read(all, token, run)), scales(all_scales), first_scale(token * GROUPS), which(run),
        scale(scale_at(all_scales, token * GROUPS + run * COUNT / GROUP)) {}

  // Members of what is being made are not where a thread's own lie, to Metal from 4.1 on.
  static Stream<BITS, COUNT, RUNS> read(Device<const uint> all, uint token, uint run) {
    Stream<BITS, COUNT, RUNS> made;
    made.load(all, token * WORDS, run);
    return made;
  }

  static uint scale_at(Device<const half> scales, uint place) {
    float factor = static_cast<float>(bytes_after(scales, 2 * place)[0]) * scale_factor<BITS>();
    return pack_halves(factor, factor);
  }

  uint scale_of(int c) const thread {
    return scale_at(scales, first_scale + (which * COUNT + 4 * c) / GROUP);
  }

  // Values 8c to 8c + 7 of which a run may lack the last four, to be multiplied by `factor`.
  uint4 eight(int c, const thread LaneTable& values) const thread {
    bool whole = 8 * c + 4 < COUNT;
    uint4 all = TokenDecoder<BITS, false>::decode(codes.four(2 * c), whole ? codes.four(2 * c + 1) : 0, values);
    if (ONE_SCALE) {
      return all;
    }
    uint first = scale_of(2 * c), second = whole ? scale_of(2 * c + 1) : first;
    return uint4{multiply_pairs(all.x, first), multiply_pairs(all.y, first), multiply_pairs(all.z, second),
                 multiply_pairs(all.w, second)};
  }

  float factor() const thread {
    return ONE_SCALE ? low(scale) : 1.0f;
  }

  // The scale, twice, of codes 4c to 4c + 3.
  uint scales_of(int c) const thread {
    return ONE_SCALE ? scale : scale_of(c);
  }

  // Values 4c to 4c + 3 of this token, and of another one: two pairs each.
  template <bool NVIDIA>
  uint4 values_with(const thread TokenRun& other, int c, const thread LaneTable& values) const thread {
    uint4 all = TokenDecoder<BITS, NVIDIA>::decode(codes.four(c), other.codes.four(c), values);
    uint mine = scales_of(c), others = other.scales_of(c);
    return uint4{multiply_pairs(all.x, mine), multiply_pairs(all.y, mine), multiply_pairs(all.z, others),
                 multiply_pairs(all.w, others)};
  }
};

} // namespace turboquant
