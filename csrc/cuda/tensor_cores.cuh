// 16-bit matrix fragments and the instructions on them. A fragment is spread over a warp as the PTX
// manual says of mma.m16n8k16; lane 4g + t holds, two 16-bit values to a register,
//   a [16, 16]: rows g and g + 8 of columns 2t, 2t + 1, then both rows of columns 2t + 8, 2t + 9;
//   b [16, 8]: column g of rows 2t, 2t + 1, then of rows 2t + 8, 2t + 9;
//   c [16, 8]: in fp32, columns 2t, 2t + 1 of row g, then of row g + 8.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The compute capability, times ten, from which on mma takes T; below, it does nothing.
template <typename T>
constexpr int kTensorCores = 0;
template <>
constexpr int kTensorCores<__half> = 75;
template <>
constexpr int kTensorCores<__nv_bfloat16> = 80;

#define E3VA_MMA(type)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "      \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c += a · b.
template <typename T>
__device__ __forceinline__ void mma(
    float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
#if __CUDA_ARCH__ >= 800
  if constexpr (kTensorCores<T> == 75) {
    E3VA_MMA("f16");
  } else {
    E3VA_MMA("bf16");
  }
#elif __CUDA_ARCH__ >= 750
  if constexpr (kTensorCores<T> == 75) {
    for (int half = 0; half < 2; ++half) {  // its instruction is half as deep
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  }
#endif
}

#undef E3VA_MMA

// Four 8 × 8 matrices out of shared memory, each transposed; lane 8i + r gives the address of row r
// of matrix i, and lane 4g + t gets column g of rows 2t and 2t + 1 of all four.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}
