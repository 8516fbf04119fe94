// Runs every CPU kernel over odd shapes on buffers of exactly the right size, to be compiled with
// address and undefined-behaviour sanitizers. Prints a checksum; a sanitizer ends it otherwise.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/highway_backward.h"
#include "../../csrc/cpu/sublayer_epilogue.h"
#include "../../csrc/cpu/window_attention.h"

namespace {

uint32_t state = 1;
double checksum = 0;

float random_float() {
  state = state * 1664525 + 1013904223;
  return float(int32_t(state)) / 2147483648.0f;
}

// A buffer of `n` values of a storage type, as bytes: the last ends where the heap block ends.
std::vector<char> values(int64_t n, Dtype dtype) {
  std::vector<char> bytes(n * (dtype == Dtype::kFloat ? 4 : 2));
  for (int64_t i = 0; i < n; ++i) {
    const float value = random_float();
    if (dtype == Dtype::kFloat)
      reinterpret_cast<float*>(bytes.data())[i] = value;
    else  // any 16 bits of a moderate exponent
      reinterpret_cast<uint16_t*>(bytes.data())[i] =
          uint16_t((state >> 16 & 0x83ff) | (dtype == Dtype::kHalf ? 0x3800 : 0x3f00));
  }
  return bytes;
}

std::vector<float> weights(int64_t n) {
  std::vector<float> w(n);
  for (float& value : w) value = random_float() * 0.3f;
  return w;
}

void add(const std::vector<char>& bytes) {
  for (char byte : bytes) checksum += byte;
}

void window_attention(Dtype dtype, int64_t height, int64_t width, int64_t heads, int64_t d,
                      int64_t window, int64_t shift) {
  const int64_t C = heads * d;
  const auto qkv = values(height * width * 3 * C, dtype);
  const auto bias = weights(3 * C), table = weights((2 * window - 1) * (2 * window - 1) * heads);
  auto out = values(height * width * C, dtype);
  const WindowAttentionParams p{qkv.data(), bias.data(), table.data(), out.data(), dtype, 1,
                                height,     width,       heads,        d,          window, shift};
  window_attention_cpu(p, 0, window_attention_items(p));
  add(out);
}

void highway(Dtype dtype, int64_t tokens, int64_t C, int64_t rank, int64_t hidden, Taps taps) {
  const auto x = values(tokens * C, dtype), y = values(tokens * C, dtype);
  const auto norm_weight = weights(C), norm_bias = weights(C), P = weights(C * rank);
  const auto Q = weights(rank * hidden), b = weights(hidden), U = weights(hidden * rank);
  auto y_out = x, z = x, t = values(tokens * rank, dtype), s = t;
  std::vector<uint8_t> tap(tokens * (taps == Taps::kInt4 ? (C + 1) / 2 : C));
  std::vector<float> scale(tokens);
  const SublayerEpilogueParams p{
      x.data(),     y.data(), norm_weight.data(), norm_bias.data(), P.data(), Q.data(), b.data(),
      U.data(),     y_out.data(), z.data(),       t.data(),         s.data(), tap.data(),
      scale.data(), dtype,    taps,               7,                tokens,   C,        rank,
      hidden,       1e-5f};
  sublayer_epilogue_cpu(p, 0, sublayer_epilogue_items(p));
  for (const auto& result : {y_out, z, t, s}) add(result);
  const int64_t stride = 2 * rank;  // this adapter's are the last columns of two
  auto dS = values(tokens * stride, dtype), S = dS;
  const int64_t offset = rank * (dtype == Dtype::kFloat ? 4 : 2);
  const void* kept = taps == Taps::kFull ? static_cast<const void*>(x.data()) : tap.data();
  AdapterBackwardParams q{kept,     scale.data(), t.data(), dS.data() + offset, Q.data(), b.data(),
                          U.data(), S.data() + offset, nullptr, dtype, taps, tokens, C, rank,
                          hidden,   stride};
  const int64_t size = (C + 2 * hidden) * rank + hidden;
  std::vector<float> partial(adapter_backward_chunks(q) * size), sums(size);
  q.partial_sums = partial.data();
  adapter_backward_cpu(q, 0, adapter_backward_chunks(q));
  adapter_backward_sum(q, sums.data());
  add(S);
  for (float value : sums) checksum += value;
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16}) {
    window_attention(dtype, 1, 1, 1, 1, 1, 0);
    window_attention(dtype, 5, 4, 2, 32, 7, 3);
    window_attention(dtype, 13, 8, 3, 17, 7, 3);
    window_attention(dtype, 13, 12, 1, 32, 12, 6);
    for (Taps taps : {Taps::kFull, Taps::kFp8, Taps::kInt8, Taps::kInt4}) {
      highway(dtype, 1, 1, 1, 1, taps);
      highway(dtype, 11, 24, 5, 12, taps);
      highway(dtype, 61, 37, 16, 33, taps);
      highway(dtype, 1031, 96, 20, 48, taps);
      highway(dtype, 65, 64, 16, 32, taps);
    }
  }
  std::printf("%.6e\n", checksum);
  return std::isfinite(checksum) ? 0 : 1;
}
