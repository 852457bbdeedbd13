// The Hadamard matrices of 12, 20 and 28, as MLX has them.
#pragma once

namespace turboquant {

// Row b, one bit a column, set for minus.
template <int ODD>
constexpr uint minus_of_row(int b) {
  constexpr uint of_12[12] = {0x002, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba, 0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a};
  constexpr uint of_20[20] = {
      0x933de, 0x2e3bd, 0x5477b, 0xa0ef7, 0x499ef, 0x637c1, 0xc6ba2, 0x8d764, 0x1aee8, 0x359f0,
      0x0fa53, 0x174a7, 0x26d4e, 0x45e9c, 0x83d39, 0xf7a6d, 0xef4fa, 0xdedd5, 0xbdf8b, 0x7bf36};
  constexpr uint of_28[28] = {
      0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87, 0xd593d8e,
      0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0x0ff66ca, 0x1decd95, 0x39ddb2a, 0x71bf654, 0xe17eca9,
      0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6, 0x7e7a94c};
  return ODD == 12 ? of_12[b % 12] : (ODD == 20 ? of_20[b % 20] : of_28[b % 28]);
}

// Whether value a has a minus in sum b of the matrix, or, BACK, of its transpose.
template <int ODD, bool BACK>
constexpr uint minus(int b, int a) {
  return (minus_of_row<ODD>(BACK ? a : b) >> (BACK ? b : a)) & 1u;
}

// Value b of ODD values times the matrix. The signs are part of the code where b is a constant.
template <int ODD>
inline float odd_sum(const thread float (&values)[ODD], int b) {
  float sums[4] = {0, 0, 0, 0};
  UNROLL
  for (int a = 0; a < ODD; a++) {
    float value = minus<ODD, false>(b, a) ? -values[a] : values[a];
    sums[a % 4] = a < 4 ? value : sums[a % 4] + value;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// All ODD of them, for which every four values are summed once with each of the eight patterns of signs that there are
// besides their opposites: a third of the additions.
template <int ODD, bool BACK>
struct OddSums {
  float fours[ODD / 4][8];

  OddSums(const thread float (&values)[ODD]) {
    UNROLL
    for (int i = 0; i < ODD / 4; i++) {
      float pairs[4] = {values[4 * i] + values[4 * i + 1], values[4 * i] - values[4 * i + 1],
                        values[4 * i + 2] + values[4 * i + 3], values[4 * i + 2] - values[4 * i + 3]};
      UNROLL
      for (int pattern = 0; pattern < 8; pattern++) {
        float one = pairs[pattern & 1], two = pairs[2 + ((pattern >> 1 ^ pattern >> 2) & 1)];
        fours[i][pattern] = pattern & 2 ? one - two : one + two;
      }
    }
  }

  float at(int b) const thread {
    float sum = 0;
    UNROLL
    for (int i = 0; i < ODD / 4; i++) {
      uint first = minus<ODD, BACK>(b, 4 * i), pattern = 0;
      UNROLL
      for (int j = 1; j < 4; j++) {
        pattern |= (minus<ODD, BACK>(b, 4 * i + j) ^ first) << (j - 1);
      }
      float four = first ? -fours[i][pattern] : fours[i][pattern];
      sum = i == 0 ? four : sum + four;
    }
    return sum;
  }
};

template <bool BACK>
struct OddSums<1, BACK> {
  float only;

  OddSums(const thread float (&values)[1]) : only(values[0]) {}

  float at(int) const thread {
    return only;
  }
};

} // namespace turboquant
