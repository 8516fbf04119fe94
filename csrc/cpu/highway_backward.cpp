// The highway's backward for one tap: z and a = GELU(z) are computed again from t, a block of rows
// at a time, and never leave the cache. What all taps share (dS = G·Vᵀ, dV = Sᵀ·G) are plain GEMMs,
// left to the vendor's library.
#include "highway_backward.h"

#include <vector>

#include "tap_codes.h"
#include "vector.h"

namespace {

constexpr int kTile = 12;  // rows of a GEMM tile
constexpr int kBlock = 2 * kTile;
constexpr int64_t kChunk = 1024;  // rows; 64 bits of a partial sum are worth more than its memory

int64_t gradient_size(const AdapterBackwardParams& p) {
  return (p.channels + 2 * p.hidden) * p.rank + p.hidden;
}

template <typename T>
E3VA_INLINE void run(const AdapterBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, M = p.hidden;
  const int64_t lc = round_up(C + 1, kLanes), channel_tiles = round_up(C, kTile);
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  const int64_t lr = round_up(R, kLanes), lm = round_up(M, kLanes);
  const int64_t rank_tiles = round_up(R, kTile), hidden_tiles = round_up(M, kTile);
  // The weights as they are and transposed, their columns padded to whole vectors.
  std::vector<float> Q(R * lm), Qt(M * lr), U(M * lr), Ut(R * lm), b(lm);
  for (int64_t r = 0; r < R; ++r) {
    widen(p.Q + r * M, M, &Q[r * lm]);
    for (int64_t j = 0; j < M; ++j) {
      Qt[j * lr + r] = p.Q[r * M + j];
      U[j * lr + r] = Ut[r * lm + j] = p.U[j * R + r];
    }
  }
  widen(p.b, M, b.data());
  // Tiles of the sums run over the edges: hence their padding, and that of what they read.
  std::vector<float> t(kBlock * lr + kTile), dS(kBlock * lr), a(kBlock * lm + kTile);
  std::vector<float> dz(kBlock * lm);
  std::vector<float> s(kBlock * lr), dt(kBlock * lr), x(kBlock * lc + 2 * kLanes);
  std::vector<uint8_t> codes(lc);
  std::vector<float> dP(channel_tiles * lr), dQ(rank_tiles * lm), db(lm), dU(hidden_tiles * lr);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::fill(dP.begin(), dP.end(), 0.0f);
    std::fill(dQ.begin(), dQ.end(), 0.0f);
    std::fill(db.begin(), db.end(), 0.0f);
    std::fill(dU.begin(), dU.end(), 0.0f);
    const int64_t last = std::min(p.tokens, (chunk + 1) * kChunk);
    for (int64_t first = chunk * kChunk; first < last; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, last - first), padded = round_up(rows, kTile);
      for (int64_t i = 0; i < rows; ++i) {
        widen(static_cast<const T*>(p.t) + (first + i) * R, R, &t[i * lr]);
        widen(static_cast<const T*>(p.dS) + (first + i) * p.stride, R, &dS[i * lr]);
        const int64_t token = first + i;
        if (p.taps == Taps::kFull)
          widen(static_cast<const T*>(p.x) + token * C, C, &x[i * lc]);
        else
          expand(static_cast<const uint8_t*>(p.x) + token * stored, p.scale[token], C, p.taps,
                 codes.data(), &x[i * lc]);
      }
      for (int64_t i = rows; i < padded; ++i)  // adds nothing to the sums
        for (int64_t r = 0; r < lr; ++r) t[i * lr + r] = dS[i * lr + r] = 0.0f;
      gemm<kTile, 1>(t.data(), lr, 1, Q.data(), lm, a.data(), lm, padded, lm, R, false);
      gemm<kTile, 1>(dS.data(), lr, 1, Ut.data(), lm, dz.data(), lm, padded, lm, R, false);
      for (int64_t j = 0; j < lm; j += kLanes) {
        Floats column = load(&db[j]);
        for (int64_t i = 0; i < padded; ++i) {
          Floats value, slope;
          gelu(load(&a[i * lm + j]) + load(&b[j]), value, slope);
          const Floats gradient = load(&dz[i * lm + j]) * slope;
          store(&a[i * lm + j], value);
          store(&dz[i * lm + j], gradient);
          column += gradient;
        }
        store(&db[j], column);
      }
      gemm<kTile, 1>(a.data(), lm, 1, U.data(), lr, s.data(), lr, padded, lr, M, false);
      gemm<kTile, 1>(dz.data(), lm, 1, Qt.data(), lr, dt.data(), lr, padded, lr, M, false);
      gemm<kTile, 1>(
          a.data(), 1, lm, dS.data(), lr, dU.data(), lr, hidden_tiles, lr, rows, true);
      gemm<kTile, 1>(t.data(), 1, lr, dz.data(), lm, dQ.data(), lm, rank_tiles, lm, rows, true);
      gemm<kTile, 1>(
          x.data(), 1, lc, dt.data(), lr, dP.data(), lr, channel_tiles, lr, rows, true);
      for (int64_t i = 0; i < rows; ++i)
        narrow(&s[i * lr], R, static_cast<T*>(p.S) + (first + i) * p.stride);
    }
    float* sums = p.partial_sums + chunk * gradient_size(p);
    for (int64_t c = 0; c < C; ++c, sums += R) narrow(&dP[c * lr], R, sums);
    for (int64_t r = 0; r < R; ++r, sums += M) narrow(&dQ[r * lm], M, sums);
    for (int64_t j = 0; j < M; ++j, sums += R) narrow(&dU[j * lr], R, sums);
    narrow(db.data(), M, sums);
  }
}

}  // namespace

int64_t adapter_backward_chunks(const AdapterBackwardParams& p) {
  return (p.tokens + kChunk - 1) / kChunk;
}

E3VA_KERNEL(adapter_backward_cpu, run, AdapterBackwardParams)

void adapter_backward_sum(const AdapterBackwardParams& p, float* sums) {
  const int64_t size = gradient_size(p);
  std::fill(sums, sums + size, 0.0f);
  for (int64_t chunk = 0; chunk < adapter_backward_chunks(p); ++chunk)
    for (int64_t i = 0; i < size; ++i) sums[i] += p.partial_sums[chunk * size + i];
}
