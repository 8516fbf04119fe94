#include "taps.h"

#include <vector>

#include "tap_codes.h"

namespace {

template <typename T>
E3VA_INLINE void run(const ExpandTapParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, lc = round_up(C + 1, kLanes);
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc);
  std::vector<float> x(lc);
  for (int64_t token = begin; token < end; ++token) {
    const uint8_t* tap = p.tap + token * stored;
    if (p.taps == Taps::kInt4)
      for (int64_t c = 0; c < stored; ++c) {
        codes[2 * c] = tap[c] & 15;
        codes[2 * c + 1] = tap[c] >> 4;
      }
    else
      std::memcpy(codes.data(), tap, C);
    const float scale = p.scale[token];
    for (int64_t c = 0; c < C; c += kLanes) {
      const Words code = load_bytes(&codes[c]);
      Floats value;
      if (p.taps == Taps::kFp8)
        value = from_fp8(code);
      else if (p.taps == Taps::kInt8)
        value = __builtin_convertvector((Ints)(code << 24) >> 24, Floats);
      else
        value = __builtin_convertvector((Ints)code, Floats) - 8.0f;
      store(&x[c], value * scale);
    }
    narrow(x.data(), C, static_cast<T*>(p.x) + token * C);
  }
}

}  // namespace

E3VA_KERNEL(expand_tap_cpu, run, ExpandTapParams)
