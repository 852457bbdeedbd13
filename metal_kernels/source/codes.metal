// Packed codes and their decoding.
//
// A tile is 16 rows, a block 256 columns, a unit 64. Of each unit a lane (g = lane / 4, t = lane % 4) holds 32 codes
// in BITS words: rows g and g + 8, columns 32p + 8t + 4s + 2h + e for p, s, h, e in {0, 1}. Plane q = 2p + s has eight codes,
// of rows g + 8r: as pairs of halves (e = 0 and 1) these are the four registers 2h + r of a 16 x 16 matrix that one step of
// a matrix unit takes. A code is a sign, its top bit, and the index of a magnitude.
//
// In nibbles: nibble 4h + 2e + r of a plane's word. Of 4 bits a word holds a plane; of 2 bits it holds two, the second two bits
// above; of 3 bits words 0, 1 and 2 hold planes 0, 1 and 2, and the top bits of their nibbles plane 3.
//
// For NVIDIA in bytes: byte 2h + r of a plane's word holds a register's pair, e = 0 in its low bits. Of 4 bits a word holds a
// plane; of 2 bits it holds two, and a byte, h of the plane's, the pairs of two registers, r = 0 in its low bits; of 3 bits
// words 0, 1 and 2 hold planes 0, 1 and 2, and the top two bits of each of their bytes the pairs of plane 3, low bits first.
#pragma once

namespace turboquant {

template <int BITS>
struct Words {
  uint at[4 * BITS];
};

// A lane's words of a block; `at` is where its first four lie, those of the lanes beside it follow.
template <int BITS>
inline Words<BITS> load_words(Device<const uint> at) {
  Words<BITS> words;
  UNROLL
  for (int j = 0; j < BITS; j++) {
    uint4 four = load4_once(at + 128 * j);
    words.at[4 * j] = four.x;
    words.at[4 * j + 1] = four.y;
    words.at[4 * j + 2] = four.z;
    words.at[4 * j + 3] = four.w;
  }
  return words;
}

// Of 3 bits, plane q of a unit, a code in each nibble.
template <int BITS>
inline uint nibbles_of_three(const thread Words<BITS>& words, int unit, int q) {
  uint first = words.at[BITS * unit], second = words.at[BITS * unit + 1], third = words.at[BITS * unit + BITS - 1];
  if (q == 3) {
    return ((first >> 3) & 0x11111111u) | ((second >> 2) & 0x22222222u) | ((third >> 1) & 0x44444444u);
  }
  return (q == 0 ? first : q == 1 ? second : third) & 0x77777777u;
}

// One of eight halves, whose low bytes a table has in x and y and whose high bytes in z and w.
inline uint half_of(uint4 table, uint index) {
  uint shift = 8 * (index % 4), low_word = index < 4 ? table.x : table.y, high_word = index < 4 ? table.z : table.w;
  return ((low_word >> shift) & 255u) | (((high_word >> shift) & 255u) << 8);
}

// Lanes hold the value of a code, of 2 bits those of a code of one plane and of one of the next.
template <int BITS>
inline LaneTable weight_values(uint4 table, uint lane) {
  uint one = half_of(table, lane % 8) ^ (BITS == 4 && lane % 16 >= 8 ? 0x8000u : 0u);
  uint two = join_bits(half_of(table, lane % 4), half_of(table, lane / 4 % 4));
  return LaneTable(BITS == 2 ? two : one);
}

// For machines without a byte permutation: the halves of eight codes, four in each half of a word, STEP bits from one to the
// next, as pairs of codes that are DISTANCE (1 or 2) apart; of what a lane holds the upper half or the lower. Apple's machines
// take four turns for a shift and two to ask a lane, so two codes share a shift.
template <int STEP, int DISTANCE>
inline uint4 look_up(uint codes, uint mask, bool upper, const thread LaneTable& values_of) {
  uint values[8];
  UNROLL
  for (int i = 0; i < 4; i++) {
    uint two = shift_both(codes, STEP * i) & mask;
    uint first = values_of.at(lower_bits(two)), second = values_of.at(upper_bits(two));
    values[i] = upper ? upper_bits(first) : lower_bits(first);
    values[4 + i] = upper ? upper_bits(second) : lower_bits(second);
  }
  constexpr int OTHER = 3 - DISTANCE;
  return uint4{
      join_bits(values[0], values[DISTANCE]), join_bits(values[OTHER], values[3]),
      join_bits(values[4], values[4 + DISTANCE]), join_bits(values[4 + OTHER], values[7])};
}

// What weights are decoded with, from a kernel's compile-time values, see `half_of`; FEW: for few rows. By asking other lanes:
// without threadgroup memory.
template <int BITS, bool FEW, bool NVIDIA>
struct Decoder {
  CONSTANT int WORDS = 1;
  LaneTable values;

  Decoder(uint4 table, Shared<uint>, uint lane) : values(weight_values<BITS>(table, lane)) {}

  // By all of a threadgroup's THREADS threads, a barrier before any decodes.
  template <int THREADS>
  void fill(uint) const thread {}

  // Plane q of a unit as the four registers of a 16 x 16 matrix. Of 2 bits two planes share their look-ups.
  uint4 decode(const thread Words<BITS>& words, int unit, int q) const thread {
    uint codes = BITS == 3 ? nibbles_of_three(words, unit, q) : words.at[BITS * unit + q * BITS / 4];
    return look_up<4, 2>(codes, 0x000f000fu, BITS == 2 && q % 2 == 1, values);
  }
};

#ifdef NVIDIA_INSTRUCTIONS
// Of a stream of words, the word whose bit PLACE is bit `bit` of the stream, with COUNT bits from there on.
template <int PLACE, int COUNT, int WORDS>
inline uint placed(const thread uint (&words)[WORDS], int bit) {
  int word = bit / 32, shift = bit % 32;
  if (shift + COUNT > 32) {
    return shift_right(words[word], words[word + 1 < WORDS ? word + 1 : word], uint(shift - PLACE));
  }
  return shift < PLACE ? words[word] << (PLACE - shift) : words[word] >> (shift - PLACE);
}

// In threadgroup memory, the halves of every pair of codes, a word for each lane, so that a simdgroup's lanes do not wait for
// each other. A pair's number is first + (second << BITS). 8 bits have no table.
template <int BITS>
struct PairTable {
  CONSTANT int PLACE = 7, PAIRS = BITS > 4 ? 0 : 1 << (2 * BITS % 16), WORDS = 32 * PAIRS;
  CONSTANT uint NUMBERS = (uint(PAIRS) - 1) << PLACE;
  Shared<uint> words;
  // Of the lane, in bytes.
  uint place;

  PairTable(Shared<uint> memory, uint lane) : words(memory), place(4 * lane) {}

  // By all of SIMDGROUPS simdgroups, from what lanes hold; others see it after a barrier.
  template <int SIMDGROUPS>
  void fill(const thread LaneTable& values, uint simdgroup, uint lane) const thread {
    for (uint pair = simdgroup; pair < uint(PAIRS); pair += SIMDGROUPS) {
      words[32 * pair + lane] = join_bits(values.at(pair % (1u << BITS)), values.at(pair >> BITS));
    }
  }

  // The pair whose number begins at bit PLACE.
  uint at(uint codes) const thread {
    return word_at(words, (codes & NUMBERS) | place);
  }
};

// Bits of `one` where the mask has any, of `other` elsewhere.
inline uint select_bits(uint mask, uint one, uint other) {
  return (one & mask) | (other & ~mask);
}

// Of 3 bits, plane 3 of a unit: two bits of each pair on top of each word's bytes. The uppermost two of each byte are others'.
inline uint last_pairs(uint first, uint second, uint third) {
  return select_bits(0x0f0f0f0fu, select_bits(0x03030303u, first >> 6, second >> 4), third >> 2);
}

// Plane q of a unit: a byte for a register's pair, of 2 bits half a byte, in the lower or the upper two of four.
template <int BITS>
inline uint pairs_of_plane(const thread Words<BITS>& words, int unit, int q) {
  constexpr int LAST = BITS - 1;
  if (BITS == 3 && q == 3) {
    return last_pairs(words.at[BITS * unit], words.at[BITS * unit + 1], words.at[BITS * unit + LAST]);
  }
  return words.at[BITS * unit + (BITS == 2 ? q / 2 : q % BITS)];
}

// By a table in threadgroup memory, with a row of 256 bytes for every byte of codes: the halves of its codes, a word for each
// lane, of 2 bits two, so that a simdgroup's lanes do not wait for each other and one byte permutation makes an address.
template <int BITS>
struct Decoder<BITS, true, true> {
  // A row's words, of 3 and 4 bits half of them empty, all words, and vectors of half a row.
  CONSTANT int ROW = 64, WORDS = 256 * ROW, HALF = BITS == 2 ? 8 : 4;
  LaneTable values;
  Shared<uint> rows;
  // Of the lane, in bytes.
  uint place;

  Decoder(uint4 table, Shared<uint> memory, uint lane)
      : values(weight_values<BITS>(table, lane)), rows(memory), place(lane * (BITS == 2 ? 8 : 4)) {}

  // Half a row at a time, in an order in which lanes beside each other write to all banks.
  template <int THREADS>
  void fill(uint index) const thread {
    for (uint i = index; i < 512; i += THREADS) {
      uint byte = i / 2, first = values.at(BITS == 3 ? byte % 8 : byte % 16);
      uint second = values.at(BITS == 3 ? byte / 8 % 8 : byte / 16);
      uint one = BITS == 2 ? first : join_bits(first, second), two = BITS == 2 ? second : one;
      UNROLL
      for (uint j = 0; j < uint(HALF); j++) {
        store4(rows + (byte * ROW + (i % 2 * HALF + (byte + i % 2 * 4 + j) % HALF) * 4), uint4{one, two, one, two});
      }
    }
  }

  uint4 decode(const thread Words<BITS>& words, int unit, int q) const thread {
    uint codes = pairs_of_plane(words, unit, q);
    if (BITS == 2) {
      uint first = uint(q) % 2 * 2;
      uint2 early = two_words_at(rows, address(codes, first)), late = two_words_at(rows, address(codes, first + 1));
      return uint4{early.x, early.y, late.x, late.y};
    }
    return uint4{word_at(rows, address(codes, 0)), word_at(rows, address(codes, 1)), word_at(rows, address(codes, 2)),
                 word_at(rows, address(codes, 3))};
  }

 private:
  uint address(uint codes, uint byte) const thread {
    return byte_permute(codes, place, 0x5504u | (byte << 4));
  }
};

// For many rows: by a table of pairs, which leaves memory for activations.
template <int BITS>
struct Decoder<BITS, false, true> {
  CONSTANT int WORDS = PairTable<BITS>::WORDS;
  LaneTable values;
  PairTable<BITS> pairs;

  Decoder(uint4 table, Shared<uint> memory, uint lane) : values(weight_values<BITS>(table, lane)), pairs(memory, lane) {}

  template <int THREADS>
  void fill(uint index) const thread {
    pairs.template fill<THREADS / 32>(values, index / 32, index % 32);
  }

  uint4 decode(const thread Words<BITS>& words, int unit, int q) const thread {
    uint codes[1] = {pairs_of_plane(words, unit, q)}, found[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
      found[i] = pairs.at(placed<PairTable<BITS>::PLACE, 2 * BITS>(codes, BITS == 2 ? q % 2 * 16 + 4 * i : 8 * i));
    }
    return uint4{found[0], found[1], found[2], found[3]};
  }
};

// By byte permutations: for matrix units that read threadgroup memory as fast as it is, which a table would slow down.
template <int BITS>
struct Permuter {
  // The bytes of eight halves, see `half_of`.
  uint4 table;

  uint4 decode(const thread Words<BITS>& words, int unit, int q) const thread {
    uint codes = nibbles(pairs_of_plane(words, unit, q), q), late = codes >> 16;
    uint2 first = two_pairs(codes), second = two_pairs(late);
    return uint4{first.x, first.y, second.x, second.y};
  }

 private:
  // A plane's eight codes, each in a nibble, from a byte or, of 2 bits, half a byte of a pair each.
  static uint nibbles(uint codes, int q) {
    if (BITS == 2) {
      uint bytes = byte_permute(codes, 0, q % 2 ? 0x4342u : 0x4140u);
      uint halves = (bytes | bytes << 4) & 0x0f0f0f0fu;
      return (halves | halves << 2) & 0x33333333u;
    }
    return BITS == 3 ? (codes & 0x07070707u) | ((codes << 1) & 0x70707070u) : codes;
  }

  // The halves of the codes in the four lowest nibbles.
  uint2 two_pairs(uint codes) const thread {
    uint indices = BITS == 4 ? codes & 0x7777u : codes;
    uint low = byte_permute(table.x, table.y, indices), high = byte_permute(table.z, table.w, indices);
    if (BITS == 4) {
      // A nibble's uppermost bit is the sign of its half, whose upper byte is in `high`.
      uint twice = byte_permute(codes, 0, 0x1100u);
      high ^= select_bits(0x00ff00ffu, twice << 4, twice) & 0x80808080u;
    }
    return uint2{byte_permute(low, high, 0x5140u), byte_permute(low, high, 0x7362u)};
  }
};
#endif

} // namespace turboquant
