// Attention of many rows of queries over packed keys and values, on matrix units.
//
// A threadgroup takes a strip of rows for each simdgroup, which share one head of keys and values, and one part of the
// tokens, 64 at a time: its threads decode their keys into threadgroup memory, every simdgroup multiplies its queries by
// them, and then values take the keys' place. Queries, scores and sums stay in registers, in each lane's seat, see
// matrix.metal; of 64 tokens the scores of eight at a time are, two by two, what the next product takes as its planes.
#pragma once

#include "attention.metal"
#include "matrix.metal"

namespace turboquant {

CONSTANT int TILE_TOKENS = 64;

// Four values of one token, then of another.
template <bool NVIDIA>
struct TwoTokens {
  template <typename RUN>
  static uint4 values(const thread RUN& one, const thread RUN& two, int c, const thread Table& table) {
    Pairs first = one.values(c, table), second = two.values(c, table);
    return uint4{first.first, first.second, second.first, second.second};
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <>
struct TwoTokens<true> {
  template <typename RUN>
  static uint4 values(const thread RUN& one, const thread RUN& two, int c, const thread Table& table) {
    return one.values_with(two, c, table);
  }
};
#endif

// Rows of a simdgroup as a matrix unit takes them: row g, on NVIDIA, whose units have twice as many, row g + 8 too. A lane has
// two pairs of a plane's values for each, and of sums the two of its columns. Apple's have half the registers.
template <bool NVIDIA>
struct Strip {
  CONSTANT int EACH = 1;

  static void multiply(thread float (&sums)[2], const thread uint (&rows)[2], uint first, uint second) {
    multiply_eights(sums[0], sums[1], rows[0], first);
    multiply_eights(sums[0], sums[1], rows[1], second);
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <>
struct Strip<true> {
  CONSTANT int EACH = 2;

  static void multiply(thread float (&sums)[4], const thread uint (&rows)[4], uint first, uint second) {
    matrix_multiply(sums, uint4{rows[0], rows[1], rows[2], rows[3]}, first, second);
  }
};
#endif

// The keys of a tile's tokens as columns of SIZE values, 64 at a time, or its values as columns of 64 tokens; THREADS decode
// them. Tokens beyond `last` are the last one.
template <int BITS, int GROUP, int SIZE, int THREADS, bool NVIDIA>
struct Tile {
  using Run = TokenRun<BITS, GROUP, SIZE, SIZE / 8>;
  using Unit = MatrixUnit<NVIDIA>;
  using Both = TwoTokens<NVIDIA>;
  CONSTANT uint HALF_UNITS = (SIZE + 31) / 32, VECTORS = 4 * HALF_UNITS;
  Device<const uint> codes;
  Device<const half> scales;
  uint last;

  // To (units, 64 tokens, 8 vectors), zeros after SIZE.
  void stage_keys(Shared<uint4> tile, const thread Table& table, uint start, uint index) const {
    for (uint i = index; i < VECTORS * (TILE_TOKENS / 2); i += THREADS) {
      uint vector = i % VECTORS, token = i / VECTORS, other = token + TILE_TOKENS / 2;
      uint4 first = uint4{0, 0, 0, 0}, second = uint4{0, 0, 0, 0};
      if (vector < SIZE / 8) {
        Run one(codes, scales, least(start + token), vector), two(codes, scales, least(start + other), vector);
        uint4 early = Both::values(one, two, 0, table), late = Both::values(one, two, 1, table);
        first = uint4{early.x, early.y, late.x, late.y};
        second = uint4{early.z, early.w, late.z, late.w};
      }
      Shared<uint4> unit = tile + vector / 8 * (8 * TILE_TOKENS);
      unit[Unit::place(token, vector % 8)] = first;
      unit[Unit::place(other, vector % 8)] = second;
    }
  }

  // To (SIZE, 8 vectors): vector 4p + t has tokens 32p + 16s + 8h + 2t + e in the order of (s, h, e).
  void stage_values(Shared<uint4> tile, const thread Table& table, uint start, uint index) const {
    for (uint i = index; i < uint(SIZE); i += THREADS) {
      uint vector = i % 8, run = i / 8, first = start + vector / 4 * 32 + vector % 4 * 2;
      uint columns[8][4];
      UNROLL
      for (int k = 0; k < 4; k++) {
        uint token = first + 8 * k;
        Run one(codes, scales, least(token), run), two(codes, scales, least(token + 1), run);
        UNROLL
        for (int c = 0; c < 2; c++) {
          uint4 four = Both::values(one, two, c, table);
          columns[4 * c][k] = MatrixUnit<false>::pair_of(four.x, four.z, 0);
          columns[4 * c + 1][k] = MatrixUnit<false>::pair_of(four.x, four.z, 1);
          columns[4 * c + 2][k] = MatrixUnit<false>::pair_of(four.y, four.w, 0);
          columns[4 * c + 3][k] = MatrixUnit<false>::pair_of(four.y, four.w, 1);
        }
      }
      UNROLL
      for (int c = 0; c < 8; c++) {
        tile[Unit::place(8 * run + c, vector)] = uint4{columns[c][0], columns[c][1], columns[c][2], columns[c][3]};
      }
    }
  }

  uint least(uint token) const {
    return token < last ? token : last;
  }
};

// One simdgroup's strip of rows: queries, running maxima and sums, and weighted sums of values.
template <int KEY_SIZE, int VALUE_SIZE, bool NVIDIA>
struct TileRows {
  using Unit = MatrixUnit<NVIDIA>;
  using Mine = Strip<NVIDIA>;
  CONSTANT int HALF_UNITS = (KEY_SIZE + 31) / 32, EIGHTS = TILE_TOKENS / 8, COLUMNS = VALUE_SIZE / 8;
  CONSTANT int EACH = Mine::EACH, ROWS = 8 * EACH;
  // Of the four lanes that share rows.
  CONSTANT uint NEAR = 1, FAR = NVIDIA ? 2 : 8;
  uint queries[2 * HALF_UNITS][2 * EACH], weights[EIGHTS / 2][2 * EACH];
  float factors[EACH], most[EACH], sums[EACH];
  float scores[EIGHTS][2 * EACH], out[COLUMNS][2 * EACH];

  TileRows() {
    UNROLL
    for (int r = 0; r < EACH; r++) {
      most[r] = NOTHING;
      sums[r] = 0;
    }
    UNROLL
    for (int i = 0; i < COLUMNS * 2 * EACH; i++) {
      out[i / (2 * EACH)][i % (2 * EACH)] = 0;
    }
  }

  // Rotated queries (ROWS, KEY_SIZE) and what `rotate_queries` gives with them.
  void take(Shared<float> values, Shared<float> turned, uint seat) {
    UNROLL
    for (int q = 0; q < 2 * HALF_UNITS; q++) {
      uint column = q / 2 * 32 + seat % 4 * 8 + q % 2 * 4;
      UNROLL
      for (int i = 0; i < 2 * EACH; i++) {
        uint row = seat / 4 + 8 * (i % EACH);
        queries[q][i] = column < KEY_SIZE ? pair_of_row<KEY_SIZE>(values, turned, row, column + 2 * (i / EACH)) : 0;
      }
    }
    UNROLL
    for (int r = 0; r < EACH; r++) {
      factors[r] = turned[ROWS + seat / 4 + 8 * r];
    }
  }

  void score(Shared<uint4> keys, uint seat) {
    UNROLL
    for (int j = 0; j < EIGHTS; j++) {
      UNROLL
      for (int i = 0; i < 2 * EACH; i++) {
        scores[j][i] = 0;
      }
    }
    UNROLL
    for (int p = 0; p < HALF_UNITS; p++) {
      UNROLL
      for (int j = 0; j < EIGHTS; j++) {
        uint4 k = Unit::operands(keys + p / 2 * (8 * TILE_TOKENS), 8 * j, p % 2, seat);
        Mine::multiply(scores[j], queries[2 * p], k.x, k.y);
        Mine::multiply(scores[j], queries[2 * p + 1], k.z, k.w);
      }
    }
  }

  // Makes weights of the scores of the tokens from `start` on; `first`: the first of the rows.
  template <int MASK>
  void weigh(const thread Sight<MASK>& sight, uint first, uint start, uint end, uint seat) {
    bool all_seen = sight.sees_all(first, ROWS, start, TILE_TOKENS, end);
    UNROLL
    for (int j = 0; j < EIGHTS; j++) {
      UNROLL
      for (int i = 0; i < 2 * EACH; i++) {
        float score = scores[j][i] * factors[i / 2];
        uint row = first + seat / 4 + 8 * (i / 2), token = start + 8 * j + seat % 4 * 2 + i % 2;
        scores[j][i] = all_seen ? score : sight.score(score, row, token, end);
      }
    }
    UNROLL
    for (int r = 0; r < EACH; r++) {
      float now = most[r];
      UNROLL
      for (int j = 0; j < EIGHTS; j++) {
        now = larger(now, larger(scores[j][2 * r], scores[j][2 * r + 1]));
      }
      now = larger(now, shuffle_xor(now, NEAR));
      now = larger(now, shuffle_xor(now, FAR));
      float kept = shrink(most[r], now);
      most[r] = now;
      sums[r] *= kept;
      UNROLL
      for (int n = 0; n < COLUMNS; n++) {
        out[n][2 * r] *= kept;
        out[n][2 * r + 1] *= kept;
      }
      UNROLL
      for (int j = 0; j < EIGHTS; j++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
          scores[j][2 * r + e] = weight_of(scores[j][2 * r + e], now);
          sums[r] += scores[j][2 * r + e];
        }
      }
    }
    UNROLL
    for (int q = 0; q < EIGHTS / 2; q++) {
      UNROLL
      for (int i = 0; i < 2 * EACH; i++) {
        int j = 2 * q + i / EACH, r = i % EACH;
        weights[q][i] = pack_halves(scores[j][2 * r], scores[j][2 * r + 1]);
      }
    }
  }

  void add(Shared<uint4> values, uint seat) {
    UNROLL
    for (int p = 0; p < 2; p++) {
      UNROLL
      for (int n = 0; n < COLUMNS; n++) {
        uint4 v = Unit::operands(values, 8 * n, p, seat);
        Mine::multiply(out[n], weights[2 * p], v.x, v.y);
        Mine::multiply(out[n], weights[2 * p + 1], v.z, v.w);
      }
    }
  }

  // To `all`, the first row's place, rows `stride` apart: sums, maximum and total; rows from `first` on that there are.
  void write(Device<float> all, uint stride, uint first, uint rows, uint seat) {
    UNROLL
    for (int r = 0; r < EACH; r++) {
      sums[r] += shuffle_xor(sums[r], NEAR);
      sums[r] += shuffle_xor(sums[r], FAR);
      uint row = first + seat / 4 + 8 * r;
      if (row < rows) {
        Device<float> mine = all + row * stride;
        UNROLL
        for (int n = 0; n < COLUMNS; n++) {
          mine[8 * n + seat % 4 * 2] = out[n][2 * r];
          mine[8 * n + seat % 4 * 2 + 1] = out[n][2 * r + 1];
        }
        if (seat % 4 == 0) {
          mine[VALUE_SIZE] = most[r];
          mine[VALUE_SIZE + 1] = sums[r];
        }
      }
    }
  }
};

} // namespace turboquant
