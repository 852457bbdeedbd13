// The kernels' dialect in Metal's own words.
#define UNROLL _Pragma("clang loop unroll(full)")
#define THREADGROUP_ARRAY(type, name, size) threadgroup type name[size]

namespace turboquant {

template <typename T>
using Device = device T*;
template <typename T>
using Shared = threadgroup T*;

inline void barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

inline float shuffle_xor(float value, uint distance) {
  return simd_shuffle_xor(value, ushort(distance));
}

inline uint4 load4(Device<const half> at) {
  return *reinterpret_cast<Device<const uint4>>(at);
}

inline uint4 load4_once(Device<const uint> at) {
  return *reinterpret_cast<Device<const uint4>>(at);
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

inline uint float_bits(float value) {
  return as_type<uint>(value);
}

inline float bits_float(uint bits) {
  return as_type<float>(bits);
}

} // namespace turboquant
