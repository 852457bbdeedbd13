// Activations: of two products, and made ready for others, in one array of rows of `padded` halves, then what restores the
// rows.
#pragma once

namespace turboquant {

// silu(value) * up, each step in the activations' own precision, as MLX rounds it.
template <typename T>
inline float gate(float value, float up) {
  float weight = rounded<T>(1 / (1 + power_of_two(-1.44269504f * value)));
  return rounded<T>(rounded<T>(value * weight) * up);
}

// Row after row; or by 32 columns, those of all rows side by side, which a simdgroup reads at once; or in pieces of 64 rows
// and 64 columns, those of PIECE_ROWS rows beside each other, which follow each other in the order of columns, then of rows.
// A line of a piece is a row, its columns (p, t, s, h, e), see codes.metal, in the order (p, s, h, t, e) that a matrix unit
// takes them in, and its vectors of eight turned as `descriptor` says.
CONSTANT int IN_ROWS = 0, IN_RUNS = 1, IN_PIECES = 2, PIECE_ROWS = 256;

// Where a value goes; extent: how many rows there are (IN_RUNS), or halves from one row to the next.
template <int ORDER>
inline uint place_of(uint row, uint column, uint extent) {
  if (ORDER == IN_ROWS) {
    return row * extent + column;
  }
  if (ORDER == IN_RUNS) {
    return (column / 32 * extent + row) * 32 + column % 32;
  }
  uint vector = column / 32 % 2 * 4 + column / 2 % 4, pieces = row / PIECE_ROWS * (extent / 64) + column / 64;
  return (pieces * PIECE_ROWS + row % PIECE_ROWS) * 64 + 8 * (vector ^ (row % 8)) + column / 8 % 4 * 2 + column % 2;
}

// Rows that `count` rows take up.
template <int ORDER>
inline uint rows_held(uint count) {
  return ORDER == IN_PIECES ? (count + (PIECE_ROWS - 1)) / PIECE_ROWS * PIECE_ROWS : count;
}

// What restores rows: powers of two, whose exponents as floats have them are halves, one a row; without SCALED, one.
template <bool SCALED>
struct Factors {
  Device<const half> exponents;

  // After `held` rows of x.
  Factors(Device<const half> x, uint held, uint padded) : exponents(x + held * padded) {}

  Factors from(uint row) const thread {
    Factors rest = *this;
    rest.exponents = exponents + row;
    return rest;
  }

  float operator[](uint row) const thread {
    return SCALED ? bits_float(uint(static_cast<float>(exponents[row])) << 23) : 1.0f;
  }
};

} // namespace turboquant
