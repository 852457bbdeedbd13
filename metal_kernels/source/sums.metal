// Activations of few rows as they are multiplied, and the sums of products with them, of a tile of 16 rows of a weight.
//
// Activations come as halves, rows of whole blocks: a "column" of the product is one such row; with PARTS = 2 two of them,
// high and low part, make one. Sums are float.
#pragma once

namespace turboquant {

// NVIDIA's matrix units have eight columns. Where there are fewer rows of activations, several runs of 32 of their values
// take them side by side: lane (g, t) loads those of row g % COLUMNS and of run g / COLUMNS, and of the products only those
// count whose column belongs to the run that the weights are of.
template <int COLUMNS, bool NVIDIA>
constexpr int runs_of_load() {
  return NVIDIA ? 8 / COLUMNS : 1;
}

// Where the rows of x that a lane reads begin; the last row stands in for those beyond it, whose results are dropped.
// X points to a device's or a threadgroup's memory, rows `stride` apart and 32 columns, a run, `step` for each of them.
template <int COLUMNS, bool NVIDIA, typename X>
struct RowsOfLane {
  CONSTANT int EACH = NVIDIA ? 1 : COLUMNS;
  X x;
  uint step, offsets[EACH];

  RowsOfLane(X all, uint stride, uint run_step, uint first, uint end, uint lane)
      : x(all + 8 * (lane % 4)), step(run_step) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint row = first + (NVIDIA ? lane / 4 % COLUMNS : i), run = NVIDIA ? lane / 4 / COLUMNS : 0;
      offsets[i] = (row < end ? row : end - 1) * stride + run * step * 32;
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Activations {
  uint4 at[COLUMNS];

  // Columns 32p + 8t to 32p + 8t + 7 of a unit, `position` of them before it; rows as in RowsOfLane.
  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, NVIDIA, X>& rows, uint position) thread {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] = load4(rows.x + rows.offsets[i] + position * rows.step);
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Sums {
  CONSTANT int VALUES = 2 * COLUMNS;
  float at[VALUES];

  void clear() thread {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] = 0;
    }
  }

  // Plane q's matrix times the activations.
  void add(uint4 pairs, const thread Activations<COLUMNS, NVIDIA>& x, int q) thread {
    uint4 w = pairs;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      uint x0 = q % 2 ? x.at[i].z : x.at[i].x, x1 = q % 2 ? x.at[i].w : x.at[i].y;
      at[i] += low(w.x) * low(x0) + high(w.x) * high(x0) + low(w.z) * low(x1) + high(w.z) * high(x1);
      at[COLUMNS + i] += low(w.y) * low(x0) + high(w.y) * high(x0) + low(w.w) * low(x1) + high(w.w) * high(x1);
    }
  }

  // The sums of run `run` of a block, times the scales of rows g and g + 8.
  void add_scaled(const thread Sums<COLUMNS, NVIDIA>& other, uint scales, int, uint) thread {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] += low(scales) * other.at[i];
      at[COLUMNS + i] += high(scales) * other.at[COLUMNS + i];
    }
  }

  void scale(uint scales) thread {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] *= i < COLUMNS ? low(scales) : high(scales);
    }
  }

  // To partial (16, COLUMNS); the four lanes of a row have a quarter of its columns each.
  void store(Shared<float> partial, uint lane) thread {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] += shuffle_xor(at[i], 1);
      at[i] += shuffle_xor(at[i], 2);
    }
    if (lane % 4 == 0) {
      UNROLL
      for (int i = 0; i < COLUMNS; i++) {
        partial[(lane / 4) * COLUMNS + i] = at[i];
        partial[(lane / 4 + 8) * COLUMNS + i] = at[COLUMNS + i];
      }
    }
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <int COLUMNS>
struct Activations<COLUMNS, true> {
  uint4 at;

  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, true, X>& rows, uint position) thread {
    at = load4(rows.x + rows.offsets[0] + position * rows.step);
  }
};

// The matrix unit's own spread of the 16 x 8 sums: rows g and g + 8, columns 2t and 2t + 1.
template <int COLUMNS>
struct Sums<COLUMNS, true> {
  CONSTANT int RUNS = runs_of_load<COLUMNS, true>(), LANES = COLUMNS > 2 ? COLUMNS / 2 : 1;
  float at[4];

  void clear() thread {
    UNROLL
    for (int i = 0; i < 4; i++) {
      at[i] = 0;
    }
  }

  void add(uint4 pairs, const thread Activations<COLUMNS, true>& x, int q) thread {
    matrix_multiply(at, pairs, q % 2 ? x.at.z : x.at.x, q % 2 ? x.at.w : x.at.y);
  }

  // Columns of lanes whose run this is not are another run's weights times this one's activations.
  void add_scaled(const thread Sums<COLUMNS, true>& other, uint scales, int run, uint lane) thread {
    if (RUNS == 1 || lane % 4 / LANES == uint(run % RUNS * COLUMNS / (2 * LANES))) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        if (COLUMNS > 1 || i % 2 == 0) {
          at[i] += (i < 2 ? low(scales) : high(scales)) * other.at[COLUMNS > 1 ? i : i + run % 2];
        }
      }
    }
  }

  void scale(uint scales) thread {
    UNROLL
    for (int i = 0; i < 4; i++) {
      at[i] *= i < 2 ? low(scales) : high(scales);
    }
  }

  void store(Shared<float> partial, uint lane) thread {
    UNROLL
    for (int i = 0; i < 4; i++) {
      UNROLL
      for (int distance = LANES; distance < 4; distance *= 2) {
        at[i] += shuffle_xor(at[i], distance);
      }
      int column = 2 * (lane % 4) + i % 2;
      if (column < COLUMNS) {
        partial[(lane / 4 + i / 2 * 8) * COLUMNS + column] = at[i];
      }
    }
  }
};
#endif
} // namespace turboquant
