// Attention over packed keys and values.
//
// A threadgroup takes ROWS rows of queries that share one head of keys and values, and one part of the tokens; its
// simdgroups take 16 tokens in turn. Lane (g = lane / 4, t = lane % 4) decodes a quarter of the keys of tokens g and
// g + 8 and an eighth of the values of tokens 2t, 2t + 1, 2t + 8 and 2t + 9, in registers. Each simdgroup keeps a running
// maximum, as flash attention does. A second kernel adds up the parts, the sinks, and turns the result back.
#pragma once

#include "heads.metal"
#include "tokens.metal"
#include "softmax.metal"

namespace turboquant {

template <bool FIRST, typename ONE, typename TWO>
struct Choose {
  using Type = ONE;
};

template <typename ONE, typename TWO>
struct Choose<false, ONE, TWO> {
  using Type = TWO;
};

// What every row of a threadgroup needs to know.
template <int MASK>
struct Sight {
  uint length, rows_of_head, queries, first_row, rows;
  // Where the bias of head `head` of batch entry `entry` begins, and its row's and token's strides.
  Device<const float> bias;
  uint head_stride, row_stride, token_stride;

  // The last of the rows' queries.
  uint last_query() const thread {
    uint first = first_row % queries;
    return first + rows > queries ? queries - 1 : first + rows - 1;
  }

  // Whether `count` rows from `row` on see all of `many` tokens from `token` on.
  bool sees_all(uint row, uint count, uint token, uint many, uint end) const thread {
    uint query = (first_row + row) % queries;
    uint least = query + count > queries ? 0 : query;
    return token + many <= end && MASK < 2 && (MASK == 0 || token + many + queries <= length + least + 1);
  }

  // The score of a row and token, in powers of two, with what masks do to it.
  float score(float value, uint row, uint token, uint end) const thread {
    if (token >= end || (MASK == 2 && row >= rows)) {
      return NOTHING;
    }
    uint query = (first_row + row) % queries;
    if (MASK == 1 && token + queries > length + query) {
      return NOTHING;
    }
    if (MASK == 2) {
      uint head = (first_row + row) / queries;
      value += 1.44269504f * bias[head * head_stride + query * row_stride + token * token_stride];
    }
    return value;
  }
};

template <int SIZE>
inline uint pair_of_row(Shared<float> values, Shared<float> factors, uint row, uint column) {
  float factor = factors[row];
  return pack_halves(values[row * SIZE + column] * factor, values[row * SIZE + column + 1] * factor);
}

// Rotated queries (ROWS, SIZE) as halves, in the order in which lanes read them.
template <int ROWS, int SIZE, int SIMDGROUPS>
inline void stage_queries(Shared<float> values, Shared<float> factors, Shared<uint> halves, uint index) {
  for (uint i = index; i < uint(ROWS * SIZE / 2); i += 32 * SIMDGROUPS) {
    uint column = i / ROWS % 4 * (SIZE / 4) + i / (4 * ROWS) * 2;
    halves[i] = pair_of_row<SIZE>(values, factors, i % ROWS, column);
  }
  barrier();
}

// What lanes decode keys and values with.
struct LaneTables {
  CONSTANT int WORDS = 0;
  LaneTable keys, values;

  template <int SIMDGROUPS>
  static LaneTables of(const thread LaneTable& of_keys, const thread LaneTable& of_values, Shared<uint>, uint,
                       uint) {
    return LaneTables{of_keys, of_values};
  }
};

// One simdgroup's rows: running maxima and sums, and weighted sums of values. SAME: keys and values have one codebook.
template <int KEY_BITS, int VALUE_BITS, int KEY_SIZE, int VALUE_SIZE, int KEY_GROUP, int VALUE_GROUP, int ROWS,
          bool SAME, bool NVIDIA>
struct Rows {
  using Tables = LaneTables;
  CONSTANT int RUN = VALUE_SIZE / 8;
  float most[ROWS], sums[ROWS];
  float out[ROWS][RUN];

  Rows() {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      most[r] = NOTHING;
      sums[r] = 0;
      UNROLL
      for (int i = 0; i < RUN; i++) {
        out[r][i] = 0;
      }
    }
  }

  template <int MASK>
  void add(Shared<uint> queries, Shared<float> factors, Device<const uint> keys, Device<const half> key_scales,
           Device<const uint> values, Device<const half> value_scales, const thread Tables& tables,
           const thread Sight<MASK>& sight, uint start, uint end, uint lane) thread {
    uint g = lane / 4, t = lane % 4;
    float weights[2][ROWS];
    UNROLL
    for (int j = 0; j < 2; j++) {
      uint token = start + g + 8 * j, last = sight.length - 1;
      TokenRun<KEY_BITS, KEY_GROUP, KEY_SIZE, 4> run(keys, key_scales, token < last ? token : last, t);
      float scores[ROWS];
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        scores[r] = 0;
      }
      UNROLL
      for (int c = 0; c < (KEY_SIZE + 16) / 32; c++) {
        uint4 eight = run.eight(c, tables.keys);
        uint pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        UNROLL
        for (int i = 4 * c; i < (c < KEY_SIZE / 32 ? 4 * c + 4 : 4 * c + 2); i++) {
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            uint both = queries[(i * 4 + t) * ROWS + r];
            scores[r] += low(pairs[i % 4]) * low(both) + high(pairs[i % 4]) * high(both);
          }
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        scores[r] *= run.factor();
        scores[r] += shuffle_xor(scores[r], 1);
        scores[r] += shuffle_xor(scores[r], 2);
        weights[j][r] = sight.score(scores[r] * factors[ROWS + r], r, token, end);
      }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      float now = larger(most[r], larger(weights[0][r], weights[1][r]));
      UNROLL
      for (int distance = 4; distance < 32; distance *= 2) {
        now = larger(now, shuffle_xor(now, distance));
      }
      float kept = shrink(most[r], now);
      most[r] = now;
      sums[r] *= kept;
      UNROLL
      for (int i = 0; i < RUN; i++) {
        out[r][i] *= kept;
      }
      UNROLL
      for (int j = 0; j < 2; j++) {
        weights[j][r] = weight_of(weights[j][r], now);
        sums[r] += weights[j][r];
      }
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
      uint place = 2 * t + k % 2, token = start + place + 8 * (k / 2), last = sight.length - 1;
      TokenRun<VALUE_BITS, VALUE_GROUP, VALUE_SIZE, 8> run(values, value_scales, token < last ? token : last, g);
      float weight[ROWS];
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        weight[r] = shuffle(weights[k / 2][r], 4 * place) * run.factor();
      }
      UNROLL
      for (int c = 0; c < (RUN + 7) / 8; c++) {
        uint4 eight = run.eight(c, tables.values);
        uint pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        UNROLL
        for (int i = 8 * c; i < (8 * c + 8 < RUN ? 8 * c + 8 : RUN); i++) {
          float value = i % 2 == 0 ? low(pairs[i / 2 % 4]) : high(pairs[i / 2 % 4]);
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            out[r][i] += weight[r] * value;
          }
        }
      }
    }
  }

  // Every STEP-th run of 16 tokens from `first` on.
  template <int STEP, int MASK>
  void walk(Shared<uint> queries, Shared<float> factors, Device<const uint> keys, Device<const half> key_scales,
            Device<const uint> values, Device<const half> value_scales, const thread Tables& tables,
            const thread Sight<MASK>& sight, uint first, uint end, uint lane) thread {
    for (uint start = first; start < end; start += 16 * STEP) {
      add(queries, factors, keys, key_scales, values, value_scales, tables, sight, start, end, lane);
    }
  }

  // Sums over lanes; then each row's maximum and sum are the same in all lanes.
  void finish() thread {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int distance = 4; distance < 32; distance *= 2) {
        sums[r] += shuffle_xor(sums[r], distance);
      }
      UNROLL
      for (int i = 0; i < RUN; i++) {
        out[r][i] += shuffle_xor(out[r][i], 1);
        out[r][i] += shuffle_xor(out[r][i], 2);
      }
    }
  }

  void note(Shared<float> maxima, Shared<float> totals, uint lane) const thread {
    if (lane == 0) {
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        maxima[r] = most[r];
        totals[r] = sums[r];
      }
    }
  }

  // Where the threadgroup's sum of a row and column lies.
  static uint place(uint row, uint column) {
    return row * VALUE_SIZE + column;
  }

  // Adds this simdgroup's weighted sums to the threadgroup's, ROWS * VALUE_SIZE; factors (ROWS).
  void give(Shared<float> all, Shared<float> factors, bool first, uint lane) const thread {
    if (lane % 4 != 0) {
      return;
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int i = 0; i < RUN; i++) {
        uint at = r * VALUE_SIZE + lane / 4 * RUN + i;
        float value = out[r][i] * factors[r];
        all[at] = first ? value : value + all[at];
      }
    }
  }
};

// Queries (rows, SIZE) into `values`, rotated, and `factors`: (ROWS) what makes halves of them, (ROWS) what undoes that
// and scales the scores, in powers of two.
template <int ROWS, int SIZE, int ODD, int POWER, int SIMDGROUPS, typename T>
inline void rotate_queries(Device<const T> queries, Device<const uint> signs, Shared<float> values,
                           Shared<float> factors, uint rows, float scale, uint index) {
  for (uint i = index; i < uint(ROWS * SIZE); i += 32 * SIMDGROUPS) {
    float value = i / SIZE < rows ? static_cast<float>(queries[i]) : 0.0f;
    values[i] = signed_by(signs, i % SIZE, value);
  }
  transform_heads<ODD, POWER, false, 32 * SIMDGROUPS>(values, rows * SIZE, index);
  for (uint row = index / 32; row < uint(ROWS); row += SIMDGROUPS) {
    float most = 0;
    for (uint i = index % 32; i < uint(SIZE); i += 32) {
      float value = values[row * SIZE + i];
      most = larger(most, value < 0 ? -value : value);
    }
    most = greatest_over_lanes(most);
    if (index % 32 == 0) {
      uint exponent = scale_exponent(most);
      factors[row] = bits_float(exponent << 23);
      factors[ROWS + row] = bits_float((254u - exponent) << 23) * scale;
    }
  }
  barrier();
}

// Adds up the parts of one row, see `add_parts`, and turns the result back; with SINKS a sink is one part more.
template <int SIZE, int ODD, int POWER, int SIMDGROUPS, bool SINKS, typename T>
inline void join_parts(Device<const float> parts, Device<const float> sinks, Device<const uint> fixed, Device<T> out,
                       Shared<float> shared, uint count, uint head, uint index) {
  constexpr int THREADS = 32 * SIMDGROUPS;
  add_parts<SIZE, SIMDGROUPS>(parts, SINKS ? sinks[head] * 1.44269504f : NOTHING, 1.0f, shared, count, index);
  transform_heads<ODD, POWER, true, THREADS>(shared, SIZE, index);
  for (uint column = index; column < uint(SIZE); column += THREADS) {
    float value = shared[column] / sqrt(float(ODD * POWER));
    out[column] = static_cast<T>(signed_by(signs_of(fixed), column, value));
  }
}

} // namespace turboquant
