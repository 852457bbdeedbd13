// The kernels' dialect in Metal's own words.
#include <metal_simdgroup_matrix>

#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#define THREADGROUP_ARRAY(type, name, size) threadgroup type name[size]
// Halves that vectors of eight are read from.
#define THREADGROUP_HALVES(name, size)           \
  threadgroup uint4 name##_vectors[(size) / 8];  \
  threadgroup half* name = reinterpret_cast<threadgroup half*>(name##_vectors)
// Of memory that CUDA's launches ask for there is none.
#define THREADGROUP_LARGE(type, name, size) threadgroup type name[1]
// A constant of a program or a type must lie in this address space.
#define CONSTANT static constant constexpr const

namespace turboquant {

template <typename T>
using Device = device T*;
template <typename T>
using Shared = threadgroup T*;

inline void barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Loads before it are not put off until after it, where the compiler is known to do so.
inline void loads_first() {}

inline float shuffle_xor(float value, uint distance) {
  return simd_shuffle_xor(value, ushort(distance));
}

inline float shuffle(float value, uint lane) {
  return simd_shuffle(value, ushort(lane));
}

// The lower and the upper 16 bits of a word, and a word of two such.
inline uint lower_bits(uint word) {
  return as_type<ushort2>(word).x;
}

inline uint upper_bits(uint word) {
  return as_type<ushort2>(word).y;
}

inline uint join_bits(uint lower, uint upper) {
  return as_type<uint>(ushort2(ushort(lower), ushort(upper)));
}

// A shift that stays one where both halves of its result are taken, and is not made two that cost as much each.
inline uint shift_both(uint word, uint by) {
  return extract_bits(word, by, 32 - by);
}

// A word of each lane, for all of its simdgroup to look up, all at the same time.
struct LaneTable {
  uint mine;

  LaneTable() : mine(0) {}
  explicit LaneTable(uint word) : mine(word) {}

  uint at(uint lane) const thread {
    return simd_shuffle(mine, ushort(lane));
  }
};

// The place so many bytes after `all`.
template <typename T>
inline Device<T> bytes_after(Device<T> all, uint bytes) {
  return all + bytes / uint(sizeof(T));
}

inline uint4 load4(Device<const half> at) {
  return *reinterpret_cast<Device<const uint4>>(at);
}

inline uint4 load4(Device<const uint> at) {
  return *reinterpret_cast<Device<const uint4>>(at);
}

inline uint2 load2(Device<const uint> at) {
  return *reinterpret_cast<Device<const uint2>>(at);
}

inline uint4 load4(Shared<half> at) {
  return *reinterpret_cast<Shared<uint4>>(at);
}

inline uint4 load4_once(Device<const uint> at) {
  return *reinterpret_cast<Device<const uint4>>(at);
}

// Whether COUNT values from here on can be read at once: it makes no difference here.
template <int COUNT, typename T>
inline bool begins_vector(Device<const T>) {
  return true;
}

// Values that lie beside each other.
template <bool AT_ONCE, int COUNT, typename T>
inline void load_values(Device<const T> at, thread float (&values)[COUNT]) {
  UNROLL
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

// Eight values beside each other, at a place that eight such divide.
template <typename T>
inline void store_eight(device T* at, const thread float (&values)[8]) {
  UNROLL
  for (int i = 0; i < 8; i++) {
    at[i] = static_cast<T>(values[i]);
  }
}

inline Device<const half> as_halves(Device<const uint> at) {
  return reinterpret_cast<Device<const half>>(at);
}

inline uint load_pair(Device<const half> at) {
  return *reinterpret_cast<Device<const uint>>(at);
}

inline float low(uint pair) {
  return float(as_type<half2>(pair).x);
}

inline float high(uint pair) {
  return float(as_type<half2>(pair).y);
}

inline uint multiply_pairs(uint a, uint b) {
  return as_type<uint>(as_type<half2>(a) * as_type<half2>(b));
}

inline uint pack_halves(float first, float second) {
  return as_type<uint>(half2(half(first), half(second)));
}

inline uint add_pairs(uint a, uint b) {
  return as_type<uint>(as_type<half2>(a) + as_type<half2>(b));
}

// The low 32 bits of high:low shifted right by less than 32.
inline uint shift_right(uint low, uint high, uint by) {
  return by == 0 ? low : (low >> by) | (high << (32 - by));
}

// The nearest value that a T has.
template <typename T>
inline float rounded(float value) {
  return static_cast<float>(static_cast<T>(value));
}

inline float power_of_two(float exponent) {
  return exp2(exponent);
}

inline float larger(float a, float b) {
  return fmax(a, b);
}

inline uint float_bits(float value) {
  return as_type<uint>(value);
}

inline float bits_float(uint bits) {
  return as_type<float>(bits);
}

// The matrix unit: (first, second) += a times b, pairs of halves, each lane's as MatrixUnit<false>::seat says.
inline void multiply_eights(thread float& first, thread float& second, uint a, uint b) {
  metal::simdgroup_matrix<half, 8, 8> left, right;
  metal::simdgroup_matrix<float, 8, 8> sums;
  left.thread_elements()[0] = as_type<half2>(a).x;
  left.thread_elements()[1] = as_type<half2>(a).y;
  right.thread_elements()[0] = as_type<half2>(b).x;
  right.thread_elements()[1] = as_type<half2>(b).y;
  sums.thread_elements()[0] = first;
  sums.thread_elements()[1] = second;
  simdgroup_multiply_accumulate(sums, left, right, sums);
  first = sums.thread_elements()[0];
  second = sums.thread_elements()[1];
}

// 16 bytes.
template <typename T>
inline void copy_vector(Device<T> to, Device<const T> from) {
  *reinterpret_cast<Device<uint4>>(to) = *reinterpret_cast<Device<const uint4>>(from);
}

} // namespace turboquant
