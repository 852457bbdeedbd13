// What NVIDIA's Hopper has besides, in CUDA: copies that signal their arrival, and products of warpgroups (four simdgroups),
// both in the background.

namespace turboquant {

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
#define SUMS_OF_64 SIXTEEN_SUMS(0), SIXTEEN_SUMS(16)
#define SUMS_OF_128 SUMS_OF_64, SIXTEEN_SUMS(32), SIXTEEN_SUMS(48)
#define SUMS_OF_256 SUMS_OF_128, SIXTEEN_SUMS(64), SIXTEEN_SUMS(80), SIXTEEN_SUMS(96), SIXTEEN_SUMS(112)
#define NAMES_OF_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_OF_128 \
  NAMES_OF_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_OF_256 \
  NAMES_OF_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sums (64 x COLUMNS) += a (64 x 16) b (16 x COLUMNS), a and sums spread over each simdgroup's 16 rows as in
// `matrix_multiply`, b from a tile in threadgroup memory, its lines columns. A and B: the operands' names, after the sums'.
#define WARPGROUP_MULTIPLY(COLUMNS, A, B) \
  __device__ inline void warpgroup_multiply(float (&sums)[COLUMNS / 2], uint4 a, Shared<uint4> tile, int step) { \
    asm volatile( \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.f16.f16 {" NAMES_OF_##COLUMNS "}, {" A "}, " B \
        ", add, 1, 1, 0;\n}" \
        : SUMS_OF_##COLUMNS \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(descriptor(tile, step))); \
  }
WARPGROUP_MULTIPLY(64, "%32, %33, %34, %35", "%36")
WARPGROUP_MULTIPLY(128, "%64, %65, %66, %67", "%68")
WARPGROUP_MULTIPLY(256, "%128, %129, %130, %131", "%132")

} // namespace turboquant
