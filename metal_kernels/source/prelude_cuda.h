// The kernels' dialect in CUDA. NVIDIA_INSTRUCTIONS: byte permutation and the matrix units are there.
#define NVIDIA_INSTRUCTIONS 1
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define THREADGROUP_ARRAY(type, name, size) __shared__ type name[size]
#define THREADGROUP_HALVES(name, size) __shared__ __align__(16) half name[size]
// All arrays of this kind begin at the same place, of the memory that the launch asks for.
#define THREADGROUP_LARGE(type, name, size) extern __shared__ __align__(1024) type name[]
#define CONSTANT static constexpr
#define thread
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup threadIdx.x
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup turboquant::lane_index()

// MLX writes the kernel's signature, to which the bound belongs, after this.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(MOST_THREADS)

using uint = unsigned int;

namespace turboquant {

template <typename T>
using Device = T*;
template <typename T>
using Shared = T*;

// Not as the remainder of the thread's number, of which compilers make it again wherever it is needed.
__device__ inline uint lane_index() {
  uint lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ inline void barrier() {
  __syncthreads();
}

// Of the THREADS threads of team `number`, less than 15.
template <int THREADS>
__device__ inline void team_barrier(uint number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number + 1), "n"(THREADS) : "memory");
}

// Loads before it are not put off until after it.
__device__ inline void loads_first() {
  __syncwarp();
}

// The place so many bytes after `all`; with as few bits a GPU adds them while it reads.
template <typename T>
__device__ inline Device<T> bytes_after(Device<T> all, uint bytes) {
  return reinterpret_cast<Device<T>>(reinterpret_cast<const char*>(all) + bytes);
}

// Words so many bytes after `all`, two where 8 divides that.
__device__ inline uint word_at(Shared<uint> all, uint bytes) {
  return *reinterpret_cast<const uint*>(reinterpret_cast<const char*>(all) + bytes);
}

__device__ inline uint2 two_words_at(Shared<uint> all, uint bytes) {
  return *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(all) + bytes);
}

__device__ inline void store4(Shared<uint> at, uint4 words) {
  *reinterpret_cast<uint4*>(at) = words;
}

__device__ inline float shuffle_xor(float value, uint distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

__device__ inline float shuffle(float value, uint lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// What is the same for all of a simdgroup, as the compiler does not know.
__device__ inline uint same_in_simdgroup(uint value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// The lower and the upper 16 bits of a word, and a word of two such.
__device__ inline uint lower_bits(uint word) {
  return word & 0xffffu;
}

__device__ inline uint upper_bits(uint word) {
  return word >> 16;
}

__device__ inline uint join_bits(uint lower, uint upper) {
  return (lower & 0xffffu) | (upper << 16);
}

// A shift of which both halves are taken.
__device__ inline uint shift_both(uint word, uint by) {
  return word >> by;
}

// A word of each lane, for all of its simdgroup to look up, all at the same time.
struct LaneTable {
  uint mine;

  __device__ LaneTable() : mine(0) {}
  __device__ explicit LaneTable(uint word) : mine(word) {}

  __device__ uint at(uint lane) const {
    return __shfl_sync(0xffffffffu, mine, lane);
  }
};

__device__ inline uint4 load4(Device<const half> at) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

__device__ inline uint4 load4(Device<const uint> at) {
  return *reinterpret_cast<const uint4*>(at);
}

__device__ inline uint2 load2(Device<const uint> at) {
  return *reinterpret_cast<const uint2*>(at);
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

// Whether COUNT values from here on can be read at once.
template <int COUNT, typename T>
__device__ inline bool begins_vector(Device<const T> at) {
  return reinterpret_cast<size_t>(at) % (COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) == 0;
}

// Values that lie beside each other; AT_ONCE: where a vector begins.
template <bool AT_ONCE, int COUNT, typename T>
__device__ inline void load_values(Device<const T> at, float (&values)[COUNT]) {
  struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Vector {
    T at[COUNT];
  } all;
  if (AT_ONCE) {
    all = *reinterpret_cast<const Vector*>(at);
  } else {
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      all.at[i] = at[i];
    }
  }
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    values[i] = static_cast<float>(all.at[i]);
  }
}

// Two values beside each other, at a place that two such divide.
template <typename T>
__device__ inline void store_pair(T* at, T first, T second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  *reinterpret_cast<Pair*>(at) = Pair{first, second};
}

// Eight values beside each other, at a place that eight such, or 16 bytes, divide.
template <typename T>
__device__ inline void store_eight(T* at, const float (&values)[8]) {
  struct alignas(16) Vector {
    T at[8];
  } all;
  UNROLL
  for (int i = 0; i < 8; i++) {
    all.at[i] = static_cast<T>(values[i]);
  }
  *reinterpret_cast<Vector*>(at) = all;
}

__device__ inline Device<const half> as_halves(Device<const uint> at) {
  return reinterpret_cast<Device<const half>>(at);
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

// The nearest value that a T has.
template <typename T>
__device__ inline float rounded(float value) {
  return static_cast<float>(static_cast<T>(value));
}

// Two at a time are faster than one, and the upper of two is a float's upper half.
template <>
__device__ inline float rounded<__nv_bfloat16>(float value) {
  uint pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(value), "f"(0.0f));
  return __uint_as_float(pair);
}

__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

__device__ inline float larger(float a, float b) {
  return fmaxf(a, b);
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

// The transpose of a matrix (8 x 8) of which a lane has two halves of a row.
__device__ inline uint transpose(uint pair) {
  uint turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8), spread over a simdgroup as PTX's mma.m16n8k16 says.
__device__ inline void matrix_multiply(float (&sums)[4], uint4 a, uint b0, uint b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// 16 bytes.
template <typename T>
__device__ inline void copy_vector(Device<T> to, Shared<T> from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

template <typename T>
__device__ inline void copy_vector(Device<T> to, Device<const T> from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

} // namespace turboquant
