// Taps in fewer bits: what e3va/ops/storage.py defines, to the last bit.

constexpr float kTiny = 1e-30f;  // the largest value of a token that is stored as zero
constexpr float kLargest[] = {0.0f, 448.0f, 127.0f, 7.0f};  // code, by Storage

// A bijection of 32-bit integers with little bias (C. Wellons' lowbias32).
template <typename Word>
E3VA_INLINE Word hash(Word x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
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

E3VA_INLINE Bytes bytes_at(const uint8_t* at) { return *reinterpret_cast<const Bytes*>(at); }

E3VA_INLINE Words load_bytes(const uint8_t* at) {
  // In two steps: for one GCC takes the bytes apart one by one.
  return __builtin_convertvector(__builtin_convertvector(bytes_at(at), Halves), Words);
}

E3VA_INLINE void store_bytes(uint8_t* at, Words codes) {
  *reinterpret_cast<Bytes*>(at) = __builtin_convertvector(codes, Bytes);
}

// One token's tap x [channels], zero up to the next multiple of kLanes, readable for kLanes more.
// `codes` has room for `channels` rounded up to a multiple of kLanes.
template <typename T>
E3VA_INLINE void compress(
    const T* __restrict__ x, int64_t token, int64_t channels, Storage storage, uint32_t seed,
    uint8_t* __restrict__ codes, uint8_t* __restrict__ tap, float* __restrict__ scale) {
  Ints top = {};  // the bits of a positive float are in its order
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Ints magnitude = (Ints)load(x + c) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max(bits, top[i]);
  const float largest = std::bit_cast<float>(bits);
  const float limit = kLargest[int(storage)], inverse = largest > kTiny ? limit / largest : 0.0f;
  *scale = largest / limit;
  if (storage == Storage::kInt4) {
    // In fixed point of 16 bits after the point: one hash serves two channels.
    const int64_t bytes = (channels + 1) / 2;
    const Words key = Words{} + hash(seed);
    Words place = {};
    for (int i = 0; i < kLanes; ++i) place[i] = uint32_t(token * bytes) + i;
    for (int64_t c = 0; c < bytes; c += kLanes, place += kLanes) {
      const Words random = hash(place ^ key);
      const Floats low = load(x + c) * (inverse * 0x1p16f);
      const Floats high = load(x + bytes + c) * (inverse * 0x1p16f);
      const Words one = (Words)__builtin_convertvector(low, Ints) + (8 << 16) + (random & 0xffff);
      const Words two = (Words)__builtin_convertvector(high, Ints) + (8 << 16) + (random >> 16);
      store_bytes(codes + c, (one >> 16 & 15) | (two >> 12 & 0xf0));
    }
    std::memcpy(tap, codes, bytes);
    return;
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    Floats scaled = load(x + c) * inverse;
    Words code;
    if (storage == Storage::kFp8) {
      const Floats low = select(scaled < -448.0f, broadcast(-448.0f), scaled);
      code = to_fp8(select(low > 448.0f, broadcast(448.0f), low));
    } else {
      asm("" : "+m"(scaled));  // rounded here: not to be fused with the addition below
      const Floats round = broadcast(12582912.0f);  // 1.5 · 2^23
      code = (Words)__builtin_convertvector((scaled + round) - round, Ints) & 0xff;
    }
    store_bytes(codes + c, code);
  }
  std::memcpy(tap, codes, channels);
}

// The inverse of compress: x [channels], with room for 2 kLanes more. `codes` has room for
// `channels` rounded up to a multiple of kLanes.
E3VA_INLINE void expand(
    const uint8_t* __restrict__ tap, float scale, int64_t channels, Storage storage,
    uint8_t* __restrict__ codes, float* __restrict__ x) {
  if (storage == Storage::kInt4) {
    const int64_t bytes = (channels + 1) / 2;
    std::memcpy(codes, tap, bytes);
    for (int shift : {0, 4}) {
      float* half = shift ? x + bytes : x;
      for (int64_t c = 0; c < bytes; c += kLanes) {
        const Ints code = (Ints)(load_bytes(codes + c) >> shift & 15);
        store(half + c, (__builtin_convertvector(code, Floats) - 8.0f) * scale);
      }
    }
    return;
  }
  std::memcpy(codes, tap, channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Words code = load_bytes(codes + c);
    const Ints whole = (Ints)(code << 24) >> 24;
    store(x + c, scale * (storage == Storage::kFp8 ? from_fp8(code)
                                             : __builtin_convertvector(whole, Floats)));
  }
}
