// Metal's names for clang, which reads Metal itself on a Mac: a pointer to one address space is none to another. In C++ what
// names none lies with the thread, as in Metal up to 4.0; in C++ for OpenCL anywhere, as in Metal from 4.1 on.
#ifdef __OPENCL_CPP_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define KERNEL __kernel
#else
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define KERNEL
using half = _Float16;
#endif

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using bfloat16_t = __bf16;
using uint2 = uint __attribute__((ext_vector_type(2)));
using uint3 = uint __attribute__((ext_vector_type(3)));
using uint4 = uint __attribute__((ext_vector_type(4)));
using half2 = half __attribute__((ext_vector_type(2)));
using ushort2 = ushort __attribute__((ext_vector_type(2)));
using float2 = float __attribute__((ext_vector_type(2)));

// Vectors outside Metal know braces, not calls.
#define half2(first, second) (half2{first, second})
#define ushort2(first, second) (ushort2{first, second})

template <typename To, typename From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, value);
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags);
float simd_shuffle(float value, ushort lane);
uint simd_shuffle(uint value, ushort lane);
float simd_shuffle_xor(float value, ushort distance);
uint extract_bits(uint value, uint offset, uint bits);
float exp(float value);
float exp2(float value);
float fmax(float a, float b);
float sqrt(float value);
float abs(float value);
float rint(float value);
float max(float a, float b);
float min(float a, float b);

namespace metal {
template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  using Elements = T __attribute__((ext_vector_type(2)));
  Elements elements;
  thread Elements& thread_elements() thread;
};
} // namespace metal
template <typename T, typename U>
void simdgroup_multiply_accumulate(
    thread metal::simdgroup_matrix<T, 8, 8>& sums, metal::simdgroup_matrix<U, 8, 8> left,
    metal::simdgroup_matrix<U, 8, 8> right, metal::simdgroup_matrix<T, 8, 8> added);
