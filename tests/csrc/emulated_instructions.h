// What csrc/cpu/instructions.h has, in C++ for any processor, as Intel's manual defines it.

// Arithmetic with bfloat16 takes subnormal numbers for zero.
E3VA_INLINE Words without_subnormals(Words bits) {
  return (bits & 0x7f800000) != 0 ? bits : bits & 0x80000000;
}

E3VA_INLINE Halves to_bfloat16(Floats x) {
  const Words bits = without_subnormals((Words)x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = bits >> 16 | 0x40;
  return __builtin_convertvector((Words)(x != x) ? quiet : rounded, Halves);
}

E3VA_INLINE Words widened(Halves x) { return __builtin_convertvector(x, Words); }

E3VA_INLINE Words widened(Bytes x) { return __builtin_convertvector(x, Words); }

// x where one of them is NaN, as the instruction's last operand.
E3VA_INLINE Floats larger(Floats x, Floats least) { return select(least > x, least, x); }

E3VA_INLINE Floats smaller(Floats x, Floats most) { return select(most < x, most, x); }

E3VA_INLINE Floats whole(Floats x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::nearbyint(x[i]);
  return x;
}

E3VA_INLINE Floats times_power_of_two(Floats x, Floats power) {
  for (int i = 0; i < kLanes; ++i) x[i] *= std::exp2(std::floor(power[i]));
  return x;
}

E3VA_INLINE Words permuted(Words first, Words second, Words places) {
  uint32_t both[2 * kLanes];
  std::memcpy(both, &first, sizeof first);
  std::memcpy(both + kLanes, &second, sizeof second);
  Words y = {};
  for (int i = 0; i < kLanes; ++i) y[i] = both[places[i] & (2 * kLanes - 1)];
  return y;
}

// The bfloat16s in half of each word.
E3VA_INLINE Floats low_half(Words x) { return (Floats)without_subnormals(x << 16); }

E3VA_INLINE Floats high_half(Words x) { return (Floats)without_subnormals(x & 0xffff0000); }

E3VA_INLINE void dot(Floats& total, Words a, Words b) {
  total += high_half(a) * high_half(b);
  total += low_half(a) * low_half(b);
}

E3VA_INLINE Words signed_nibbles(Words codes) {
  const Floats low = __builtin_convertvector((Ints)(codes & 15) - 8, Floats);
  const Floats high = __builtin_convertvector((Ints)(codes >> 16 & 15) - 8, Floats);
  return (Words)low >> 16 | ((Words)high & 0xffff0000);
}

struct Tile {
  Words rows[16];
};

thread_local Tile tile_registers[8];
thread_local bool tiles_have_shapes = false;

// The processor, too, stops a program that uses tiles without a shape.
template <int kTile>
E3VA_INLINE Tile& tile_register() {
  static_assert(0 <= kTile && kTile < 8);
  if (!tiles_have_shapes) __builtin_trap();
  return tile_registers[kTile];
}

template <int kTile>
E3VA_INLINE void tile_load(const void* from, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i)
    std::memcpy(&tile_register<kTile>().rows[i], static_cast<const char*>(from) + i * stride, 64);
}

template <int kTile>
E3VA_INLINE void tile_store(void* to, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, &tile_register<kTile>().rows[i], 64);
}

template <int kTile>
E3VA_INLINE void tile_zero() {
  tile_register<kTile>() = {};
}

template <int kC, int kA, int kB>
E3VA_INLINE void tile_dot() {
  static_assert(kC != kA && kA != kB && kB != kC);
  const Tile &a = tile_register<kA>(), &b = tile_register<kB>();
  for (int i = 0; i < 16; ++i) {
    Floats even = {}, odd = {};  // summed apart, and then added
    for (int q = 0; q < 16; ++q) {
      const Words two = Words{} + a.rows[i][q];
      even += low_half(two) * low_half(b.rows[q]);
      odd += high_half(two) * high_half(b.rows[q]);
    }
    Words& c = tile_register<kC>().rows[i];
    c = (Words)((Floats)c + (even + odd));
  }
}

struct TileShapes {
  E3VA_INLINE TileShapes() {
    std::fill_n(tile_registers, 8, Tile{});
    tiles_have_shapes = true;
  }
  E3VA_INLINE ~TileShapes() { tiles_have_shapes = false; }
};
