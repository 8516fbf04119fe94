// Taps in fewer bits: what e3va/ops/taps.py defines, to the last bit.
#pragma once
#include "vector.h"

constexpr float kLargest[] = {0.0f, 448.0f, 127.0f, 7.0f};  // code, by Taps

// A bijection of 32-bit integers with little bias (C. Wellons' lowbias32).
template <typename Word>
E3VA_INLINE Word hash(Word x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

E3VA_INLINE Floats floor(Floats x) {
  const Floats whole = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
  return select(whole > x, whole - 1.0f, whole);
}

// float8 e4m3 of |x| ≤ 448, rounded to nearest, ties to even.
E3VA_INLINE Words to_fp8(Floats x) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  // Added to 2^14, whose last place is that of e4m3's subnormals, a small number is rounded.
  const Words subnormal = (Words)((Floats)magnitude + 0x1p14f) - (141u << 23);
  return (magnitude < (121u << 23) ? subnormal : normal) | ((bits >> 24) & 0x80);
}

E3VA_INLINE Floats from_fp8(Words code) {
  const Floats magnitude = (Floats)((code & 0x7f) << 20) * 0x1p120f;
  return (Floats)((Words)magnitude | (code & 0x80) << 24);
}

E3VA_INLINE Words load_bytes(const uint8_t* at) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(at), Words);
}

E3VA_INLINE void store_bytes(uint8_t* at, Words codes) {
  *reinterpret_cast<Bytes*>(at) = __builtin_convertvector(codes, Bytes);
}

// One token's tap x [channels], zero up to the next multiple of kLanes. `codes` is as long.
E3VA_INLINE void compress(
    const float* __restrict__ x, int64_t token, int64_t channels, Taps taps, uint32_t seed,
    uint8_t* __restrict__ codes, uint8_t* __restrict__ tap, float* __restrict__ scale) {
  Floats top = {};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats magnitude = (Floats)((Words)load(x + c) & 0x7fffffff);
    top = select(magnitude > top, magnitude, top);
  }
  float largest = 0.0f;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, top[i]);
  const float limit = kLargest[int(taps)], inverse = largest > 0.0f ? limit / largest : 0.0f;
  *scale = largest / limit;
  const Words key = Words{} + hash(seed);
  Words place = {};
  for (int i = 0; i < kLanes; ++i) place[i] = uint32_t(token * channels) + i;
  for (int64_t c = 0; c < channels; c += kLanes, place += kLanes) {
    Floats scaled = load(x + c) * inverse;
    asm("" : "+m"(scaled));  // rounded here: not to be fused with the additions below
    Words code;
    if (taps == Taps::kFp8) {
      const Floats low = select(scaled < -448.0f, broadcast(-448.0f), scaled);
      code = to_fp8(select(low > 448.0f, broadcast(448.0f), low));
    } else if (taps == Taps::kInt8) {
      const Floats round = broadcast(12582912.0f);  // 1.5 · 2^23
      code = (Words)__builtin_convertvector((scaled + round) - round, Ints) & 0xff;
    } else {
      const Ints random = (Ints)(hash(place ^ key) >> 8);
      Floats value = floor(scaled + __builtin_convertvector(random, Floats) * 0x1p-24f);
      value = select(value < -7.0f, broadcast(-7.0f), value);
      value = select(value > 7.0f, broadcast(7.0f), value);
      code = (Words)__builtin_convertvector(value + 8.0f, Ints);
    }
    store_bytes(codes + c, code);
  }
  if (taps == Taps::kInt4) {
    // Of an odd number of channels the last byte's other half is the code of the padding, zero.
    for (int64_t c = 0; c < (channels + 1) / 2; ++c)
      tap[c] = uint8_t(codes[2 * c] | codes[2 * c + 1] << 4);
  } else {
    std::memcpy(tap, codes, channels);
  }
}

// The inverse of compress: x [channels], with room up to the next multiple of kLanes past
// channels + 1, as `codes` has.
E3VA_INLINE void expand(
    const uint8_t* __restrict__ tap, float scale, int64_t channels, Taps taps,
    uint8_t* __restrict__ codes, float* __restrict__ x) {
  if (taps == Taps::kInt4)
    for (int64_t c = 0; c < (channels + 1) / 2; ++c) {
      codes[2 * c] = tap[c] & 15;
      codes[2 * c + 1] = tap[c] >> 4;
    }
  else
    std::memcpy(codes, tap, channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Words code = load_bytes(codes + c);
    Floats value;
    if (taps == Taps::kFp8)
      value = from_fp8(code);
    else if (taps == Taps::kInt8)
      value = __builtin_convertvector((Ints)(code << 24) >> 24, Floats);
    else
      value = __builtin_convertvector((Ints)code, Floats) - 8.0f;
    store(x + c, value * scale);
  }
}
