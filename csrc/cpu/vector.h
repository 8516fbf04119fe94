// What the CPU kernels share: vectors of floats, storage types, elementary functions, one GEMM. Part of
// the namespace of each instruction set, see instruction_sets.h.
//
// Everything is inlined into the one function that E3VA_KERNEL makes for the set, so that it runs at
// that set's full width.

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

E3VA_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

E3VA_INLINE Floats broadcast(float x) { return Floats{} + x; }

E3VA_INLINE Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

E3VA_INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// Asks for what lies `ahead` values past `at`, inside of an allocation or not.
template <bool kWrite = false, typename T>
E3VA_INLINE void prefetch(const T* at, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(at) + ahead * sizeof(T)), kWrite);
}

// Storage types -----------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

E3VA_INLINE Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }

E3VA_INLINE Floats load(const BFloat16* at) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16);
}

E3VA_INLINE Floats load(const Half* at) {
  // Shifts exponent and mantissa into place; the product rebiases, subnormals included.
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words);
  const Words rest = (bits & 0x7fff) << 13;
  const Words magnitude = (Words)((Floats)rest * 0x1p112f);
  const Words special = rest | 0x7f800000;  // infinity, or a NaN with its payload
  return (Floats)(((rest >= 0x0f800000) ? special : magnitude) | (bits & 0x8000) << 16);
}

E3VA_INLINE void store(float* at, Floats x) { *reinterpret_cast<Floats*>(at) = x; }

E3VA_INLINE void store(BFloat16* at, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = Words{} + 0x7fc0;
  *reinterpret_cast<Halves*>(at) =
      __builtin_convertvector((Words)(x != x) ? quiet : rounded, Halves);
}

E3VA_INLINE void store(Half* at, Floats x) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  // Added to 2^-1, whose last place is that of float16's subnormals, a small number is rounded.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
  Words half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  *reinterpret_cast<Halves*>(at) = __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
}

// The first `n` of a vector, n < kLanes; the rest is zero, or left alone.
template <typename T>
E3VA_INLINE Floats load_some(const T* at, int64_t n) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = at[i];
  return load(padded);
}

template <typename T>
E3VA_INLINE void store_some(T* at, Floats x, int64_t n) {
  T padded[kLanes];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) at[i] = padded[i];
}

// n values, widened; `to` is zero from n to the next multiple of kLanes.
template <typename T>
E3VA_INLINE void widen(const T* __restrict__ from, int64_t n, float* __restrict__ to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_some(from + i, n - i));
}

template <typename T>
E3VA_INLINE void narrow(const float* __restrict__ from, int64_t n, T* __restrict__ to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load(from + i), n - i);
}

// Elementary functions ----------------------------------------------------------------------------

// exp(x) for x <= 0 to some 1e-7: 2^n times a polynomial of the rest (Cephes' expf). What would be
// subnormal, and slow to compute with, is zero.
E3VA_INLINE Floats exp_negative(Floats x) {
  const Ints tiny = x < -80.0f;
  x = select(tiny, broadcast(-80.0f), x);
  const Floats round = broadcast(12582912.0f);  // 1.5 · 2^23: added to it, a fraction is lost
  const Floats n = (x * 1.44269504f + round) - round;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  return select(tiny, Floats{}, p * (Floats)bits);
}

// 1/x of x ≥ 1 to 1e-7, in half the time of a division: Newton's iteration from a guess within 12 %.
E3VA_INLINE Floats reciprocal(Floats x) {
  Floats y = (Floats)(0x7ef311c7 - (Ints)x);
  for (int i = 0; i < 3; ++i) y *= 2.0f - x * y;
  return y;
}

// GELU(z) = z·Φ(z) and its derivative Φ(z) + z·φ(z), Φ to 1e-7 (Abramowitz and Stegun, 7.1.26).
E3VA_INLINE void gelu(Floats z, Floats& value, Floats& slope) {
  const Floats magnitude = select(z < 0.0f, -z, z);
  const Floats u = reciprocal(magnitude * (0.3275911f * 0.70710678f) + 1.0f);
  Floats p = u * 1.061405429f - 1.453152027f;
  p = p * u + 1.421413741f;
  p = p * u - 0.284496736f;
  p = p * u + 0.254829592f;
  const Floats bell = exp_negative(z * z * -0.5f);
  const Floats tail = p * u * bell * 0.5f;  // Φ(-|z|)
  const Floats cdf = select(z < 0.0f, tail, 1.0f - tail);
  value = z * cdf;
  slope = cdf + z * bell * 0.39894228f;
}

// GEMM --------------------------------------------------------------------------------------------

// C [m, n] (+)= A [m, k] · B [k, n], A(i, p) at A[i * row + p * step], in tiles of kRows rows and
// kVectors vectors; m must be a multiple of the one, n of the other.
template <int kRows, int kVectors>
E3VA_INLINE void gemm(
    const float* __restrict__ A, int64_t row, int64_t step, const float* __restrict__ B,
    int64_t ldb, float* __restrict__ C, int64_t ldc, int64_t m, int64_t n, int64_t k,
    bool accumulate) {
  for (int64_t i = 0; i < m; i += kRows) {
    for (int64_t j = 0; j < n; j += kVectors * kLanes) {
      Floats total[kRows][kVectors] = {};
      const float* a = A + i * row;
      const float* b = B + j;
      for (int64_t p = 0; p < k; ++p, a += step, b += ldb) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) total[r][v] += a[r * row] * load(b + v * kLanes);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* c = C + (i + r) * ldc + j + v * kLanes;
          store(c, accumulate ? load(c) + total[r][v] : total[r][v]);
        }
      }
    }
  }
}
