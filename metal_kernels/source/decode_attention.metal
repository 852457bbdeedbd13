// Attention of one new token over keys and values in full precision, of which the last few lie apart.
//
// A threadgroup takes HEADS heads of queries that share one head of keys and values, and a part of the tokens. Eight lanes
// share a token's row, so a simdgroup takes four tokens at once, twice. Each four of lanes keeps a running maximum.
#pragma once

#include "heads.metal"
#include "softmax.metal"

namespace turboquant {

// Of a few tokens, what one of eight lanes has of their keys and values: every eighth run of RUN values.
template <int SIZE, int COUNT>
struct Tokens {
  CONSTANT int EACH = SIZE / 8, RUN = EACH % 8 == 0 ? 8 : EACH % 4 == 0 ? 4 : EACH % 2 == 0 ? 2 : 1;
  float keys[COUNT][EACH], values[COUNT][EACH];
  bool there[COUNT];

  static uint column(uint i, uint eighth) {
    return (i / RUN * 8 + eighth) * RUN + i % RUN;
  }

  // Every fourth token of rows (end, SIZE) from `first` on; those beyond the end are the last one, and not there.
  template <typename T>
  void load(Device<const T> key_rows, Device<const T> value_rows, uint first, uint end, uint eighth) thread {
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      uint token = first + 4 * j, at = (token < end ? token : end - 1) * SIZE;
      there[j] = token < end;
      UNROLL
      for (int i = 0; i < EACH; i += RUN) {
        float of_key[RUN], of_value[RUN];
        load_values<true, RUN>(key_rows + (at + column(i, eighth)), of_key);
        load_values<true, RUN>(value_rows + (at + column(i, eighth)), of_value);
        UNROLL
        for (int r = 0; r < RUN; r++) {
          keys[j][i + r] = of_key[r];
          values[j][i + r] = of_value[r];
        }
      }
    }
  }

  // A single token's rows, key and value.
  void load(Shared<float> rows, bool is_there, uint eighth) thread {
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      there[j] = is_there && j == 0;
      UNROLL
      for (int i = 0; i < EACH; i++) {
        keys[j][i] = rows[column(i, eighth)];
        values[j][i] = rows[SIZE + column(i, eighth)];
      }
    }
  }
};

// Copies `count` values, whole vectors of 16 bytes.
template <int THREADS, typename T>
inline void copy_rows(Device<const T> from, Device<T> to, uint count, uint index) {
  constexpr uint EACH = 16 / sizeof(T);
  for (uint at = index * EACH; at < count; at += THREADS * EACH) {
    copy_vector(to + at, from + at);
  }
}

// A new token's rows of heads (HEADS + 2, SIZE) in threadgroup memory: queries, its key and its value, rounded as if they
// had been written in between. `count` of the queries are there. With NORMED, each is RMS-normalised first.
template <int HEADS, int SIZE, int SIMDGROUPS, bool NORMED, typename T>
struct NewToken {
  Shared<float> rows;

  // norms (2, SIZE): of queries, and of keys.
  void load(Device<const T> queries, Device<const T> key, Device<const T> value, Device<const T> norms, float eps,
            uint count, uint index) thread {
    uint lane = index % 32;
    for (uint row = index / 32; row < uint(HEADS + 2); row += SIMDGROUPS) {
      Device<const T> from = row < uint(HEADS) ? queries + (row < count ? row : 0) * SIZE : row == uint(HEADS) ? key : value;
      float squares = 0;
      for (uint column = lane; column < uint(SIZE); column += 32) {
        float one = static_cast<float>(from[column]);
        rows[row * SIZE + column] = one;
        squares += one * one;
      }
      if (NORMED && row < uint(HEADS + 1)) {
        float factor = 1 / sqrt(sum_over_lanes(squares) / SIZE + eps);
        Device<const T> norm = row < uint(HEADS) ? norms : norms + SIZE;
        for (uint column = lane; column < uint(SIZE); column += 32) {
          uint at = row * SIZE + column;
          rows[at] = rounded<T>(rows[at] * factor * static_cast<float>(norm[column]));
        }
      }
    }
    barrier();
  }

  // turns: SIZE / 2 cosines, then as many sines, which turn value i with value i + SIZE / 2.
  void turn(Device<const float> turns, uint index) thread {
    constexpr uint HALF = SIZE / 2;
    for (uint i = index; i < (HEADS + 1) * HALF; i += 32 * SIMDGROUPS) {
      uint row = i / HALF, column = i % HALF, at = row * SIZE + column;
      float one = rows[at], two = rows[at + HALF], cosine = turns[column], sine = turns[HALF + column];
      rows[at] = rounded<T>(one * cosine - two * sine);
      rows[at + HALF] = rounded<T>(one * sine + two * cosine);
    }
    barrier();
  }

  // Adds the key and value to those that wait, (room, SIZE) each, `waiting` of them.
  void join(Device<const T> old_keys, Device<const T> old_values, Device<T> keys, Device<T> values, uint waiting,
            uint index) const thread {
    copy_rows<32 * SIMDGROUPS, T>(old_keys, keys, waiting * SIZE, index);
    copy_rows<32 * SIMDGROUPS, T>(old_values, values, waiting * SIZE, index);
    for (uint column = index; column < uint(SIZE); column += 32 * SIMDGROUPS) {
      keys[waiting * SIZE + column] = static_cast<T>(rows[HEADS * SIZE + column]);
      values[waiting * SIZE + column] = static_cast<T>(rows[(HEADS + 1) * SIZE + column]);
    }
  }

  // Hands the key and value on, to (2, heads, SIZE).
  void give(Device<float> all, uint head, uint heads, uint index) const thread {
    for (uint column = index; column < uint(SIZE); column += 32 * SIMDGROUPS) {
      all[head * SIZE + column] = rows[HEADS * SIZE + column];
      all[(heads + head) * SIZE + column] = rows[(HEADS + 1) * SIZE + column];
    }
  }
};

// What a lane knows of the tokens that it saw: maxima and sums of each head, and its share of the weighted values.
template <int HEADS, int SIZE>
struct Seen {
  CONSTANT int EACH = SIZE / 8, AT_ONCE = 2;
  using Few = Tokens<SIZE, AT_ONCE>;
  float queries[HEADS][EACH], out[HEADS][EACH], most[HEADS], sums[HEADS];

  Seen(Shared<float> rows, float factor, uint eighth) {
    UNROLL
    for (int h = 0; h < HEADS; h++) {
      most[h] = NOTHING;
      sums[h] = 0;
      UNROLL
      for (int i = 0; i < EACH; i++) {
        queries[h][i] = factor * rows[h * SIZE + Few::column(i, eighth)];
        out[h][i] = 0;
      }
    }
  }

  void add(const thread Few& few) thread {
    UNROLL
    for (int h = 0; h < HEADS; h++) {
      float scores[AT_ONCE], now = most[h];
      UNROLL
      for (int j = 0; j < AT_ONCE; j++) {
        float score = 0;
        UNROLL
        for (int i = 0; i < EACH; i++) {
          score += queries[h][i] * few.keys[j][i];
        }
        score += shuffle_xor(score, 1);
        score += shuffle_xor(score, 2);
        score += shuffle_xor(score, 4);
        scores[j] = few.there[j] ? score : NOTHING;
        now = larger(now, scores[j]);
      }
      float kept = shrink(most[h], now);
      most[h] = now;
      sums[h] *= kept;
      UNROLL
      for (int i = 0; i < EACH; i++) {
        out[h][i] *= kept;
      }
      UNROLL
      for (int j = 0; j < AT_ONCE; j++) {
        float weight = weight_of(scores[j], now);
        sums[h] += weight;
        UNROLL
        for (int i = 0; i < EACH; i++) {
          out[h][i] += weight * few.values[j][i];
        }
      }
    }
  }

  // Rows [start, end) of keys and values (rows, SIZE), of which SIMDGROUPS simdgroups take turns.
  template <int SIMDGROUPS, typename T>
  void walk(Device<const T> keys, Device<const T> values, uint start, uint end, uint simdgroup, uint lane) thread {
    constexpr uint TURN = 4 * AT_ONCE;
    for (uint first = start + simdgroup * TURN; first < end; first += SIMDGROUPS * TURN) {
      Few few;
      few.load(keys, values, first + lane / 8, end, lane % 8);
      add(few);
    }
  }

  // Sums over the four tokens of a simdgroup; then each eight lanes have the same.
  void finish() thread {
    UNROLL
    for (int h = 0; h < HEADS; h++) {
      float now = larger(most[h], shuffle_xor(most[h], 8));
      now = larger(now, shuffle_xor(now, 16));
      float kept = weight_of(most[h], now);
      most[h] = now;
      sums[h] *= kept;
      sums[h] += shuffle_xor(sums[h], 8);
      sums[h] += shuffle_xor(sums[h], 16);
      UNROLL
      for (int i = 0; i < EACH; i++) {
        out[h][i] *= kept;
        out[h][i] += shuffle_xor(out[h][i], 8);
        out[h][i] += shuffle_xor(out[h][i], 16);
      }
    }
  }

  void note(Shared<float> maxima, Shared<float> totals, uint lane) const thread {
    if (lane == 0) {
      UNROLL
      for (int h = 0; h < HEADS; h++) {
        maxima[h] = most[h];
        totals[h] = sums[h];
      }
    }
  }

  // This simdgroup's weighted sums (HEADS, SIZE), each four of lanes every fourth head's; factors (HEADS).
  void give(Shared<float> all, Shared<float> factors, uint lane) const thread {
    UNROLL
    for (int h = 0; h < HEADS; h++) {
      if (uint(h % 4) == lane / 8) {
        UNROLL
        for (int i = 0; i < EACH; i++) {
          all[h * SIZE + Few::column(i, lane % 8)] = out[h][i] * factors[h];
        }
      }
    }
  }
};

// Value i of the sum of what simdgroups gave, COUNT values each.
template <int SIMDGROUPS, int COUNT>
inline float sum_of(Shared<float> shared, uint i) {
  float sum = 0;
  UNROLL
  for (int s = 0; s < SIMDGROUPS; s++) {
    sum += shared[s * COUNT + i];
  }
  return sum;
}

// One part of `count` rows from `row` on, as `add_parts` takes them.
template <int SIMDGROUPS, int HEADS, int SIZE>
inline void write_part(Shared<float> shared, Shared<float> maxima, Shared<float> totals, Device<float> out, uint row,
                       uint part, uint parts, uint count, uint index) {
  for (uint i = index; i < count * SIZE; i += 32 * SIMDGROUPS) {
    uint at = (row + i / SIZE) * parts + part;
    out[at * (SIZE + 2) + i % SIZE] = sum_of<SIMDGROUPS, HEADS * SIZE>(shared, i);
  }
  if (index < count) {
    uint at = ((row + index) * parts + part) * (SIZE + 2) + SIZE;
    out[at] = maxima[index];
    out[at + 1] = totals[index];
  }
}

} // namespace turboquant
