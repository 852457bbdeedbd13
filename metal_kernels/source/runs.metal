// Hadamard transforms of runs of POWER values by THREADS threads.
//
// A thread holds EACH values of each run, VECTOR of them beside each other. The transform is butterflies over the bits of
// an index: some within a thread, the next five across lanes, those of the simdgroups after values have changed places by
// way of threadgroup memory.
#pragma once

namespace turboquant {

template <int POWER, int THREADS>
struct Run {
  CONSTANT int EACH = POWER > THREADS ? POWER / THREADS : 1;
  CONSTANT int VECTOR = EACH < 8 ? EACH : (EACH < 32 ? 8 : EACH / 4);
  CONSTANT int LANES = POWER < 32 ? POWER : 32, SPAN = 32 * VECTOR;
  CONSTANT int SIMDGROUPS = THREADS > 32 ? THREADS / 32 : 1;
  // Of the simdgroups' bits, a thread has WITHIN values after they changed places, and as many threads as ACROSS the others.
  // Of values beside each other it has KEPT: two or more where it can, and as many as `exchange` takes rounds.
  CONSTANT int ROUNDS = POWER / 4096 > 2 ? POWER / 4096 : 2, MOST_WITHIN = EACH > ROUNDS ? EACH / ROUNDS : 1;
  CONSTANT int WITHIN = SIMDGROUPS < MOST_WITHIN ? SIMDGROUPS : MOST_WITHIN, ACROSS = SIMDGROUPS / WITHIN;
  CONSTANT int KEPT = EACH / WITHIN;
  // Places of threadgroup memory left free after each 32 values against bank conflicts.
  CONSTANT int NARROW = ACROSS * VECTOR < 8 ? 4 : (ACROSS * VECTOR < 32 ? 32 / (ACROSS * VECTOR) : 1);
  CONSTANT int GAP = ACROSS > 1 ? NARROW : 1;
  float at[EACH];

  template <int BITS>
  static float across_lanes(float value, uint lane) {
    UNROLL
    for (int distance = 1; distance < BITS; distance *= 2) {
      float other = shuffle_xor(value, distance);
      value = other + (lane & distance ? -1.0f : 1.0f) * value;
    }
    return value;
  }

  template <int FIRST>
  void within_thread() thread {
    UNROLL
    for (int distance = FIRST; distance < EACH; distance *= 2) {
      UNROLL
      for (int i = 0; i < EACH; i++) {
        if ((i & distance) == 0) {
          float one = at[i], two = at[i | distance];
          at[i] = one + two;
          at[i | distance] = one - two;
        }
      }
    }
  }

  // The butterflies that one simdgroup can do.
  void transform(uint lane) thread {
    within_thread<1>();
    UNROLL
    for (int i = 0; i < EACH; i++) {
      at[i] = across_lanes<LANES>(at[i], lane);
    }
  }

  // The column of value i: that of value 0, and how far from it.
  static uint first_column(uint index) {
    return VECTOR * (POWER < THREADS ? index % POWER : index);
  }

  static constexpr uint further(int i) {
    return i / VECTOR * (THREADS * VECTOR) + i % VECTOR;
  }

  // The same once values have changed places.
  static uint first_turned(uint index) {
    uint rest = index / ACROSS * KEPT;
    return rest / SPAN * (SPAN * SIMDGROUPS) + index % ACROSS * SPAN + rest % SPAN;
  }

  static constexpr uint turned_further(int i) {
    return i / KEPT * (ACROSS * SPAN) + i % KEPT;
  }

  static constexpr uint spread(uint place) {
    return place + place / 32 * GAP;
  }

  // To and, after a barrier, from `buffer`: those of STEP consecutive columns that are column `of`.
  template <int STEP>
  void put(Shared<float> buffer, int of, uint index) const thread {
    Shared<float> mine = buffer + spread(first_column(index) / STEP);
    UNROLL
    for (int i = 0; i < EACH; i += STEP) {
      mine[spread(further(i) / VECTOR * VECTOR / STEP) + further(i) % VECTOR / STEP] = at[i + of];
    }
  }

  template <int STEP>
  void take(Shared<float> buffer, int of, uint index) thread {
    Shared<float> mine = buffer + spread(first_turned(index) / STEP);
    UNROLL
    for (int i = 0; i < EACH; i += STEP) {
      at[i + of] = mine[spread(turned_further(i) / SPAN * SPAN / STEP) + turned_further(i) % SPAN / STEP];
    }
  }

  // The butterflies over simdgroups, of values that have changed places.
  void transform_turned(uint lane) thread {
    within_thread<KEPT>();
    UNROLL
    for (int i = 0; i < EACH; i++) {
      at[i] = across_lanes<ACROSS>(at[i], lane);
    }
  }
};

// Floats of threadgroup memory where AT_ONCE values of each of a run's threads change places.
template <int POWER, int THREADS, int AT_ONCE>
constexpr int scratch_of() {
  return THREADS > 32 ? AT_ONCE * (THREADS + THREADS / 32 * Run<POWER, THREADS>::GAP) : 1;
}

// Transforms COUNT runs. AT_ONCE values of a thread change places between two barriers: those of some runs, or a part of
// one's. Whoever read or wrote scratch before has to be waited for. A simdgroup that is not busy waits with the others.
template <int COUNT, int POWER, int THREADS, int AT_ONCE>
inline void transform_runs(thread Run<POWER, THREADS> (&runs)[COUNT], Shared<float> scratch, uint index,
                           bool busy) {
  constexpr int EACH = Run<POWER, THREADS>::EACH, STEP = EACH > AT_ONCE ? EACH / AT_ONCE : 1;
  constexpr int RUNS = AT_ONCE > EACH ? AT_ONCE / EACH : 1, SIZE = scratch_of<POWER, THREADS, EACH / STEP>();
  if (busy) {
    UNROLL
    for (int a = 0; a < COUNT; a++) {
      runs[a].transform(index % 32);
    }
  }
  if (THREADS <= 32) {
    return;
  }
  UNROLL
  for (int round = 0; round < (COUNT + RUNS - 1) / RUNS * STEP; round++) {
    int first = round / STEP * RUNS, end = first + RUNS < COUNT ? first + RUNS : COUNT;
    if (round > 0) {
      barrier();
    }
    if (busy) {
      UNROLL
      for (int a = first; a < end; a++) {
        runs[a].template put<STEP>(scratch + (a - first) * SIZE, round % STEP, index);
      }
    }
    barrier();
    if (busy) {
      UNROLL
      for (int a = first; a < end; a++) {
        runs[a].template take<STEP>(scratch + (a - first) * SIZE, round % STEP, index);
      }
    }
  }
  if (busy) {
    UNROLL
    for (int a = 0; a < COUNT; a++) {
      runs[a].transform_turned(index % 32);
    }
  }
}

} // namespace turboquant
