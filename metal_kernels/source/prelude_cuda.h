// The kernels' dialect in CUDA. NVIDIA_INSTRUCTIONS: byte permutation and the matrix units are there.
#define NVIDIA_INSTRUCTIONS 1
#define UNROLL _Pragma("unroll")
#define THREADGROUP_ARRAY(type, name, size) __shared__ type name[size]
#define THREADGROUP_HALVES(name, size) __shared__ __align__(16) half name[size]
#define CONSTANT static constexpr
#define thread
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup threadIdx.x
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup (threadIdx.x % 32)

using uint = unsigned int;

namespace turboquant {

template <typename T>
using Device = T*;
template <typename T>
using Shared = T*;

__device__ inline void barrier() {
  __syncthreads();
}

// Loads before it are not put off until after it.
__device__ inline void loads_first() {
  __syncwarp();
}

__device__ inline float shuffle_xor(float value, uint distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

__device__ inline float shuffle(float value, uint lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ inline uint4 load4(Device<const half> at) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline uint4 load4(Shared<half> at) {
  return *reinterpret_cast<uint4*>(at);
}

// Read once: keep it out of the first cache, where activations live.
__device__ inline uint4 load4_once(Device<const uint> at) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline uint load_pair(Device<const half> at) {
  return __ldg(reinterpret_cast<const uint*>(at));
}

__device__ inline float low(uint pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
}

__device__ inline float high(uint pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

__device__ inline uint multiply_pairs(uint a, uint b) {
  uint product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ inline uint pack_halves(float first, float second) {
  __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<uint*>(&pair);
}

__device__ inline uint add_pairs(uint a, uint b) {
  uint sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// The low 32 bits of high:low shifted right by less than 32.
__device__ inline uint shift_right(uint low, uint high, uint by) {
  return __funnelshift_r(low, high, by);
}

__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

__device__ inline uint float_bits(float value) {
  return __float_as_uint(value);
}

__device__ inline float bits_float(uint bits) {
  return __uint_as_float(bits);
}

__device__ inline uint byte_permute(uint a, uint b, uint selector) {
  uint bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8), spread over a simdgroup as PTX's mma.m16n8k16 says.
__device__ inline void matrix_multiply(float (&sums)[4], uint4 a, uint b0, uint b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

} // namespace turboquant
