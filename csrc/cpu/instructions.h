// The instructions for bfloat16 that no compiler chooses by itself, each as a function.

E3VA_INLINE Halves to_bfloat16(Floats x) {
  Halves y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
}

// In one instruction: GCC makes four of a conversion.
E3VA_INLINE Words widened(Halves x) {
  Words y;
  asm("vpmovzxwd %1, %0" : "=v"(y) : "v"(x));
  return y;
}

E3VA_INLINE Words widened(Bytes x) {
  Words y;
  asm("vpmovzxbd %1, %0" : "=v"(y) : "v"(x));
  return y;
}

E3VA_INLINE Floats larger(Floats x, Floats least) {
  Floats y;
  asm("vmaxps %1, %2, %0" : "=v"(y) : "v"(x), "v"(least));
  return y;
}

E3VA_INLINE Floats smaller(Floats x, Floats most) {
  Floats y;
  asm("vminps %1, %2, %0" : "=v"(y) : "v"(x), "v"(most));
  return y;
}

// Rounded to the nearest whole number.
E3VA_INLINE Floats whole(Floats x) {
  Floats y;
  asm("vrndscaleps $0, %1, %0" : "=v"(y) : "v"(x));
  return y;
}

E3VA_INLINE Floats times_power_of_two(Floats x, Floats power) {
  Floats y;
  asm("vscalefps %1, %2, %0" : "=v"(y) : "v"(power), "v"(x));
  return y;
}

// Words of two vectors, by their places in both.
E3VA_INLINE Words permuted(Words first, Words second, Words places) {
  Words y;
  asm("vpermt2d %2, %1, %0" : "=v"(y) : "v"(places), "v"(second), "0"(first));
  return y;
}

// In each lane total + a·b of both halves.
E3VA_INLINE void dot(Floats& total, Words a, Words b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
}

// Of each half word the lowest four bits, less 8, as bfloat16.
E3VA_INLINE Words signed_nibbles(Words codes) {
  static constexpr uint16_t kTable[32] = {
      // once more, as the lowest five bits are looked up
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
      0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  Words values;
  asm("vpermw %2, %1, %0" : "=v"(values) : "v"(codes), "m"(kTable));
  return values;
}

template <int kTile>
E3VA_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
E3VA_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
E3VA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kC, int kA, int kB>
E3VA_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// While one lives the thread's tiles are 16 rows of 64 bytes.
struct TileShapes {
  E3VA_INLINE TileShapes() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  E3VA_INLINE ~TileShapes() { asm volatile("tilerelease"); }
};

