// The backward of a stage's adapters on the CPU, from the last one to the first. An adapter takes two
// passes over the map, as its gradient is mixed with its neighbours': the first computes z and
// a = GELU(z) again, a block of rows at a time that never leaves the cache; the second runs together
// with the first one of the adapter before.
#ifndef E3VA_SOURCE
#define E3VA_SOURCE "adapters_backward.cpp"
#include "adapters_backward.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int kTile = 12;                   // rows of a GEMM tile
constexpr int kBlock = 4 * kTile;           // rows
constexpr int kTileBlock = 64;              // rows of bfloat16 in tiles
constexpr int64_t kChunk = 5 * kTileBlock;  // rows; more would leave threads of a small map idle

// The sums of a chunk: dQ [rank, hidden], dUᵀ [rank, hidden], db [hidden] of this adapter, and
// dDᵀ [side², rank] of the one after it.
struct Sums {
  int64_t dU, db, dD, size;

  explicit Sums(const AdaptersBackwardParams& p)
      : dU(p.rank * p.hidden), db(2 * dU), dD(db + p.hidden),
        size(dD + (p.D ? p.side * p.side * p.rank : 0)) {}
};

}  // namespace

#include "instruction_sets.h"

int64_t adapters_backward_chunks(const AdaptersBackwardParams& p) {
  return (p.tokens + kChunk - 1) / kChunk;
}

int64_t adapters_backward_sums(const AdaptersBackwardParams& p) { return Sums(p).size; }

E3VA_DISPATCH(adapters_backward_cpu, AdaptersBackwardParams)

void adapters_backward_sum(const AdaptersBackwardParams& p) {
  const Sums at(p);
  const int64_t k = p.adapter, R = p.rank, M = p.hidden, squared = p.side * p.side;
  const bool own = k >= 0, next = k + 1 < p.adapters;
  std::vector<float> sums(at.size);
  const int64_t from = own ? 0 : at.dD, to = next ? at.size : at.dD;
  for (int64_t chunk = 0; chunk < adapters_backward_chunks(p); ++chunk)
    for (int64_t i = from; i < to; ++i) sums[i] += p.partial_sums[chunk * at.size + i];
  if (own) {
    std::copy_n(sums.data(), R * M, p.dQ + k * R * M);
    std::copy_n(&sums[at.db], M, p.db + k * M);
    for (int64_t j = 0; j < M; ++j)
      for (int64_t r = 0; r < R; ++r) p.dU[(k * M + j) * R + r] = sums[at.dU + r * M + j];
  }
  if (next && p.D)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t n = 0; n < squared; ++n)
        p.dD[((k + 1) * R + r) * squared + n] = sums[at.dD + n * R + r];
}

#else  // in an instruction set
#include "mixing.h"

E3VA_INLINE const float* adapter_D(const AdaptersBackwardParams& p, int64_t k) {
  return p.D ? p.D + k * p.rank * p.side * p.side : nullptr;
}

// The second pass over rows [first, last) of adapter k: what neighbours contribute to its gradient,
// and what goes on to the state. `D_sums` [side², lr] grow.
template <typename T>
E3VA_INLINE void gather(
    const AdaptersBackwardParams& p, int64_t k, const Neighbours& neighbours, const float* gamma,
    int64_t first, int64_t last, float* __restrict__ D_sums) {
  const int64_t R = p.rank, lr = neighbours.lr, mirrored = p.side * p.side - 1;
  const T* u = static_cast<const T*>(p.u) + k * p.tokens * R;
  T* dt = static_cast<T*>(p.dt) + k * p.tokens * R;
  const float* dmixed = p.dmixed[k % 2];
  std::vector<float> du(lr);
  for (int64_t token = first; token < last; ++token) {
    for (int64_t r = 0; r < lr; r += kLanes) {
      const Floats own = load(dmixed + token * lr + r);
      Floats total = own;
      neighbours.around(token, [&](int64_t n, int64_t other) __attribute__((always_inline)) {
        total += load(&neighbours.D[(mirrored - n) * lr + r]) * load(dmixed + other * lr + r);
        float* sums = D_sums + n * lr + r;
        store(sums, load(sums) + own * load_within(u + other * R, r, R));
      });
      store(&du[r], total);
      if (p.gamma == nullptr) continue;
      const int64_t at = token * lr + r;
      store(p.dstate + at, load(p.dstate + at) + total * load(gamma + r));
    }
    narrow(du.data(), R, dt + token * R);
    if (p.gamma && k == 0)
      narrow(p.dstate + token * lr, R, static_cast<T*>(p.dbefore) + token * R);
  }
}

// The second pass over a chunk of the adapter after this one, and its sums.
template <typename T>
E3VA_INLINE void gather_next(
    const AdaptersBackwardParams& p, int64_t first, int64_t last, float* __restrict__ sums) {
  const int64_t k = p.adapter + 1, R = p.rank, lr = round_up(R, kLanes);
  if (k == p.adapters) return;
  const Neighbours neighbours(p.height, p.width, p.side, R, adapter_D(p, k));
  std::vector<float> gamma(lr), D_sums(neighbours.D.size());
  if (p.gamma) widen(p.gamma + k * R, R, gamma.data());
  gather<T>(p, k, neighbours, gamma.data(), first, last, D_sums.data());
  const Sums at(p);
  for (int64_t n = 0; n < neighbours.side * neighbours.side; ++n)
    narrow(&D_sums[n * lr], R, sums + at.dD + n * R);
}

// ds [lr] of a row: dS and what the state after it gets; before the last adapter that begins here.
template <typename T>
E3VA_INLINE void load_gradient(
    const AdaptersBackwardParams& p, int64_t token, float* __restrict__ ds) {
  const int64_t R = p.rank, lr = round_up(R, kLanes);
  widen(static_cast<const T*>(p.dS) + (token * p.adapters + p.adapter) * R, R, ds);
  if (p.gamma == nullptr) return;
  float* dstate = p.dstate + token * lr;
  if (p.adapter + 1 == p.adapters) {
    std::fill_n(dstate, lr, 0.0f);
    if (p.dcarry) widen(static_cast<const T*>(p.dcarry) + token * R, R, dstate);
  }
  for (int64_t r = 0; r < lr; r += kLanes) store(ds + r, load(ds + r) + load(dstate + r));
}

// s of a row to S.
template <typename T>
E3VA_INLINE void store_result(
    const AdaptersBackwardParams& p, int64_t token, const float* __restrict__ s) {
  narrow(s, p.rank, static_cast<T*>(p.S) + (token * p.adapters + p.adapter) * p.rank);
}

template <typename T>
E3VA_INLINE void run(const AdaptersBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t k = p.adapter, R = p.rank, M = p.hidden;
  const int64_t lr = round_up(R, kLanes), lm = round_up(M, 2 * kLanes);
  const int64_t rank_tiles = round_up(R, kSumRows);
  const Sums at(p);
  // The weights as they are and transposed, their columns padded to whole vectors.
  std::vector<float> Q(R * lm), Qt(M * lr), U(M * lr), Ut(R * lm), b(lm);
  for (int64_t r = 0; k >= 0 && r < R; ++r) {
    widen(p.Q + (k * R + r) * M, M, &Q[r * lm]);
    for (int64_t j = 0; j < M; ++j) {
      Qt[j * lr + r] = p.Q[(k * R + r) * M + j];
      U[j * lr + r] = Ut[r * lm + j] = p.U[(k * M + j) * R + r];
    }
  }
  if (k >= 0) widen(p.b + k * M, M, b.data());
  const Neighbours neighbours(p.height, p.width, p.side, R, k < 0 ? nullptr : adapter_D(p, k));
  const T* u = static_cast<const T*>(p.u) + k * p.tokens * R;
  // Tiles of the sums run over the edges: hence their padding, and that of what they read.
  std::vector<float> mixed(kBlock * lr + kSumRows), ds(kBlock * lr + kSumRows), s(kBlock * lr);
  std::vector<float> dmixed(kBlock * lr), a(kBlock * lm), dz(kBlock * lm);
  std::vector<float> dQ(rank_tiles * lm), db(lm), dU(rank_tiles * lm);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = p.partial_sums + chunk * at.size;
    const int64_t start = chunk * kChunk, last = std::min(p.tokens, start + kChunk);
    gather_next<T>(p, start, last, sums);
    if (k < 0) continue;
    std::fill(dQ.begin(), dQ.end(), 0.0f);
    std::fill(db.begin(), db.end(), 0.0f);
    std::fill(dU.begin(), dU.end(), 0.0f);
    for (int64_t first = start; first < last; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, last - first), padded = round_up(rows, kTile);
      for (int64_t i = 0; i < rows; ++i) {
        mix(neighbours, u, first + i, &mixed[i * lr]);
        load_gradient<T>(p, first + i, &ds[i * lr]);
      }
      for (int64_t i = rows * lr; i < padded * lr; ++i)  // adds nothing to the sums
        mixed[i] = ds[i] = 0.0f;
      // A tile of rows at a time: what is hidden of it fits the first cache.
      for (int64_t i = 0; i < padded; i += kTile) {
        float* z = &a[i * lm];
        float* da = &dz[i * lm];
        gemm<kTile / 2, 2>(&mixed[i * lr], lr, 1, Q.data(), lm, z, lm, kTile, lm, R, false);
        gemm<kTile / 2, 2>(&ds[i * lr], lr, 1, Ut.data(), lm, da, lm, kTile, lm, R, false);
        for (int64_t j = 0; j < lm; j += kLanes) {
          const Floats bias = load(&b[j]);
          Floats column = load(&db[j]);
          for (int64_t l = 0; l < kTile; ++l) {
            Floats value, slope;
            gelu(load(z + l * lm + j) + bias, value, slope);
            const Floats gradient = load(da + l * lm + j) * slope;
            store(z + l * lm + j, value);
            store(da + l * lm + j, gradient);
            column += gradient;
          }
          store(&db[j], column);
        }
        gemm<kTile, 1>(z, lm, 1, U.data(), lr, &s[i * lr], lr, kTile, lr, M, false);
        gemm<kTile, 1>(da, lm, 1, Qt.data(), lr, &dmixed[i * lr], lr, kTile, lr, M, false);
      }
      gemm<kSumRows, kSumVectors>(
          ds.data(), 1, lr, a.data(), lm, dU.data(), lm, rank_tiles, lm, rows, true);
      gemm<kSumRows, kSumVectors>(
          mixed.data(), 1, lr, dz.data(), lm, dQ.data(), lm, rank_tiles, lm, rows, true);
      std::copy_n(dmixed.data(), rows * lr, p.dmixed[k % 2] + first * lr);
      for (int64_t i = 0; i < rows; ++i) store_result<T>(p, first + i, &s[i * lr]);
    }
    for (int64_t r = 0; r < R; ++r) {
      narrow(&dQ[r * lm], M, sums + r * M);
      narrow(&dU[r * lm], M, sums + at.dU + r * M);
    }
    narrow(db.data(), M, sums + at.db);
  }
}

#if E3VA_TILED
// to [n, kTileBlock] = the transpose of the first n columns of from, whose rows are ld apart.
E3VA_INLINE void transpose(
    const BFloat16* __restrict__ from, int64_t ld, int64_t n, BFloat16* __restrict__ to) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < kTileBlock; ++i) to[j * kTileBlock + i] = from[i * ld + j];
}

// The same for bfloat16, its products in tiles: sums over rows take the narrow factor transposed,
// the wide one in pairs of rows.
template <typename Tiles>
E3VA_INLINE void run_in_tiles(const AdaptersBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t k = p.adapter, R = p.rank, M = p.hidden;
  const int64_t kr = round_up(R, kTileDepth), km = round_up(M, kTileDepth);
  const int64_t lr = round_up(R, kTileSide), pairs = kTileBlock / 2;
  const Sums at(p);
  std::vector<float> b(km), Qt(M * R), Ut(R * M);
  Panels Q, U, Q_transposed, U_transposed;
  if (k >= 0) {
    const float *Q_k = p.Q + k * R * M, *U_k = p.U + k * M * R;
    widen(p.b + k * M, M, b.data());
    for (int64_t r = 0; r < R; ++r)
      for (int64_t j = 0; j < M; ++j) {
        Qt[j * R + r] = Q_k[r * M + j];
        Ut[r * M + j] = U_k[j * R + r];
      }
    Q = pack(Q_k, R, M), U = pack(U_k, M, R);
    Q_transposed = pack(Qt.data(), M, R), U_transposed = pack(Ut.data(), R, M);
  }
  const Neighbours neighbours(p.height, p.width, p.side, R, k < 0 ? nullptr : adapter_D(p, k));
  const NativeBFloat16* u = static_cast<const NativeBFloat16*>(p.u) + k * p.tokens * R;
  // Rows of mixed and ds are kr wide, and zero from lr on.
  std::vector<BFloat16> mixed(kTileBlock * kr), ds(kTileBlock * kr);
  std::vector<BFloat16> mixed_t(lr * kTileBlock), ds_t(lr * kTileBlock);
  std::vector<BFloat16> a(kTileBlock * km), dz(kTileBlock * km);
  Panels a_pairs(pairs * km), dz_pairs(pairs * km);
  std::vector<float> z(kTileBlock * km), da(kTileBlock * km), low_rank(kTileBlock * lr), row(lr);
  std::vector<float> dQ(lr * km), db(km), dU(lr * km);
  const typename Tiles::Scope scope;

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = p.partial_sums + chunk * at.size;
    const int64_t start = chunk * kChunk, last = std::min(p.tokens, start + kChunk);
    gather_next<NativeBFloat16>(p, start, last, sums);
    if (k < 0) continue;
    std::fill(dQ.begin(), dQ.end(), 0.0f);
    std::fill(db.begin(), db.end(), 0.0f);
    std::fill(dU.begin(), dU.end(), 0.0f);
    for (int64_t first = start; first < last; first += kTileBlock) {
      const int64_t rows = std::min<int64_t>(kTileBlock, last - first);
      for (int64_t i = 0; i < kTileBlock; ++i) {
        std::fill_n(&mixed[i * kr], lr, BFloat16{});  // rows beyond add nothing to the sums
        std::fill_n(&ds[i * kr], lr, BFloat16{});
        if (i >= rows) continue;
        mix(neighbours, u, first + i, row.data());
        for (int64_t r = 0; r < lr; r += kLanes)
          halves(&mixed[i * kr + r]) = to_bfloat16(load(&row[r]));
        load_gradient<NativeBFloat16>(p, first + i, row.data());
        for (int64_t r = 0; r < lr; r += kLanes)
          halves(&ds[i * kr + r]) = to_bfloat16(load(&row[r]));
      }
      Tiles::template gemm<2, 2>(
          mixed.data(), kr, Q.data(), z.data(), km, kTileBlock, km, kr, false);
      Tiles::template gemm<2, 2>(
          ds.data(), kr, U_transposed.data(), da.data(), km, kTileBlock, km, kr, false);
      for (int64_t j = 0; j < km; j += kLanes) {
        const Floats bias = load(&b[j]);
        Floats column = load(&db[j]);
        for (int64_t i = 0; i < pairs; ++i) {
          Halves value[2], gradient[2];
          for (int64_t half = 0; half < 2; ++half) {
            const int64_t place = (2 * i + half) * km + j;
            Floats activation, slope;
            gelu_bfloat16(load(&z[place]) + bias, activation, slope);
            slope *= load(&da[place]);
            column += slope;
            halves(&a[place]) = value[half] = to_bfloat16(activation);
            halves(&dz[place]) = gradient[half] = to_bfloat16(slope);
          }
          words(&a_pairs[j * pairs + i * kTileSide]) = pair(value[0], value[1]);
          words(&dz_pairs[j * pairs + i * kTileSide]) = pair(gradient[0], gradient[1]);
        }
        store(&db[j], column);
      }
      Tiles::template gemm<4, 1>(
          a.data(), km, U.data(), low_rank.data(), lr, kTileBlock, lr, km, false);
      for (int64_t i = 0; i < rows; ++i)
        store_result<NativeBFloat16>(p, first + i, &low_rank[i * lr]);
      Tiles::template gemm<4, 1>(
          dz.data(), km, Q_transposed.data(), low_rank.data(), lr, kTileBlock, lr, km, false);
      std::copy_n(low_rank.data(), rows * lr, p.dmixed[k % 2] + first * lr);
      transpose(mixed.data(), kr, lr, mixed_t.data());
      transpose(ds.data(), kr, lr, ds_t.data());
      const int64_t n = kTileBlock;
      Tiles::template gemm<1, 2>(
          ds_t.data(), n, a_pairs.data(), dU.data(), km, lr, km, n, true);
      Tiles::template gemm<1, 2>(
          mixed_t.data(), n, dz_pairs.data(), dQ.data(), km, lr, km, n, true);
    }
    for (int64_t r = 0; r < R; ++r) {
      narrow(&dQ[r * km], M, sums + r * M);
      narrow(&dU[r * km], M, sums + at.dU + r * M);
    }
    narrow(db.data(), M, sums + at.db);
  }
}

E3VA_TILED_KERNEL(adapters_backward_cpu, AdaptersBackwardParams)
#endif

E3VA_KERNEL(adapters_backward_cpu, AdaptersBackwardParams)
#endif
