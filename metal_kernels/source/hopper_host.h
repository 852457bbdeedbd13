// What NVIDIA's Hopper has besides, emulated: copies, done at once, and products, done when they are waited for.

namespace turboquant {

// How many copies it was the arrival of.
using Arrival = uint;

inline void set_up(Shared<Arrival> arrival) {
  arrival[0] = 0;
}

inline void set_ups_first() {}

inline void expect(Shared<Arrival> arrival, uint) {
  arrival[0] = arrival[0] + 1;
}

inline void copy(Shared<uint4> to, Device<const half> from, uint bytes, Shared<Arrival>) {
  for (uint i = 0; i < bytes / 16; i++) {
    to[i] = load4(from + 8 * i);
  }
}

// Copies are there at once: whoever asks for one before all others have read what lies there has written too early.
inline void wait_for(Shared<Arrival> arrival, uint turn) {
  if (arrival[0] % 2 == turn) {
    emulator::fail("a wait for a copy that nobody asked for (copies, turn)", arrival[0], turn);
  }
}

inline void begin_products() {}

inline void end_products() {
  emulator::fiber().product_groups++;
}

template <int LEFT>
inline void wait_for_products() {
  emulator::finish_products(LEFT);
}

template <int COUNT>
inline void settle(uint4 (&values)[COUNT]) {
  emulator::check_registers(values, sizeof values);
}

// NVIDIA's wgmma of one simdgroup's rows, with 128-byte swizzling. `a` is read, and sums are added to, until it is waited for.
template <int VALUES>
inline void warpgroup_multiply(float (&sums)[VALUES], const uint4& a, Shared<uint4> tile, int step,
                               int line = __builtin_LINE()) {
  uint g = emulator::thread_index() % 32 / 4, t = emulator::thread_index() % 4;
  emulator::Product product{sums, std::vector<float>(VALUES), &a, {}, 0};
  for (uint piece = 0; piece < VALUES / 4; piece++) {
    uint column = 8 * piece + g, vector = 2 * step;
    uint places[2] = {8 * column + (vector ^ (column % 8)), 8 * column + ((vector + 1) ^ (column % 8))};
    uint4 first = tile[places[0]], second = tile[places[1]];
    uint one[4] = {first.x, first.y, first.z, first.w}, two[4] = {second.x, second.y, second.z, second.w};
    float four[4] = {0, 0, 0, 0};
    matrix_multiply(four, a, one[t], two[t], line);
    for (uint i = 0; i < 4; i++) {
      product.added[4 * piece + i] = four[i];
    }
    product.held.insert(product.held.end(), {tile.touch(places[0]), tile.touch(places[1])});
  }
  emulator::begin_product(std::move(product));
}

} // namespace turboquant
