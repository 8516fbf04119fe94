// Residual add, LayerNorm and an adapter's low-rank half on the CPU: a block of rows at a time, so
// that what the steps hand on, the hidden width included, never leaves the cache.
#include "sublayer_epilogue.h"

#include <vector>

#include "tap_codes.h"
#include "vector.h"

namespace {

constexpr int kTile = 12;      // rows of a GEMM tile
constexpr int kBlock = 4 * kTile;

// y' = y + x as stored, and its norm; x, widened, is kept for the projection.
template <typename T>
E3VA_INLINE void add_and_normalise(
    const SublayerEpilogueParams& p, int64_t at, float* __restrict__ x_row,
    float* __restrict__ y_row) {
  const int64_t C = p.channels, whole = C / kLanes * kLanes;
  const T* x = static_cast<const T*>(p.x) + at;
  const T* y = static_cast<const T*>(p.y) + at;
  T* y_out = static_cast<T*>(p.y_out) + at;
  Floats total = {};
  for (int64_t c = 0; c < C; c += kLanes) {
    const bool full = c < whole;
    const Floats tap = full ? load(x + c) : load_some(x + c, C - c);
    const Floats sum = tap + (full ? load(y + c) : load_some(y + c, C - c));
    store(x_row + c, tap);
    T stored[kLanes];
    store(stored, sum);
    const Floats rounded = load(stored);
    if (full)
      store(y_out + c, sum);
    else
      store_some(y_out + c, sum, C - c);
    store(y_row + c, rounded);
    total += rounded;
  }
  if (p.norm_weight == nullptr) return;
  const float mean = sum(total) / float(C);
  Floats squares = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats off = load(y_row + c) - mean;
    squares += off * off;
  }
  float variance = sum(squares);
  for (int64_t c = whole; c < C; ++c) variance += (y_row[c] - mean) * (y_row[c] - mean);
  const float scale = 1.0f / std::sqrt(variance / float(C) + p.eps);
  T* z = static_cast<T*>(p.z) + at;
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats normal = (load(y_row + c) - mean) * scale;
    store(z + c, normal * load(p.norm_weight + c) + load(p.norm_bias + c));
  }
  if (whole < C) {
    const int64_t n = C - whole;
    const Floats weight = load_some(p.norm_weight + whole, n);
    const Floats bias = load_some(p.norm_bias + whole, n);
    store_some(z + whole, (load(y_row + whole) - mean) * scale * weight + bias, n);
  }
}

template <typename T>
E3VA_INLINE void run(const SublayerEpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, lc = round_up(C, kLanes);
  const int64_t lr = round_up(p.rank, kLanes), lm = round_up(p.hidden, kLanes);
  // The weights with their columns padded to whole vectors; empty without an adapter.
  std::vector<float> P(p.P ? C * lr : 0), Q(p.rank * lm), b(lm), U(p.hidden * lr);
  if (p.P) {
    for (int64_t c = 0; c < C; ++c) widen(p.P + c * p.rank, p.rank, &P[c * lr]);
    for (int64_t r = 0; r < p.rank; ++r) widen(p.Q + r * p.hidden, p.hidden, &Q[r * lm]);
    for (int64_t j = 0; j < p.hidden; ++j) widen(p.U + j * p.rank, p.rank, &U[j * lr]);
    widen(p.b, p.hidden, b.data());
  }
  std::vector<float> x(kBlock * lc + kLanes), y_row(lc), t(kBlock * lr), a(kBlock * lm), s(kBlock * lr);
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc + kLanes);
  T* t_out = static_cast<T*>(p.t);
  T* s_out = static_cast<T*>(p.s);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    const int64_t padded = round_up(rows, kTile);
    for (int64_t i = 0; i < rows; ++i)
      add_and_normalise<T>(p, (first + i) * C, &x[i * lc], y_row.data());
    if (p.P == nullptr) continue;
    if (p.taps != Taps::kFull)
      for (int64_t i = 0; i < rows; ++i)
        compress(&x[i * lc], first + i, C, p.taps, p.seed, codes.data(),
                 p.tap + (first + i) * stored, p.tap_scale + first + i);
    gemm<kTile, 1>(x.data(), lc, 1, P.data(), lr, t.data(), lr, padded, lr, C, false);
    for (int64_t i = 0; i < rows; ++i) {
      T* stored = t_out + (first + i) * p.rank;
      narrow(&t[i * lr], p.rank, stored);
      widen(stored, p.rank, &t[i * lr]);  // the backward, too, knows t as stored
    }
    gemm<kTile, 1>(t.data(), lr, 1, Q.data(), lm, a.data(), lm, padded, lm, p.rank, false);
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t j = 0; j < lm; j += kLanes) {
        Floats value, slope;
        gelu(load(&a[i * lm + j]) + load(&b[j]), value, slope);
        store(&a[i * lm + j], value);
      }
    gemm<kTile, 1>(a.data(), lm, 1, U.data(), lr, s.data(), lr, padded, lr, p.hidden, false);
    for (int64_t i = 0; i < rows; ++i) narrow(&s[i * lr], p.rank, s_out + (first + i) * p.rank);
  }
}

}  // namespace

int64_t sublayer_epilogue_items(const SublayerEpilogueParams& p) {
  return (p.tokens + kBlock - 1) / kBlock;
}

E3VA_KERNEL(sublayer_epilogue_cpu, run, SublayerEpilogueParams)
