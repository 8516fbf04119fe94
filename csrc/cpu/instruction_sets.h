// Compiles E3VA_SOURCE once for each instruction set, in a namespace of its own where kLanes floats
// make a vector and kSumRows × kSumVectors fill the registers with the sums of a GEMM over rows. Only
// the functions that E3VA_KERNEL makes are compiled for the set; all else is inlined into them.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../params.h"
#include "../window_index.h"
#include "instruction_set.h"

#define E3VA_INLINE inline __attribute__((always_inline))

#if defined(E3VA_INSTRUCTIONS)  // tests bring those of tiles along, for any processor
#define E3VA_HAVE_TILES 1
#elif defined(__x86_64__) && __has_include(<amxtileintrin.h>)  // the assembler knows tiles, too
#define E3VA_HAVE_TILES 1
#else
#define E3VA_HAVE_TILES 0
#endif

// In a set: one entry point over the items [begin, end). `run` is a function template on the storage
// type; `run_in_tiles`, in AVX-512, one on how bfloat16 is multiplied (see tiles.h).
#define E3VA_KERNEL(name, Params)                                                \
  E3VA_TARGET static void name(const Params& p, int64_t begin, int64_t end) {    \
    switch (p.dtype) {                                                           \
      case Dtype::kFloat:                                                        \
        return run<float>(p, begin, end);                                        \
      case Dtype::kHalf:                                                         \
        return run<Half>(p, begin, end);                                         \
      case Dtype::kBFloat16:                                                     \
        return run<BFloat16>(p, begin, end);                                     \
    }                                                                            \
  }
#define E3VA_TILED_KERNEL(name, Params)                                                     \
  E3VA_TARGET static void name##_in_tiles(const Params& p, int64_t begin, int64_t end) {    \
    run_in_tiles<AmxTiles>(p, begin, end);                                                  \
  }                                                                                         \
  E3VA_TARGET static void name##_in_dots(const Params& p, int64_t begin, int64_t end) {     \
    run_in_tiles<DotTiles>(p, begin, end);                                                  \
  }

// After the sets: the entry point that chooses among them.
#if E3VA_HAVE_TILES
#define E3VA_IN_TILES(name)                                                       \
  if (p.dtype == Dtype::kBFloat16 && set >= InstructionSet::kDots)                \
    return set == InstructionSet::kTiles ? avx512::name##_in_tiles(p, begin, end) \
                                         : avx512::name##_in_dots(p, begin, end);
#else
#define E3VA_IN_TILES(name)
#endif
#if defined(__x86_64__) && !defined(E3VA_INSTRUCTIONS)
#define E3VA_IN_VECTORS(name)                                             \
  if (set >= InstructionSet::kAvx512) return avx512::name(p, begin, end); \
  if (set >= InstructionSet::kAvx2) return avx2::name(p, begin, end);
#else
#define E3VA_IN_VECTORS(name)
#endif
#define E3VA_DISPATCH(name, Params)                                \
  void name(const Params& p, int64_t begin, int64_t end) {         \
    [[maybe_unused]] const InstructionSet set = instruction_set(); \
    E3VA_IN_TILES(name)                                            \
    E3VA_IN_VECTORS(name)                                          \
    baseline::name(p, begin, end);                                 \
  }

#if defined(__x86_64__) || E3VA_HAVE_TILES
#ifdef E3VA_INSTRUCTIONS
#define E3VA_TARGET
#else
#define E3VA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif
#define E3VA_TILED E3VA_HAVE_TILES
namespace {
namespace avx512 {
constexpr int kLanes = 16, kSumRows = 8, kSumVectors = 2;
#include "vector.h"
#if E3VA_HAVE_TILES
#include "tiles.h"
#endif
#include E3VA_SOURCE
}  // namespace avx512
}  // namespace
#undef E3VA_TARGET
#undef E3VA_TILED
#endif

#if defined(__x86_64__) && !defined(E3VA_INSTRUCTIONS)
#define E3VA_TARGET __attribute__((target("avx2,fma")))
#define E3VA_TILED 0
namespace {
namespace avx2 {
constexpr int kLanes = 8, kSumRows = 4, kSumVectors = 2;
#include "vector.h"
#include E3VA_SOURCE
}  // namespace avx2
}  // namespace
#undef E3VA_TARGET
#undef E3VA_TILED
#endif

#define E3VA_TARGET
#define E3VA_TILED 0
namespace {
namespace baseline {
constexpr int kLanes = 4, kSumRows = 4, kSumVectors = 2;
#include "vector.h"
#include E3VA_SOURCE
}  // namespace baseline
}  // namespace
