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

// ---- what Hopper has: copies that signal their arrival, and products of warpgroups (four simdgroups), both in the
// background

__device__ inline uint shared_address(const void* at) {
  return static_cast<uint>(__cvta_generic_to_shared(at));
}

// Turns over each time that all bytes which were asked for are there.
using Arrival = unsigned long long;

// By one thread, a barrier before others use it.
__device__ inline void set_up(Shared<Arrival> arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
}

// Copies find what was set up before it.
__device__ inline void set_ups_first() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void expect(Shared<Arrival> arrival, uint bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
               : "memory");
}

__device__ inline void copy(Shared<uint4> to, Device<const half> from, uint bytes, Shared<Arrival> arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(arrival))
               : "memory");
}

// By all threads, for the arrivals of even (0) or odd (1) number.
__device__ inline void wait_for(Shared<Arrival> arrival, uint turn) {
  asm volatile(
      "{\n.reg .pred there;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
      "@there bra done;\nbra again;\ndone:\n}" ::"r"(shared_address(arrival)),
      "r"(turn)
      : "memory");
}

// Between writing registers and the products that read them; the end of a group of products; all but LEFT groups done.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Computed by now, and not only when they are needed.
template <int COUNT>
__device__ inline void settle(uint4 (&values)[COUNT]) {
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    asm volatile("" : "+r"(values[i].x), "+r"(values[i].y), "+r"(values[i].z), "+r"(values[i].w));
  }
}

// Vectors of 8 halves, eight a line, with their order in line i turned by i (exclusive or), from 16 * step on.
__device__ inline unsigned long long descriptor(Shared<uint4> tile, int step) {
  return ((shared_address(tile) >> 4) + 2 * step) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#define FOUR_SUMS(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SIXTEEN_SUMS(i) FOUR_SUMS(i), FOUR_SUMS(i + 4), FOUR_SUMS(i + 8), FOUR_SUMS(i + 12)

// sums (64 x COLUMNS) += a (64 x 16) b (16 x COLUMNS), a and sums spread over each simdgroup's 16 rows as in
// `matrix_multiply`, b from a tile in threadgroup memory, its lines columns.
__device__ inline void warpgroup_multiply(float (&sums)[32], uint4 a, Shared<uint4> tile, int step) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
      : SIXTEEN_SUMS(0), SIXTEEN_SUMS(16)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(descriptor(tile, step)));
}

__device__ inline void warpgroup_multiply(float (&sums)[64], uint4 a, Shared<uint4> tile, int step) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : SIXTEEN_SUMS(0), SIXTEEN_SUMS(16), SIXTEEN_SUMS(32), SIXTEEN_SUMS(48)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(descriptor(tile, step)));
}

__device__ inline void warpgroup_multiply(float (&sums)[128], uint4 a, Shared<uint4> tile, int step) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, add, 1, 1, 0;\n}"
      : SIXTEEN_SUMS(0), SIXTEEN_SUMS(16), SIXTEEN_SUMS(32), SIXTEEN_SUMS(48), SIXTEEN_SUMS(64), SIXTEEN_SUMS(80),
        SIXTEEN_SUMS(96), SIXTEEN_SUMS(112)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(descriptor(tile, step)));
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
