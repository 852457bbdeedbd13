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

// The keys of a tile's tokens, which a threadgroup's THREADS fetch and, when there is room for them, decode: columns of SIZE
// values.
template <int BITS, int GROUP, int SIZE, int THREADS, bool NVIDIA>
struct KeyTile {
  using Unit = MatrixUnit<NVIDIA>;
  CONSTANT int VECTORS = (SIZE + 31) / 32 * 4, ALL = VECTORS * TILE_TOKENS / 2, EACH = (ALL + THREADS - 1) / THREADS;
  Eight<BITS, SIZE> at[EACH][2];

  // Turn k: a vector of `token` and of the token TILE_TOKENS / 2 after it; vectors after SIZE are zero.
  static uint vector(int k, uint index) {
    return THREADS % VECTORS == 0 ? index % VECTORS : (index + k * THREADS) % VECTORS;
  }

  static uint token(int k, uint index) {
    return THREADS % VECTORS == 0 ? index / VECTORS + k * (THREADS / VECTORS) : (index + k * THREADS) / VECTORS;
  }

  static bool there(int k, uint index) {
    return ALL % THREADS == 0 || index + k * THREADS < uint(ALL);
  }

  void fetch(const thread Context<BITS, GROUP, SIZE>& context, uint start, uint index) {
    UNROLL
    for (int k = 0; k < EACH; k++) {
      uint run = SIZE % 32 == 0 || vector(k, index) < SIZE / 8 ? vector(k, index) : 0;
      if (there(k, index)) {
        context.load(at[k][0], start + token(k, index), run);
        context.load(at[k][1], start + token(k, index) + TILE_TOKENS / 2, run);
      }
    }
  }

  // To (units, 64 tokens, 8 vectors).
  void store(Shared<uint4> tile, const thread Table& table, uint index) {
    UNROLL
    for (int k = 0; k < EACH; k++) {
      uint run = vector(k, index), place = token(k, index);
      at[k][0].codes.align(run);
      at[k][1].codes.align(run);
      uint4 early = TwoTokens<NVIDIA>::values(at[k][0], at[k][1], 0, table);
      uint4 late = TwoTokens<NVIDIA>::values(at[k][0], at[k][1], 1, table);
      bool filled = SIZE % 32 == 0 || run < SIZE / 8;
      if (there(k, index)) {
        Shared<uint4> unit = tile + run / 8 * (8 * TILE_TOKENS);
        unit[Unit::place(place, run % 8)] =
            filled ? uint4{early.x, early.y, late.x, late.y} : uint4{0, 0, 0, 0};
        unit[Unit::place(place + TILE_TOKENS / 2, run % 8)] =
            filled ? uint4{early.z, early.w, late.z, late.w} : uint4{0, 0, 0, 0};
      }
    }
  }
};

// The values of a tile's tokens, likewise: columns of 64 tokens. Vector 4p + t of a column has tokens 32p + 16s + 8h + 2t + e in
// the order of (s, h, e).
template <int BITS, int GROUP, int SIZE, int THREADS, bool NVIDIA>
struct ValueTile {
  using Unit = MatrixUnit<NVIDIA>;
  CONSTANT int EACH = (SIZE + THREADS - 1) / THREADS;
  Eight<BITS, SIZE> at[EACH][4][2];

  static uint vector(int k, uint index) {
    return (index + k * THREADS) % 8;
  }

  static uint run(int k, uint index) {
    return (index + k * THREADS) / 8;
  }

  static bool there(int k, uint index) {
    return SIZE % THREADS == 0 || index + k * THREADS < uint(SIZE);
  }

  void fetch(const thread Context<BITS, GROUP, SIZE>& context, uint start, uint index) {
    UNROLL
    for (int i = 0; i < EACH * 8; i++) {
      int k = i / 8;
      uint first = start + vector(k, index) / 4 * 32 + vector(k, index) % 4 * 2;
      if (there(k, index)) {
        context.load(at[k][i / 2 % 4][i % 2], first + i / 2 % 4 * 8 + i % 2, run(k, index));
      }
    }
  }

  // To (SIZE, 8 vectors).
  void store(Shared<uint4> tile, const thread Table& table, uint index) {
    UNROLL
    for (int k = 0; k < EACH; k++) {
      if (there(k, index)) {
        uint columns[8][4];
        UNROLL
        for (int i = 0; i < 4; i++) {
          at[k][i][0].codes.align(run(k, index));
          at[k][i][1].codes.align(run(k, index));
          UNROLL
          for (int c = 0; c < 2; c++) {
            uint4 four = TwoTokens<NVIDIA>::values(at[k][i][0], at[k][i][1], c, table);
            columns[4 * c][i] = both_low(four.x, four.z);
            columns[4 * c + 1][i] = both_high(four.x, four.z);
            columns[4 * c + 2][i] = both_low(four.y, four.w);
            columns[4 * c + 3][i] = both_high(four.y, four.w);
          }
        }
        UNROLL
        for (int c = 0; c < 8; c++) {
          tile[Unit::place(8 * run(k, index) + c, vector(k, index))] =
              uint4{columns[c][0], columns[c][1], columns[c][2], columns[c][3]};
        }
      }
    }
  }

  // The low, or the high, halves of two pairs.
  static uint both_low(uint one, uint two) {
    return MatrixUnit<false>::pair_of(one, two, 0);
  }

  static uint both_high(uint one, uint two) {
    return MatrixUnit<false>::pair_of(one, two, 1);
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
        uint4 k = Unit::operands(keys + (p / 2 * TILE_TOKENS + 8 * j) * 8, 0, p % 2, seat);
        Mine::multiply(scores[j], queries[2 * p], k.x, k.y);
        Mine::multiply(scores[j], queries[2 * p + 1], k.z, k.w);
      }
    }
  }

  // Makes weights of the scores of the tokens from `start` on; `first`: the first of the rows.
  template <int MASK>
  void weigh(const thread Sight<MASK>& sight, uint first, uint start, uint end, uint seat) {
    bool all_seen = sight.sees_all(first, ROWS, start, TILE_TOKENS, end);
    if (!all_seen) {
      UNROLL
      for (int i = 0; i < EIGHTS * 2 * EACH; i++) {
        int j = i / (2 * EACH), r = i / 2 % EACH;
        uint row = first + seat / 4 + 8 * r, token = start + 8 * j + seat % 4 * 2 + i % 2;
        float score = scores[j][2 * r + i % 2] * factors[r];
        scores[j][2 * r + i % 2] = sight.score(score, row, token, end);
      }
    }
    UNROLL
    for (int r = 0; r < EACH; r++) {
      float factor = all_seen ? factors[r] : 1.0f, now = scores[0][2 * r];
      UNROLL
      for (int j = 0; j < EIGHTS; j++) {
        now = larger(now, larger(scores[j][2 * r], scores[j][2 * r + 1]));
      }
      now = larger(now, shuffle_xor(now, NEAR));
      now = larger(now, shuffle_xor(now, FAR)) * factor;
      if (now > most[r]) {
        shrink_to(r, now);
      }
      // Where nothing has been seen yet, all weights are zero.
      float base = most[r] == NOTHING ? 0.0f : most[r];
      UNROLL
      for (int i = 0; i < EIGHTS * 2; i++) {
        float weight = power_of_two(scores[i / 2][2 * r + i % 2] * factor - base);
        scores[i / 2][2 * r + i % 2] = weight;
        sums[r] += weight;
      }
    }
    UNROLL
    for (int i = 0; i < EIGHTS * EACH; i++) {
      int j = i / EACH, r = i % EACH;
      weights[j / 2][j % 2 * EACH + r] = pack_halves(scores[j][2 * r], scores[j][2 * r + 1]);
    }
  }

  // Row r's sums so far for a new maximum.
  void shrink_to(int r, float now) {
    float kept = power_of_two(most[r] - now);
    most[r] = now;
    sums[r] *= kept;
    UNROLL
    for (int n = 0; n < COLUMNS; n++) {
      out[n][2 * r] *= kept;
      out[n][2 * r + 1] *= kept;
    }
  }

  void add(Shared<uint4> values, uint seat) {
    UNROLL
    for (int p = 0; p < 2; p++) {
      UNROLL
      for (int n = 0; n < COLUMNS; n++) {
        uint4 v = Unit::operands(values + 8 * n * 8, 0, p, seat);
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
