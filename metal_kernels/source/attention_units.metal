// Attention on NVIDIA's matrix units: what takes the place of the parts of attention.metal that lanes do by themselves.
#pragma once

#include "attention.metal"

namespace turboquant {

#ifdef NVIDIA_INSTRUCTIONS
// Of rows g, g + 8, ...: two steps of 16 columns in a vector; a step beyond the last is zero.
template <int ROWS, int SIZE, int SIMDGROUPS>
inline void stage_queries(Shared<float> values, Shared<float> factors, Shared<uint4> halves, uint index) {
  constexpr uint STEPS = SIZE / 16, VECTORS = (STEPS + 1) / 2 * 32;
  for (uint i = index; i < VECTORS * (ROWS / 8); i += 32 * SIMDGROUPS) {
    uint row = i % 32 / 4 + i / VECTORS * 8, step = i % VECTORS / 32 * 2, column = i % 4 * (SIZE / 4) + 4 * step;
    uint4 four = uint4{pair_of_row<SIZE>(values, factors, row, column),
                       pair_of_row<SIZE>(values, factors, row, column + 2), 0, 0};
    if (step + 1 < STEPS) {
      four.z = pair_of_row<SIZE>(values, factors, row, column + 4);
      four.w = pair_of_row<SIZE>(values, factors, row, column + 6);
    }
    halves[i] = four;
  }
  barrier();
}

// What keys and values are decoded with; SAME: both by one table. 8 bits need none.
template <int KEY_BITS, int VALUE_BITS, bool SAME>
struct PairTables {
  CONSTANT int KEY_WORDS = SAME ? 0 : PairTable<KEY_BITS>::WORDS, WORDS = KEY_WORDS + PairTable<VALUE_BITS>::WORDS;
  PairTable<KEY_BITS> keys;
  PairTable<VALUE_BITS> values;

  // Fills `memory`, WORDS of it; a barrier before any decodes.
  template <int SIMDGROUPS>
  static PairTables of(const thread LaneTable& of_keys, const thread LaneTable& of_values, Shared<uint> memory, uint simdgroup,
                       uint lane) {
    PairTables all{{memory, lane}, {memory + KEY_WORDS, lane}};
    if (!SAME) {
      all.keys.template fill<SIMDGROUPS>(of_keys, simdgroup, lane);
    }
    all.values.template fill<SIMDGROUPS>(of_values, simdgroup, lane);
    return all;
  }
};

// The halves of 16 tokens' keys, as a matrix unit takes them: codes 4c to 4c + 3 of tokens `one` and `two`.
template <int BITS>
struct KeyDecoder {
  template <typename RUN>
  static uint4 decode(const thread RUN& one, const thread RUN& two, int c, const thread PairTable<BITS>& table) {
    constexpr int PLACE = PairTable<BITS>::PLACE;
    uint mine = one.scales_of(c), others = two.scales_of(c);
    uint first[2], second[2];
    UNROLL
    for (int i = 0; i < 2; i++) {
      int bit = 2 * BITS * (2 * c + i);
      first[i] = multiply_pairs(table.at(placed<PLACE, 2 * BITS>(one.codes.at, bit)), mine);
      second[i] = multiply_pairs(table.at(placed<PLACE, 2 * BITS>(two.codes.at, bit)), others);
    }
    return uint4{first[0], second[0], first[1], second[1]};
  }
};

template <>
struct KeyDecoder<8> {
  template <typename RUN>
  static uint4 decode(const thread RUN& one, const thread RUN& two, int c, const thread PairTable<8>&) {
    uint4 both = one.template values_with<true>(two, c, LaneTable{});
    return uint4{both.x, both.z, both.y, both.w};
  }
};

// The halves of columns of values, each of two tokens.
template <int BITS, typename RUN>
struct ValueDecoder {
  CodesOfTwo<BITS, RUN::STREAM_WORDS> codes;
  const thread RUN& one;
  const thread RUN& two;

  ValueDecoder(const thread RUN& first, const thread RUN& second)
      : codes(first.codes.at, second.codes.at), one(first), two(second) {}

  // Of column `column`, and of the next.
  uint2 decode(int column, const thread PairTable<BITS>& table) const thread {
    constexpr int PLACE = PairTable<BITS>::PLACE;
    uint scales = join_bits(one.scales_of(column / 4), two.scales_of(column / 4));
    return uint2{multiply_pairs(table.at(placed<PLACE, 2 * BITS>(codes.even, BITS * column)), scales),
                 multiply_pairs(table.at(placed<PLACE, 2 * BITS>(codes.odd, BITS * column)), scales)};
  }
};

template <typename RUN>
struct ValueDecoder<8, RUN> {
  const thread RUN& one;
  const thread RUN& two;

  ValueDecoder(const thread RUN& first, const thread RUN& second) : one(first), two(second) {}

  uint2 decode(int column, const thread PairTable<8>&) const thread {
    uint4 four = one.template values_with<true>(two, column / 4, LaneTable{});
    uint mine = column % 4 ? four.y : four.x, others = column % 4 ? four.w : four.z;
    return uint2{byte_permute(mine, others, 0x5410u), byte_permute(mine, others, 0x7632u)};
  }
};

// By matrix units, whose rows are tokens, or columns of values, and whose columns are ROWS queries, eight at a time: of
// each eight a lane has rows 2t and 2t + 1, and of the values columns 2i and 2i + 1 of run g.
template <int KEY_BITS, int VALUE_BITS, int KEY_SIZE, int VALUE_SIZE, int KEY_GROUP, int VALUE_GROUP, int ROWS,
          bool SAME>
struct Rows<KEY_BITS, VALUE_BITS, KEY_SIZE, VALUE_SIZE, KEY_GROUP, VALUE_GROUP, ROWS, SAME, true> {
  CONSTANT int RUN = VALUE_SIZE / 8, EIGHTS = ROWS / 8;
  float most[EIGHTS][2], sums[EIGHTS][2];
  float out[EIGHTS][RUN / 2][4];

  Rows() {
    UNROLL
    for (int n = 0; n < EIGHTS; n++) {
      UNROLL
      for (int r = 0; r < 2; r++) {
        most[n][r] = NOTHING;
        sums[n][r] = 0;
      }
      UNROLL
      for (int i = 0; i < RUN * 2; i++) {
        out[n][i / 4][i % 4] = 0;
      }
    }
  }

  using Tables = PairTables<KEY_BITS, VALUE_BITS, SAME>;
  using Keys = TokenRun<KEY_BITS, KEY_GROUP, KEY_SIZE, 4>;
  using Values = TokenRun<VALUE_BITS, VALUE_GROUP, VALUE_SIZE, 8>;

  // Every STEP-th run of 16 tokens from `first` on; the next keys are asked for before the values are needed.
  template <int STEP, int MASK>
  void walk(Shared<uint4> queries, Shared<float> factors, Device<const uint> keys, Device<const half> key_scales,
            Device<const uint> values, Device<const half> value_scales, const thread Tables& tables,
            const thread Sight<MASK>& sight, uint first, uint end, uint lane) thread {
    uint g = lane / 4, t = lane % 4, last = sight.length - 1;
    uint token = first + g < last ? first + g : last, other = first + g + 8 < last ? first + g + 8 : last;
    Keys one(keys, key_scales, token, t), two(keys, key_scales, other, t);
    for (uint start = first; start < end; start += 16 * STEP) {
      uint at = start + 2 * t;
      Values a(values, value_scales, at < last ? at : last, g), b(values, value_scales, at + 1 < last ? at + 1 : last, g);
      Values c(values, value_scales, at + 8 < last ? at + 8 : last, g);
      Values d(values, value_scales, at + 9 < last ? at + 9 : last, g);
      loads_first();
      float scores[EIGHTS][4];
      score(queries, one, two, tables.keys, scores, lane);
      uint next = start + 16 * STEP + g;
      one = Keys(keys, key_scales, next < last ? next : last, t);
      two = Keys(keys, key_scales, next + 8 < last ? next + 8 : last, t);
      loads_first();
      uint2 weights[EIGHTS];
      UNROLL
      for (int n = 0; n < EIGHTS; n++) {
        weights[n] = weigh<MASK>(n, scores[n], factors, sight, start, end, lane);
      }
      ValueDecoder<VALUE_BITS, Values> of_ab(a, b), of_cd(c, d);
      UNROLL
      for (int i = 0; i < RUN / 2; i++) {
        uint2 ab = of_ab.decode(2 * i, tables.values), cd = of_cd.decode(2 * i, tables.values);
        UNROLL
        for (int n = 0; n < EIGHTS; n++) {
          matrix_multiply(out[n][i], uint4{ab.x, ab.y, cd.x, cd.y}, weights[n].x, weights[n].y);
        }
      }
    }
  }

  // Products of 16 tokens' keys with all queries.
  void score(Shared<uint4> queries, const thread Keys& one, const thread Keys& two,
             const thread PairTable<KEY_BITS>& table, thread float (&scores)[EIGHTS][4], uint lane) thread {
    constexpr int STEPS = KEY_SIZE / 16;
    UNROLL
    for (int i = 0; i < EIGHTS * 4; i++) {
      scores[i / 4][i % 4] = 0;
    }
    UNROLL
    for (int i = 0; i < STEPS; i += 2) {
      uint4 q[EIGHTS];
      UNROLL
      for (int n = 0; n < EIGHTS; n++) {
        q[n] = queries[(n * ((STEPS + 1) / 2) + i / 2) * 32 + lane];
      }
      UNROLL
      for (int j = 0; j < (i + 1 < STEPS ? 2 : 1); j++) {
        uint4 k = KeyDecoder<KEY_BITS>::decode(one, two, i + j, table);
        UNROLL
        for (int n = 0; n < EIGHTS; n++) {
          matrix_multiply(scores[n], k, j ? q[n].z : q[n].x, j ? q[n].w : q[n].y);
        }
      }
    }
  }

  // Scores of tokens g and g + 8 for eight rows, as the weights of 16 tokens for row g.
  template <int MASK>
  uint2 weigh(int n, thread float (&scores)[4], Shared<float> factors, const thread Sight<MASK>& sight, uint start,
              uint end, uint lane) thread {
    uint g = lane / 4, row = 8 * n + lane % 4 * 2;
    bool all_seen = MASK == 0 && start + 16 <= end;
    UNROLL
    for (int i = 0; i < 4; i++) {
      scores[i] *= factors[ROWS + row + i % 2];
    }
    if (!all_seen) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        scores[i] = sight.score(scores[i], row + i % 2, start + g + 8 * (i / 2), end);
      }
    }
    UNROLL
    for (int r = 0; r < 2; r++) {
      float now = larger(most[n][r], larger(scores[r], scores[2 + r]));
      UNROLL
      for (int distance = 4; distance < 32; distance *= 2) {
        now = larger(now, shuffle_xor(now, distance));
      }
      if (now != most[n][r]) {
        float kept = power_of_two(most[n][r] - now);
        most[n][r] = now;
        sums[n][r] *= kept;
        UNROLL
        for (int i = 0; i < RUN; i++) {
          out[n][i / 2][2 * (i % 2) + r] *= kept;
        }
      }
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
      bool seen = all_seen || scores[i] != NOTHING;
      float weight = power_of_two(scores[i] - most[n][i % 2]);
      scores[i] = seen ? weight : 0.0f;
      sums[n][i % 2] += scores[i];
    }
    return uint2{transpose(pack_halves(scores[0], scores[1])), transpose(pack_halves(scores[2], scores[3]))};
  }

  void finish() thread {
    UNROLL
    for (int i = 0; i < EIGHTS * 2; i++) {
      UNROLL
      for (int distance = 4; distance < 32; distance *= 2) {
        sums[i / 2][i % 2] += shuffle_xor(sums[i / 2][i % 2], distance);
      }
    }
  }

  void note(Shared<float> maxima, Shared<float> totals, uint lane) const thread {
    if (lane < 4) {
      UNROLL
      for (int i = 0; i < EIGHTS * 2; i++) {
        maxima[8 * (i / 2) + 2 * lane + i % 2] = most[i / 2][i % 2];
        totals[8 * (i / 2) + 2 * lane + i % 2] = sums[i / 2][i % 2];
      }
    }
  }

  // In the order of lanes, so that they write to all banks at once.
  static uint place(uint row, uint column) {
    uint i = (row / 8 * (RUN / 2) + column % RUN / 2) * 4 + column % 2 * 2 + row % 2;
    return i * 32 + column / RUN * 4 + row % 8 / 2;
  }

  void give(Shared<float> all, Shared<float> factors, bool first, uint lane) const thread {
    UNROLL
    for (int i = 0; i < EIGHTS * RUN * 2; i++) {
      float factor = factors[i / (RUN * 2) * 8 + lane % 4 * 2 + i % 2];
      float value = out[i / (RUN * 2)][i % (RUN * 2) / 4][i % 4] * factor;
      all[i * 32 + lane] = first ? value : value + all[i * 32 + lane];
    }
  }
};
#endif

} // namespace turboquant
