// The highway's backward for one tap: z and a = GELU(z) are computed again from t, a block of rows
// at a time, and never leave the cache. What all taps share (dS = G·Vᵀ, dV = Sᵀ·G) are plain GEMMs,
// left to the vendor's library.
#include "highway_backward.h"

#include <vector>

#include "tap_codes.h"
#include "tiles.h"
#include "vector.h"

namespace {

constexpr int kTile = 12;  // rows of a GEMM tile
constexpr int kSide = 8;   // and of a tile of a sum over rows
constexpr int kBlock = 2 * kTile;
constexpr int kTileBlock = 2 * kTileDepth;
constexpr int64_t kChunk = 5 * kTileBlock;  // rows; more would leave threads of a small map idle

int64_t gradient_size(const AdapterBackwardParams& p) {
  return (p.channels + 2 * p.hidden) * p.rank + p.hidden;
}

// A chunk's sums, without what pads their rows.
E3VA_INLINE void write_sums(
    const AdapterBackwardParams& p, const float* dP, int64_t lc, const float* dQ, const float* dU,
    int64_t lm, const float* db, float* sums) {
  for (int64_t r = 0; r < p.rank; ++r, sums += p.channels) narrow(dP + r * lc, p.channels, sums);
  for (int64_t r = 0; r < p.rank; ++r, sums += p.hidden) narrow(dQ + r * lm, p.hidden, sums);
  for (int64_t r = 0; r < p.rank; ++r, sums += p.hidden) narrow(dU + r * lm, p.hidden, sums);
  narrow(db, p.hidden, sums);
}

template <typename T>
E3VA_INLINE void run(const AdapterBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, M = p.hidden;
  const int64_t stored = p.taps == Taps::kInt4 ? (C + 1) / 2 : C;
  const int64_t lc = round_up(C, 2 * kLanes), lr = round_up(R, kLanes);
  const int64_t lm = round_up(M, 2 * kLanes), rank_tiles = round_up(R, kSide);
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
  std::vector<float> t(kBlock * lr + kSide), dS(kBlock * lr + kSide), dt(kBlock * lr + kSide);
  std::vector<float> a(kBlock * lm), dz(kBlock * lm), s(kBlock * lr);
  std::vector<float> x(kBlock * lc + 2 * kLanes);
  std::vector<uint8_t> codes(lc);
  std::vector<float> dP(rank_tiles * lc), dQ(rank_tiles * lm), db(lm), dU(rank_tiles * lm);

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
      gemm<kTile / 2, 2>(t.data(), lr, 1, Q.data(), lm, a.data(), lm, padded, lm, R, false);
      gemm<kTile / 2, 2>(dS.data(), lr, 1, Ut.data(), lm, dz.data(), lm, padded, lm, R, false);
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
      gemm<kSide, 2>(dS.data(), 1, lr, a.data(), lm, dU.data(), lm, rank_tiles, lm, rows, true);
      gemm<kSide, 2>(t.data(), 1, lr, dz.data(), lm, dQ.data(), lm, rank_tiles, lm, rows, true);
      gemm<kSide, 2>(dt.data(), 1, lr, x.data(), lc, dP.data(), lc, rank_tiles, lc, rows, true);
      for (int64_t i = 0; i < rows; ++i)
        narrow(&s[i * lr], R, static_cast<T*>(p.S) + (first + i) * p.stride);
    }
    float* sums = p.partial_sums + chunk * gradient_size(p);
    write_sums(p, dP.data(), lc, dQ.data(), dU.data(), lm, db.data(), sums);
  }
}

// to [n, kTileBlock] = the transpose of the first n columns of from, whose rows are ld apart.
E3VA_INLINE void transpose(
    const BFloat16* __restrict__ from, int64_t ld, int64_t n, BFloat16* __restrict__ to) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < kTileBlock; ++i) to[j * kTileBlock + i] = from[i * ld + j];
}

// Taps of two tokens as pairs of bfloat16, panels `pairs` vectors apart; those of kInt4 without
// their scale, as whole numbers. x has room for two taps as `expand` wants it.
E3VA_INLINE void pair_taps(
    const AdapterBackwardParams& p, int64_t token, int64_t next, int64_t pairs, uint8_t* codes,
    float* x, uint32_t* to) {
  const int64_t C = p.channels, bytes = (C + 1) / 2;
  if (p.taps == Taps::kFull) {
    const BFloat16* low = static_cast<const BFloat16*>(p.x) + token * C;
    const BFloat16* high = static_cast<const BFloat16*>(p.x) + next * C;
    int64_t c = 0;
    for (; c + kTileSide <= C; c += kTileSide)
      words(to + c * pairs) = pair(halves(low + c), halves(high + c));
    for (; c < C; ++c)
      to[c / kTileSide * kTileSide * pairs + c % kTileSide] = low[c].bits | high[c].bits << 16;
    return;
  }
  const uint8_t* taps = static_cast<const uint8_t*>(p.x);
  const int64_t stored = p.taps == Taps::kInt4 ? bytes : C;
  if (p.taps == Taps::kInt4 && C % (2 * kTileSide) == 0) {
    for (int64_t c = 0; c < bytes; c += kTileSide) {
      const Words both = widened(bytes_at(taps + token * stored + c)) |
                         widened(bytes_at(taps + next * stored + c)) << 16;
      words(to + c * pairs) = signed_nibbles(both);
      words(to + (bytes + c) * pairs) = signed_nibbles(both >> 4);
    }
    return;
  }
  const int64_t room = round_up(C, kLanes) + 2 * kLanes;
  const bool scaled = p.taps != Taps::kInt4;
  expand(taps + token * stored, scaled ? p.scale[token] : 1.0f, C, p.taps, codes, x);
  expand(taps + next * stored, scaled ? p.scale[next] : 1.0f, C, p.taps, codes, x + room);
  for (int64_t c = 0; c < C; c += kTileSide)
    words(to + c * pairs) = pair(to_bfloat16(load(x + c)), to_bfloat16(load(x + room + c)));
}

// The same for bfloat16, its products in tiles: sums over rows take the narrow factor transposed,
// the wide one in pairs of rows.
E3VA_INLINE void run_in_tiles(const AdapterBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, M = p.hidden;
  const int64_t kr = round_up(R, kTileDepth), km = round_up(M, kTileDepth);
  const int64_t lr = round_up(R, kTileSide), lc = round_up(C, 2 * kTileSide);
  const int64_t pairs = kTileBlock / 2;
  std::vector<float> b(km), Qt(M * R), Ut(R * M);
  widen(p.b, M, b.data());
  for (int64_t r = 0; r < R; ++r)
    for (int64_t j = 0; j < M; ++j) {
      Qt[j * R + r] = p.Q[r * M + j];
      Ut[r * M + j] = p.U[j * R + r];
    }
  const Panels Q = pack(p.Q, R, M), U = pack(p.U, M, R);
  const Panels Q_transposed = pack(Qt.data(), M, R), U_transposed = pack(Ut.data(), R, M);
  // Rows of t and dS are kr wide, and zero from R on.
  std::vector<BFloat16> t(kTileBlock * kr), dS(kTileBlock * kr), dt(kTileBlock * lr);
  std::vector<BFloat16> tt(lr * kTileBlock), dSt(lr * kTileBlock), dtt(lr * kTileBlock);
  std::vector<BFloat16> a(kTileBlock * km), dz(kTileBlock * km);
  Panels a_pairs(pairs * km), dz_pairs(pairs * km), x_pairs(pairs * lc);
  std::vector<float> z(kTileBlock * km), da(kTileBlock * km), low_rank(kTileBlock * lr);
  std::vector<float> x(2 * (round_up(C, kLanes) + 2 * kLanes));
  std::vector<uint8_t> codes(lc);
  std::vector<float> dP(lr * lc), dQ(lr * km), db(km), dU(lr * km);
  const BFloat16* t_in = static_cast<const BFloat16*>(p.t);
  const BFloat16* dS_in = static_cast<const BFloat16*>(p.dS);
  NativeBFloat16* S = static_cast<NativeBFloat16*>(p.S);
  const TileShapes shapes;

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::fill(dP.begin(), dP.end(), 0.0f);
    std::fill(dQ.begin(), dQ.end(), 0.0f);
    std::fill(db.begin(), db.end(), 0.0f);
    std::fill(dU.begin(), dU.end(), 0.0f);
    const int64_t last = std::min(p.tokens, (chunk + 1) * kChunk);
    for (int64_t first = chunk * kChunk; first < last; first += kTileBlock) {
      const int64_t rows = std::min<int64_t>(kTileBlock, last - first);
      for (int64_t i = 0; i < kTileBlock; ++i) {
        const bool inside = i < rows;  // the others add nothing to the sums
        prefetch(dS_in, (first + kTileBlock + i) * p.stride);
        prefetch<true>(S, (first + i) * p.stride);
        for (int64_t r = 0; r < R; ++r) {
          t[i * kr + r] = inside ? t_in[(first + i) * R + r] : BFloat16{};
          dS[i * kr + r] = inside ? dS_in[(first + i) * p.stride + r] : BFloat16{};
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t token = first + 2 * i, next = std::min(token + 1, last - 1);
        if (token < last)
          pair_taps(p, token, next, pairs, codes.data(), x.data(), &x_pairs[i * kTileSide]);
      }
      gemm_tiles<2, 2>(t.data(), kr, Q.data(), z.data(), km, kTileBlock, km, kr, false);
      gemm_tiles<2, 2>(
          dS.data(), kr, U_transposed.data(), da.data(), km, kTileBlock, km, kr, false);
      for (int64_t j = 0; j < km; j += kLanes) {
        const Floats bias = load(&b[j]);
        Floats column = load(&db[j]);
        for (int64_t i = 0; i < pairs; ++i) {
          Halves value[2], gradient[2];
          for (int64_t half = 0; half < 2; ++half) {
            const int64_t at = (2 * i + half) * km + j;
            Floats activation, slope;
            gelu_bfloat16(load(&z[at]) + bias, activation, slope);
            slope *= load(&da[at]);
            column += slope;
            halves(&a[at]) = value[half] = to_bfloat16(activation);
            halves(&dz[at]) = gradient[half] = to_bfloat16(slope);
          }
          words(&a_pairs[j * pairs + i * kTileSide]) = pair(value[0], value[1]);
          words(&dz_pairs[j * pairs + i * kTileSide]) = pair(gradient[0], gradient[1]);
        }
        store(&db[j], column);
      }
      gemm_tiles<4, 1>(a.data(), km, U.data(), low_rank.data(), lr, kTileBlock, lr, km, false);
      for (int64_t i = 0; i < rows; ++i)
        narrow(&low_rank[i * lr], R, S + (first + i) * p.stride);
      gemm_tiles<4, 1>(
          dz.data(), km, Q_transposed.data(), low_rank.data(), lr, kTileBlock, lr, km, false);
      for (int64_t i = 0; i < rows; ++i) {
        const float scale = p.taps == Taps::kInt4 ? p.scale[first + i] : 1.0f;
        for (int64_t r = 0; r < lr; r += kLanes)
          halves(&dt[i * lr + r]) = to_bfloat16(load(&low_rank[i * lr + r]) * scale);
      }
      for (int64_t i = rows * lr; i < kTileBlock * lr; ++i) dt[i] = BFloat16{};
      transpose(t.data(), kr, lr, tt.data());
      transpose(dS.data(), kr, lr, dSt.data());
      transpose(dt.data(), lr, lr, dtt.data());
      const int64_t k = kTileBlock;
      gemm_tiles<1, 2>(dSt.data(), k, a_pairs.data(), dU.data(), km, lr, km, k, true);
      gemm_tiles<1, 2>(tt.data(), k, dz_pairs.data(), dQ.data(), km, lr, km, k, true);
      gemm_tiles<1, 2>(dtt.data(), k, x_pairs.data(), dP.data(), lc, lr, lc, k, true);
    }
    float* sums = p.partial_sums + chunk * gradient_size(p);
    write_sums(p, dP.data(), lc, dQ.data(), dU.data(), km, db.data(), sums);
  }
}

}  // namespace

int64_t adapter_backward_chunks(const AdapterBackwardParams& p) {
  return (p.tokens + kChunk - 1) / kChunk;
}

E3VA_TILED_KERNEL(adapter_backward_cpu, run, run_in_tiles, AdapterBackwardParams)

void adapter_backward_sum(const AdapterBackwardParams& p, float* sums) {
  const int64_t size = gradient_size(p);
  std::fill(sums, sums + size, 0.0f);
  for (int64_t chunk = 0; chunk < adapter_backward_chunks(p); ++chunk)
    for (int64_t i = 0; i < size; ++i) sums[i] += p.partial_sums[chunk * size + i];
}
