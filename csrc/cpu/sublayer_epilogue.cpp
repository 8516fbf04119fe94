// Residual add, LayerNorm and an adapter's low-rank half on the CPU: a block of rows at a time, so
// that what the steps hand on, the hidden width included, never leaves the cache.
#include "sublayer_epilogue.h"

#include <vector>

#include "tap_codes.h"
#include "tiles.h"
#include "vector.h"

namespace {

constexpr int kTile = 12;      // rows of a GEMM tile
constexpr int kBlock = 4 * kTile;  // three tiles of bfloat16

// y' = y + x as stored, and its norm.
template <typename T>
E3VA_INLINE void add_and_normalise(
    const SublayerEpilogueParams& p, int64_t at, float* __restrict__ y_row) {
  const int64_t C = p.channels, whole = C / kLanes * kLanes;
  const T* x = static_cast<const T*>(p.x) + at;
  const T* y = static_cast<const T*>(p.y) + at;
  T* y_out = static_cast<T*>(p.y_out) + at;
  Floats total = {};
  for (int64_t c = 0; c < C; c += kLanes) {
    const bool full = c < whole;
    // Two rows on: with so much to do in between the processor does not foresee them in time.
    prefetch(x + c, 2 * C);
    prefetch(y + c, 2 * C);
    prefetch<true>(y_out + c, 2 * C);
    prefetch<true>(static_cast<T*>(p.z), at + c + 2 * C);
    const Floats sum = full ? load(x + c) + load(y + c)
                            : load_some(x + c, C - c) + load_some(y + c, C - c);
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
  const int64_t lr = round_up(p.rank, kLanes), lm = round_up(p.hidden, 2 * kLanes);
  // The weights with their columns padded to whole vectors; empty without an adapter.
  std::vector<float> P(p.P ? C * lr : 0), Q(p.rank * lm), b(lm), U(p.hidden * lr);
  if (p.P) {
    for (int64_t c = 0; c < C; ++c) widen(p.P + c * p.rank, p.rank, &P[c * lr]);
    for (int64_t r = 0; r < p.rank; ++r) widen(p.Q + r * p.hidden, p.hidden, &Q[r * lm]);
    for (int64_t j = 0; j < p.hidden; ++j) widen(p.U + j * p.rank, p.rank, &U[j * lr]);
    widen(p.b, p.hidden, b.data());
  }
  std::vector<float> x(kBlock * lc + kLanes), y_row(lc);
  std::vector<float> t(kBlock * lr), a(kBlock * lm), s(kBlock * lr);
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc + kLanes);
  T* t_out = static_cast<T*>(p.t);
  T* s_out = static_cast<T*>(p.s);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    const int64_t padded = round_up(rows, kTile);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first + i;
      add_and_normalise<T>(p, token * C, y_row.data());
      if (p.P == nullptr) continue;
      widen(static_cast<const T*>(p.x) + token * C, C, &x[i * lc]);
      if (p.taps != Taps::kFull)
        compress(&x[i * lc], token, C, p.taps, p.seed, codes.data(), p.tap + token * stored,
                 p.tap_scale + token);
    }
    if (p.P == nullptr) continue;
    gemm<kTile, 1>(x.data(), lc, 1, P.data(), lr, t.data(), lr, padded, lr, C, false);
    for (int64_t i = 0; i < rows; ++i) {
      T* stored = t_out + (first + i) * p.rank;
      narrow(&t[i * lr], p.rank, stored);
      widen(stored, p.rank, &t[i * lr]);  // the backward, too, knows t as stored
    }
    gemm<kTile / 2, 2>(t.data(), lr, 1, Q.data(), lm, a.data(), lm, padded, lm, p.rank, false);
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

// The same for bfloat16, its products in tiles.
E3VA_INLINE void run_in_tiles(const SublayerEpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, M = p.hidden;
  const int64_t kc = round_up(C, kTileDepth), kr = round_up(R, kTileDepth);
  const int64_t lr = round_up(R, kTileSide), km = round_up(M, kTileDepth);
  const int64_t lc = kc + kTileDepth;  // rows a power of two apart would share few cache lines
  Panels P, Q, U;
  std::vector<float> b(km);
  if (p.P) {
    P = pack(p.P, C, R);
    Q = pack(p.Q, R, M);
    U = pack(p.U, M, R);
    widen(p.b, M, b.data());
  }
  std::vector<NativeBFloat16> x(kBlock * lc + kLanes);
  std::vector<BFloat16> t(kBlock * kr), a(kBlock * km);
  std::vector<float> y_row(round_up(C, kLanes)), low_rank(kBlock * lr), z(kBlock * km);
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc);
  BFloat16* t_out = static_cast<BFloat16*>(p.t);
  NativeBFloat16* s_out = static_cast<NativeBFloat16*>(p.s);
  const TileShapes shapes;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first + i;
      add_and_normalise<NativeBFloat16>(p, token * C, y_row.data());
      if (p.P == nullptr) continue;
      std::copy_n(static_cast<const NativeBFloat16*>(p.x) + token * C, C, &x[i * lc]);
      if (p.taps != Taps::kFull)
        compress(&x[i * lc], token, C, p.taps, p.seed, codes.data(), p.tap + token * stored,
                 p.tap_scale + token);
    }
    if (p.P == nullptr) continue;
    gemm_tiles<3, 1>(x.data(), lc, P.data(), low_rank.data(), lr, kBlock, lr, kc, false);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t r = 0; r < lr; r += kLanes)
        halves(&t[i * kr + r]) = to_bfloat16(load(&low_rank[i * lr + r]));
    for (int64_t i = 0; i < rows; ++i) std::copy_n(&t[i * kr], R, t_out + (first + i) * R);
    gemm_tiles<3, 2>(t.data(), kr, Q.data(), z.data(), km, kBlock, km, kr, false);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t j = 0; j < km; j += kLanes) {
        Floats value, slope;
        gelu_bfloat16(load(&z[i * km + j]) + load(&b[j]), value, slope);
        halves(&a[i * km + j]) = to_bfloat16(value);
      }
    gemm_tiles<3, 1>(a.data(), km, U.data(), low_rank.data(), lr, kBlock, lr, km, false);
    for (int64_t i = 0; i < rows; ++i) narrow(&low_rank[i * lr], R, s_out + (first + i) * R);
  }
}

}  // namespace

int64_t sublayer_epilogue_items(const SublayerEpilogueParams& p) {
  return (p.tokens + kBlock - 1) / kBlock;
}

E3VA_TILED_KERNEL(sublayer_epilogue_cpu, run, run_in_tiles, SublayerEpilogueParams)
