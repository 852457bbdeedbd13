// Packed codes and their decoding.
//
// A tile is 16 rows, a block 256 columns, a unit 64. Of each unit a lane (g = lane / 4, t = lane % 4) holds 32 codes
// in BITS words: rows g and g + 8, columns 32p + 8t + 4s + 2h + e for p, s, h, e in {0, 1}. Plane q = 2p + s has
// eight codes, nibble 4h + 2e + r of it for row g + 8r: as pairs of halves these are the four registers 2h + r of a
// 16 x 16 matrix that one step of a matrix unit takes. A code is a sign, its top bit, and the index of a magnitude. Of 3
// bits the codes of planes 0, 1 and 2 are the low bits of the nibbles of words 0, 1 and 2, plane 3 is their top bits; of 2
// bits a word holds two planes; of 4 bits one, for NVIDIA with the signs of nibbles 0 to 3 in the top bits of nibbles 1, 3, 5
// and 7, those of the others in the top bits of 0, 2, 4 and 6.
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

// The eight codes of plane q of a unit, without 4-bit signs, one in each nibble.
template <int BITS>
inline uint plane(const thread Words<BITS>& words, int unit, int q) {
  if (BITS == 2) {
    return (words.at[2 * unit + q / 2] >> (2 * (q % 2))) & 0x33333333u;
  }
  if (q < BITS) {
    return words.at[BITS * unit + q] & 0x77777777u;
  }
  uint first = words.at[BITS * unit], second = words.at[BITS * unit + 1], third = words.at[BITS * unit + BITS - 1];
  return ((first >> 3) & 0x11111111u) | ((second >> 2) & 0x22222222u) | ((third >> 1) & 0x44444444u);
}

// Eight halves' bits: their low and their high bytes, and what lanes hold for others to look up.
struct Table {
  uint low[2];
  uint high[2];
  LaneTable lanes;

  uint half_of(uint index) const {
    uint shift = 8 * (index % 4), low_word = index < 4 ? low[0] : low[1], high_word = index < 4 ? high[0] : high[1];
    return ((low_word >> shift) & 255u) | (((high_word >> shift) & 255u) << 8);
  }
};

// Whose lanes hold nothing yet.
inline Table load_bytes(Device<const uint> table) {
  Table loaded;
  UNROLL
  for (int i = 0; i < 2; i++) {
    loaded.low[i] = table[i];
    loaded.high[i] = table[2 + i];
  }
  return loaded;
}

// For weights. Lanes hold the value of a code, of 2 bits those of a code of one plane and of one of the next.
template <int BITS>
inline Table load_table(Device<const uint> table, uint lane) {
  Table loaded = load_bytes(table);
  uint one = loaded.half_of(lane % 8) ^ (BITS == 4 && lane % 16 >= 8 ? 0x8000u : 0u);
  uint two = join_bits(loaded.half_of(lane % 4), loaded.half_of(lane / 4 % 4));
  loaded.lanes = LaneTable(BITS == 2 ? two : one);
  return loaded;
}

// For machines without a byte permutation: the halves of eight codes, four in each half of a word, STEP bits from one to the
// next, as pairs of codes that are DISTANCE (1 or 2) apart; of what a lane holds the upper half or the lower. Apple's machines
// take four turns for a shift and two to ask a lane, so two codes share a shift.
template <int STEP, int DISTANCE>
inline uint4 look_up(uint codes, uint mask, bool upper, const thread Table& table) {
  uint values[8];
  UNROLL
  for (int i = 0; i < 4; i++) {
    uint two = shift_both(codes, STEP * i) & mask;
    uint first = table.lanes.at(lower_bits(two)), second = table.lanes.at(upper_bits(two));
    values[i] = upper ? upper_bits(first) : lower_bits(first);
    values[4 + i] = upper ? upper_bits(second) : lower_bits(second);
  }
  constexpr int OTHER = 3 - DISTANCE;
  return uint4{
      join_bits(values[0], values[DISTANCE]), join_bits(values[OTHER], values[3]),
      join_bits(values[4], values[4 + DISTANCE]), join_bits(values[4 + OTHER], values[7])};
}

template <int BITS, bool NVIDIA>
struct Decoder {
  // Plane q of a unit as the four registers of a 16 x 16 matrix. Of 2 bits two planes share their look-ups.
  static uint4 decode(const thread Words<BITS>& words, int unit, int q, const thread Table& table) {
    uint codes = BITS == 3 ? plane<BITS>(words, unit, q) : words.at[BITS * unit + q * BITS / 4];
    return look_up<4, 2>(codes, 0x000f000fu, BITS == 2 && q % 2 == 1, table);
  }
};

#ifdef NVIDIA_INSTRUCTIONS
// Four codes at a time: their values' low bytes, their high bytes, and the two interleaved.
template <int BITS>
struct Decoder<BITS, true> {
  static uint4 decode(const thread Words<BITS>& words, int unit, int q, const thread Table& table) {
    uint codes = plane<BITS>(words, unit, q);
    uint low_first = byte_permute(table.low[0], table.low[1], codes);
    uint high_first = byte_permute(table.high[0], table.high[1], codes);
    uint low_second = byte_permute(table.low[0], table.low[1], codes >> 16);
    uint high_second = byte_permute(table.high[0], table.high[1], codes >> 16);
    if (BITS == 4) {
      uint signs = words.at[BITS * unit + q % BITS];
      high_first ^= signs & 0x80808080u;
      high_second ^= (signs << 4) & 0x80808080u;
    }
    return uint4{
        byte_permute(low_first, high_first, 0x6240u), byte_permute(low_first, high_first, 0x7351u),
        byte_permute(low_second, high_second, 0x6240u), byte_permute(low_second, high_second, 0x7351u)};
  }
};
#endif

} // namespace turboquant
