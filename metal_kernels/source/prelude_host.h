// The kernels' dialect on a processor, over an emulated GPU (emulator.h), with NVIDIA's instructions beside Metal's.
// Pointers are classes: an address space left out does not compile, and every access is checked.
#include "emulator.h"

#define NVIDIA_INSTRUCTIONS 1
#define UNROLL
#define ROLLED
#define THREADGROUP_ARRAY(type, name, size) emulator::Shared<type> name = emulator::shared_array<type>(size)
#define THREADGROUP_HALVES(name, size) THREADGROUP_ARRAY(half, name, size)
#define THREADGROUP_LARGE(type, name, size) emulator::Shared<type> name = emulator::large_array<type>(size)
#define CONSTANT static constexpr
#define thread
#define threadgroup_position_in_grid emulator::group_position()
#define threadgroups_per_grid emulator::group_count()
#define thread_index_in_threadgroup emulator::thread_index()
#define simdgroup_index_in_threadgroup (emulator::thread_index() / 32)
#define thread_index_in_simdgroup (emulator::thread_index() % 32)

using uint = unsigned int;
using half = _Float16;
using bfloat16_t = emulator::bfloat16;
using std::rint;
using std::sqrt;

struct uint2 {
  uint x, y;
};

struct uint4 {
  uint x, y, z, w;
};

namespace turboquant {

template <typename T>
using Device = emulator::Device<T>;
template <typename T>
using Shared = emulator::Shared<T>;

inline void barrier(int line = __builtin_LINE()) {
  emulator::barrier(line);
}

template <int THREADS>
inline void team_barrier(uint number, int line = __builtin_LINE()) {
  emulator::team_barrier(THREADS, number, line);
}

inline void loads_first() {}

// The place so many bytes after `all`.
template <typename T>
inline Device<T> bytes_after(Device<T> all, uint bytes) {
  return all + bytes / uint(sizeof(T));
}

// Words so many bytes after `all`, two where 8 divides that.
inline uint word_at(Shared<uint> all, uint bytes) {
  return all[bytes / 4];
}

inline uint2 two_words_at(Shared<uint> all, uint bytes) {
  return uint2{all[bytes / 4], all[bytes / 4 + 1]};
}

inline void store4(Shared<uint> at, uint4 words) {
  uint all[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 4; i++) {
    at[i] = all[i];
  }
}

inline float shuffle_xor(float value, uint distance, int line = __builtin_LINE()) {
  uint lane = emulator::thread_index() % 32;
  return emulator::exchange(value, line)[lane ^ distance];
}

inline float shuffle(float value, uint lane, int line = __builtin_LINE()) {
  return emulator::exchange(value, line)[lane];
}

inline uint same_in_simdgroup(uint value, int line = __builtin_LINE()) {
  return emulator::exchange(value, line)[0];
}

// The lower and the upper 16 bits of a word, and a word of two such.
inline uint lower_bits(uint word) {
  return word & 0xffffu;
}

inline uint upper_bits(uint word) {
  return word >> 16;
}

inline uint join_bits(uint lower, uint upper) {
  return (lower & 0xffffu) | (upper << 16);
}

// A shift of which both halves are taken.
inline uint shift_both(uint word, uint by) {
  return word >> by;
}

// A word of each lane, for all of its simdgroup to look up, all at the same time.
class LaneTable {
 public:
  LaneTable() = default;
  explicit LaneTable(uint word, int line = __builtin_LINE()) : all_(emulator::exchange(word, line)) {}

  uint at(uint lane) const {
    return emulator::looked_up(all_, lane);
  }

 private:
  std::array<uint, emulator::SIMD> all_{};
};

inline uint4 load4(Device<const half> at) {
  return at.as<uint4>();
}

inline uint4 load4(Device<const uint> at) {
  return at.as<uint4>();
}

inline uint2 load2(Device<const uint> at) {
  return at.as<uint2>();
}

inline uint4 load4(Shared<half> at) {
  uint words[4];
  for (int i = 0; i < 4; i++) {
    uint low_bits = emulator::bits_as<unsigned short>(half(at[2 * i]));
    words[i] = low_bits | (uint(emulator::bits_as<unsigned short>(half(at[2 * i + 1]))) << 16);
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

inline uint4 load4_once(Device<const uint> at) {
  return at.as<uint4>();
}

// Whether COUNT values from here on can be read at once: it makes no difference here.
template <int COUNT, typename T>
inline bool begins_vector(Device<const T>) {
  return true;
}

// Values that lie beside each other.
template <bool AT_ONCE, int COUNT, typename T>
inline void load_values(Device<const T> at, float (&values)[COUNT]) {
  for (int i = 0; i < COUNT; i++) {
    values[i] = static_cast<float>(at[i]);
  }
}

// Two values beside each other, at a place that two such divide.
template <typename TO, typename T>
inline void store_pair(TO at, T first, T second) {
  at[0] = first;
  at[1] = second;
}

template <typename T>
inline void store_eight(Device<T> at, const float (&values)[8]) {
  for (int i = 0; i < 8; i++) {
    at[i] = static_cast<T>(values[i]);
  }
}

inline Device<const half> as_halves(Device<const uint> at) {
  return at.over<const half>();
}

inline uint load_pair(Device<const half> at) {
  return at.as<uint>();
}

inline float low(uint pair) {
  return float(emulator::bits_as<half>(static_cast<unsigned short>(pair & 0xffffu)));
}

inline float high(uint pair) {
  return float(emulator::bits_as<half>(static_cast<unsigned short>(pair >> 16)));
}

inline uint multiply_pairs(uint a, uint b) {
  uint first = emulator::bits_as<unsigned short>(half(low(a) * low(b)));
  uint second = emulator::bits_as<unsigned short>(half(high(a) * high(b)));
  return first | (second << 16);
}

inline uint pack_halves(float first, float second) {
  uint low_bits = emulator::bits_as<unsigned short>(half(first));
  return low_bits | (uint(emulator::bits_as<unsigned short>(half(second))) << 16);
}

inline uint add_pairs(uint a, uint b) {
  return pack_halves(low(a) + low(b), high(a) + high(b));
}

inline uint shift_right(uint low_word, uint high_word, uint by) {
  return by == 0 ? low_word : (low_word >> by) | (high_word << (32 - by));
}

// The nearest value that a T has.
template <typename T>
inline float rounded(float value) {
  return static_cast<float>(static_cast<T>(value));
}

inline float power_of_two(float exponent) {
  return std::exp2(exponent);
}

inline float larger(float a, float b) {
  return std::fmax(a, b);
}

inline uint float_bits(float value) {
  return emulator::bits_as<uint>(value);
}

inline float bits_float(uint bits) {
  return emulator::bits_as<float>(bits);
}

// NVIDIA's prmt: each nibble of the selector takes one of eight bytes; its top bit would spread that byte's sign.
inline uint byte_permute(uint a, uint b, uint selector) {
  unsigned long long bytes = (static_cast<unsigned long long>(b) << 32) | a;
  uint out = 0;
  for (int i = 0; i < 4; i++) {
    uint nibble = (selector >> (4 * i)) & 15u;
    uint byte = static_cast<uint>(bytes >> (8 * (nibble & 7u))) & 255u;
    out |= (nibble & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return out;
}

// NVIDIA's movmatrix: lane (g, t) has columns 2t and 2t + 1 of row g of the matrix and then of its transpose.
inline uint transpose(uint pair, int line = __builtin_LINE()) {
  const auto& all = emulator::exchange(pair, line);
  uint g = emulator::thread_index() % 32 / 4, column = emulator::thread_index() % 4 * 2, by = 16 * (g % 2);
  return ((all[4 * column + g / 2] >> by) & 0xffffu) | (((all[4 * (column + 1) + g / 2] >> by) & 0xffffu) << 16);
}

// NVIDIA's mma.m16n8k16: register r of a has rows g + 8 (r % 2) and columns 2t + 8 (r / 2) and the next one.
inline void matrix_multiply(float (&sums)[4], uint4 a, uint b0, uint b1, int line = __builtin_LINE()) {
  struct Operands {
    uint a[4], b[2];
  };
  const auto& all = emulator::exchange(Operands{{a.x, a.y, a.z, a.w}, {b0, b1}}, line);
  uint lane = emulator::thread_index() % 32;
  for (uint i = 0; i < 4; i++) {
    uint row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (uint k = 0; k < 16; k++) {
      uint w = all[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
      uint x = all[4 * column + k % 8 / 2].b[k / 8];
      sum += (k % 2 ? high(w) : low(w)) * (k % 2 ? high(x) : low(x));
    }
    sums[i] += sum;
  }
}

// Apple's simdgroup_multiply_accumulate of 8 x 8 matrices: a lane has elements (row, column) and (row, column + 1).
inline void multiply_eights(float& first, float& second, uint a, uint b, int line = __builtin_LINE()) {
  struct Operands {
    uint a, b;
  };
  const auto& all = emulator::exchange(Operands{a, b}, line);
  uint left[8][8], right[8][8];
  for (uint lane = 0; lane < 32; lane++) {
    uint quad = lane / 4, row = (quad & 4) + lane / 2 % 4, column = (quad & 2) * 2 + lane % 2 * 2;
    for (uint i = 0; i < 2; i++) {
      left[row][column + i] = (all[lane].a >> (16 * i)) & 0xffffu;
      right[row][column + i] = (all[lane].b >> (16 * i)) & 0xffffu;
    }
  }
  uint lane = emulator::thread_index() % 32, quad = lane / 4;
  uint row = (quad & 4) + lane / 2 % 4, column = (quad & 2) * 2 + lane % 2 * 2;
  for (uint k = 0; k < 8; k++) {
    first += low(left[row][k]) * low(right[k][column]);
    second += low(left[row][k]) * low(right[k][column + 1]);
  }
}

template <typename T>
inline void copy_vector(Device<T> to, Shared<T> from) {
  for (uint i = 0; i < 16 / sizeof(T); i++) {
    to[i] = from[i];
  }
}

template <typename T>
inline void copy_vector(Device<T> to, Device<const T> from) {
  for (uint i = 0; i < 16 / sizeof(T); i++) {
    to[i] = from[i];
  }
}

} // namespace turboquant
