// Matrix units: products of a tile's planes, 16 rows by 16 columns of weights, with 8 columns of activations.
//
// A lane's seat is 4 * g + t: it holds columns 2t and 2t + 1, and the 8 after them, of rows g and g + 8 of the weights,
// and columns 2t and 2t + 1 of the same rows of the sums. `operands` are the activations for a lane's two planes of a
// half unit, from (columns, 8 vectors of 8 halves) in threadgroup memory, where vector v of a column is in `place`.
#pragma once

#include "codes.metal"

namespace turboquant {

// Apple's, 8 by 8 halves at a time; activations too lie in pairs of columns.
template <bool NVIDIA>
struct MatrixUnit {
  static uint seat(uint lane) {
    uint row = lane / 16 * 4 + lane / 2 % 4, pair = lane / 8 % 2 * 2 + lane % 2;
    return 4 * row + pair;
  }

  // Columns next to each other, and every second one, exchange their halves, so that lanes read from all banks at once.
  static uint place(uint column, uint vector) {
    return column * 8 + (vector ^ (4 * ((column ^ (column / 2)) % 2)));
  }

  static uint pair_of(uint first, uint second, uint odd) {
    return odd ? join_bits(upper_bits(first), upper_bits(second)) : join_bits(lower_bits(first), lower_bits(second));
  }

  static uint4 operands(Shared<uint4> tile, uint first_column, uint half_unit, uint seat) {
    uint column = first_column + 2 * (seat % 4), vector = 4 * half_unit + seat / 8, odd = seat / 4 % 2;
    uint4 one = tile[place(column, vector)], two = tile[place(column + 1, vector)];
    return uint4{
        pair_of(one.x, two.x, odd), pair_of(one.y, two.y, odd), pair_of(one.z, two.z, odd),
        pair_of(one.w, two.w, odd)};
  }

  static void multiply(thread float (&sums)[4], uint4 weights, uint first, uint second) {
    multiply_eights(sums[0], sums[1], weights.x, first);
    multiply_eights(sums[2], sums[3], weights.y, first);
    multiply_eights(sums[0], sums[1], weights.z, second);
    multiply_eights(sums[2], sums[3], weights.w, second);
  }

  // One of a pair of halves, twice.
  static uint twice(uint pair, bool upper) {
    return pair_of(pair, pair, upper);
  }
};

#ifdef NVIDIA_INSTRUCTIONS
// NVIDIA's, a plane at a time; each activation vector lies whole in a lane.
template <>
struct MatrixUnit<true> {
  static uint seat(uint lane) {
    return lane;
  }

  static uint place(uint column, uint vector) {
    return MatrixUnit<false>::place(column, vector);
  }

  static uint4 operands(Shared<uint4> tile, uint first_column, uint half_unit, uint seat) {
    return tile[place(first_column + seat / 4, 4 * half_unit + seat % 4)];
  }

  static void multiply(thread float (&sums)[4], uint4 weights, uint first, uint second) {
    matrix_multiply(sums, weights, first, second);
  }

  static uint twice(uint pair, bool upper) {
    return byte_permute(pair, 0, upper ? 0x3232u : 0x1010u);
  }
};
#endif

} // namespace turboquant
