// Products of bfloat16 in tiles, C [16, 16] += A [16, 32] · B [32, 16] in fp32: by Intel AMX, or by
// AVX-512's dot products. Part of the namespace of AVX-512, as are the kernels that use it.

#ifdef E3VA_INSTRUCTIONS
#include E3VA_INSTRUCTIONS  // tests run them on any processor
#else
#include "instructions.h"
#endif

constexpr int kTileSide = 16;   // rows of A and C, columns of B and C
constexpr int kTileDepth = 32;  // columns of A, rows of B

// Two rows of B: bfloat16s in the low and high half of each word.
typedef std::vector<uint32_t> Panels;

// bfloat16 that the processor itself converts; of what is subnormal it makes zero.
struct NativeBFloat16 : BFloat16 {};

E3VA_INLINE Floats load(const NativeBFloat16* at) {
  return (Floats)(widened(*reinterpret_cast<const Halves*>(at)) << 16);
}

E3VA_INLINE void store(NativeBFloat16* at, Floats x) {
  *reinterpret_cast<Halves*>(at) = to_bfloat16(x);
}

E3VA_INLINE Words pair(Halves low, Halves high) { return widened(low) | widened(high) << 16; }

E3VA_INLINE Halves& halves(BFloat16* at) { return *reinterpret_cast<Halves*>(at); }

E3VA_INLINE Halves halves(const BFloat16* at) { return *reinterpret_cast<const Halves*>(at); }

E3VA_INLINE Words& words(uint32_t* at) { return *reinterpret_cast<Words*>(at); }

// B [k, n] in panels of 16 columns, k a multiple of 32: what gemm_tiles takes.
E3VA_INLINE Panels pack(const float* B, int64_t k, int64_t n) {
  const int64_t depth = round_up(k, kTileDepth);
  // Columns to a multiple of two panels, the widest that gemm_tiles runs over.
  Panels panels(depth / 2 * round_up(n, 2 * kTileSide));
  for (int64_t j = 0; j < n; j += kTileSide)
    for (int64_t q = 0; q < k; q += 2) {
      const int64_t width = std::min<int64_t>(n - j, kTileSide);
      const Floats low = load_some(B + q * n + j, width);
      const Floats high = q + 1 < k ? load_some(B + (q + 1) * n + j, width) : Floats{};
      words(&panels[(j * depth + q * kTileSide) / 2]) = pair(to_bfloat16(low), to_bfloat16(high));
    }
  return panels;
}

// How kernels multiply: C [m, n] (+)= A [m, k] · B in blocks of kI × kJ tiles,
// that divide m and n; 32 divides k. Rows of A are lda apart, those of C ldc. A Scope lives meanwhile.
struct AmxTiles {
  typedef TileShapes Scope;

  template <int kI, int kJ>
  static E3VA_INLINE void gemm(
      const BFloat16* A, int64_t lda, const uint32_t* B, float* C, int64_t ldc, int64_t m,
      int64_t n, int64_t k, bool accumulate) {
    static_assert(kI * kJ <= 6);
    const int64_t panel = k / 2 * kTileSide, step = kTileDepth / 2 * kTileSide;
    for (int64_t i = 0; i < m; i += kI * kTileSide)
      for (int64_t j = 0; j < n; j += kJ * kTileSide) {
        float* c = C + i * ldc + j;
        auto each = [&]<int... kT>(std::integer_sequence<int, kT...>, auto do_tile) {
          (do_tile(std::integral_constant<int, kT>{}), ...);
        };
        constexpr auto tiles = std::make_integer_sequence<int, kI * kJ>{};
        auto at = [&](int tile) {
          return c + tile / kJ * kTileSide * ldc + tile % kJ * kTileSide;
        };
        each(tiles, [&](auto tile) {
          if (accumulate)
            tile_load<tile>(at(tile), 4 * ldc);
          else
            tile_zero<tile>();
        });
        for (int64_t p = 0; p < k / kTileDepth; ++p)
          each(tiles, [&](auto tile) {
            if (tile % kJ == 0)
              tile_load<6>(A + (i + tile / kJ * kTileSide) * lda + p * kTileDepth, 2 * lda);
            if (kJ > 1 || tile == 0)
              tile_load<7>(B + (j / kTileSide + tile % kJ) * panel + p * step, 4 * kTileSide);
            tile_dot<tile, 6, 7>();
          });
        each(tiles, [&](auto tile) { tile_store<tile>(at(tile), 4 * ldc); });
      }
  }
};

struct DotTiles {
  struct Scope {
    E3VA_INLINE Scope() {}
  };

  template <int kI, int kJ>
  static E3VA_INLINE void gemm(
      const BFloat16* A, int64_t lda, const uint32_t* B, float* C, int64_t ldc, int64_t m,
      int64_t n, int64_t k, bool accumulate) {
    constexpr int kRows = 8;
    static_assert(kTileSide % kRows == 0);
    const int64_t panel = k / 2 * kTileSide;
    for (int64_t j = 0; j < n; j += kJ * kTileSide)
      for (int64_t i = 0; i < m; i += kRows) {
        Floats total[kRows][kJ] = {};
        const uint32_t* b = B + j / kTileSide * panel;
        for (int64_t q = 0; q < k; q += 2, b += kTileSide)
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            uint32_t two;
            std::memcpy(&two, A + (i + r) * lda + q, sizeof two);
#pragma GCC unroll 2
            for (int v = 0; v < kJ; ++v)
              dot(total[r][v], Words{} + two, *reinterpret_cast<const Words*>(b + v * panel));
          }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kJ; ++v) {
            float* c = C + (i + r) * ldc + j + v * kTileSide;
            store(c, accumulate ? load(c) + total[r][v] : total[r][v]);
          }
      }
  }
};

// exp(x) for x ≤ 0 as bfloat16 needs it, to 1e-4: 2^n times a polynomial of the rest.
E3VA_INLINE Floats exp_bfloat16(Floats x) {
  const Floats power = larger(x * 1.44269504f, broadcast(-126.0f));
  const Floats n = whole(power), r = power - n;
  const Floats p = ((r * 0.05550411f + 0.24022651f) * r + 0.69314718f) * r + 1.0f;
  return times_power_of_two(p, n);
}

// GELU and its derivative as bfloat16 needs them, Φ to 3e-5 and zφ to 7e-5: odd polynomials fitted
// to both on [-4, 4], constant beyond.
E3VA_INLINE void gelu_bfloat16(Floats z, Floats& value, Floats& slope) {
  const Floats u = smaller(larger(z, broadcast(-4.0f)), broadcast(4.0f));
  const Floats w = u * u;
  Floats cdf = w * -1.58077384e-09f + 1.21710386e-07f;
  cdf = cdf * w - 4.10084966e-06f;
  cdf = cdf * w + 8.06671973e-05f;
  cdf = cdf * w - 1.04820315e-03f;
  cdf = cdf * w + 9.66487018e-03f;
  cdf = cdf * w - 6.61753736e-02f;
  cdf = cdf * w + 3.98847508e-01f;
  cdf = cdf * u + 0.5f;
  Floats density = w * 8.98973726e-10f - 7.51846904e-08f;  // times z
  density = density * w + 2.75673512e-06f;
  density = density * w - 5.86626043e-05f;
  density = density * w + 8.08418597e-04f;
  density = density * w - 7.58239756e-03f;
  density = density * w + 4.85786180e-02f;
  density = density * w - 1.98415927e-01f;
  density = density * w + 3.98686834e-01f;
  value = z * cdf;
  slope = density * u + cdf;
}
