// A stage's adapters between t and s on the CPU, one adapter at a time: a block of rows of the hidden
// width never leaves the cache. The rows of the state are wide enough for whole vectors.
#ifndef E3VA_SOURCE
#define E3VA_SOURCE "adapters.cpp"
#include "adapters.h"

namespace {
constexpr int kTile = 12;          // rows of a GEMM tile
constexpr int kBlock = 4 * kTile;  // rows: three tiles of bfloat16
}  // namespace

#include "instruction_sets.h"

int64_t adapters_items(const AdaptersParams& p) { return (p.tokens + kBlock - 1) / kBlock; }

// Whole vectors of any instruction set.
int64_t adapters_row(int64_t rank) { return (rank + 15) / 16 * 16; }

E3VA_DISPATCH(adapters_cpu, AdaptersParams)

#else  // in an instruction set
#include "mixing.h"

// What of adapter k is read: t, or u where there is a state.
template <typename T>
E3VA_INLINE const T* input(const AdaptersParams& p, int64_t k) {
  return static_cast<const T*>(p.u ? p.u : p.t) + k * p.tokens * p.rank;
}

// The state c [lr] after adapter k, and what the next one makes of it; after the last one, c.
template <typename T>
E3VA_INLINE void hand_on(
    const AdaptersParams& p, int64_t token, const float* gamma, const float* __restrict__ c) {
  const int64_t R = p.rank, next = p.adapter + 1;
  const int64_t at = (next * p.tokens + token) * R;
  for (int64_t r = 0; r < R; r += kLanes) {
    Floats u = load(c + r);
    if (next < p.adapters)
      u = load_within(static_cast<const T*>(p.t) + at, r, R) + load(gamma + r) * u;
    T* to = (next < p.adapters ? static_cast<T*>(p.u) + at : static_cast<T*>(p.after) + token * R) + r;
    if (r + kLanes <= R)
      store(to, u);
    else
      store_some(to, u, R - r);
  }
}

// Of the adapter after this one, padded to whole vectors.
E3VA_INLINE std::vector<float> next_gamma(const AdaptersParams& p) {
  std::vector<float> gamma(round_up(p.rank, kLanes));
  if (p.gamma && p.adapter + 1 < p.adapters)
    widen(p.gamma + (p.adapter + 1) * p.rank, p.rank, gamma.data());
  return gamma;
}

template <typename T>
E3VA_INLINE void begin_state(const AdaptersParams& p, int64_t first, int64_t rows) {
  const std::vector<float> gamma = next_gamma(p);
  const int64_t R = p.rank, lr = round_up(R, kLanes);
  for (int64_t token = first; token < first + rows; ++token) {
    float* c = p.state + token * lr;
    std::fill_n(c, lr, 0.0f);
    if (p.carry) widen(static_cast<const T*>(p.carry) + token * R, R, c);
    hand_on<T>(p, token, gamma.data(), c);
  }
}

// s [rows, lr] to S and to the state.
template <typename T>
E3VA_INLINE void finish(
    const AdaptersParams& p, int64_t first, int64_t rows, const float* gamma,
    const float* __restrict__ s) {
  const int64_t R = p.rank, lr = round_up(R, kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = first + i;
    narrow(s + i * lr, R, static_cast<T*>(p.S) + (token * p.adapters + p.adapter) * R);
    if (p.gamma == nullptr) continue;
    float* c = p.state + token * lr;
    for (int64_t r = 0; r < lr; r += kLanes) store(c + r, load(c + r) + load(s + i * lr + r));
    hand_on<T>(p, token, gamma, c);
  }
}

template <typename T>
E3VA_INLINE void run(const AdaptersParams& p, int64_t begin, int64_t end) {
  const int64_t k = p.adapter, R = p.rank, M = p.hidden;
  if (k < 0) {
    const int64_t first = begin * kBlock;
    return begin_state<T>(p, first, std::min(end * kBlock, p.tokens) - first);
  }
  const int64_t lr = round_up(R, kLanes), lm = round_up(M, 2 * kLanes);
  // The weights with their columns padded to whole vectors.
  std::vector<float> Q(R * lm), b(lm), U(M * lr);
  for (int64_t r = 0; r < R; ++r) widen(p.Q + (k * R + r) * M, M, &Q[r * lm]);
  for (int64_t j = 0; j < M; ++j) widen(p.U + (k * M + j) * R, R, &U[j * lr]);
  widen(p.b + k * M, M, b.data());
  const int64_t squared = p.side * p.side;
  const Neighbours neighbours(
      p.height, p.width, p.side, R, p.D ? p.D + k * R * squared : nullptr);
  const std::vector<float> gamma = next_gamma(p);
  std::vector<float> mixed(kBlock * lr), a(kBlock * lm), s(kBlock * lr);
  const T* u = input<T>(p, k);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    const int64_t padded = round_up(rows, kTile);
    for (int64_t i = 0; i < rows; ++i) mix(neighbours, u, first + i, &mixed[i * lr]);
    // A tile of rows at a time: what is hidden of it fits the first cache.
    for (int64_t i = 0; i < padded; i += kTile) {
      float* z = &a[i * lm];
      gemm<kTile / 2, 2>(&mixed[i * lr], lr, 1, Q.data(), lm, z, lm, kTile, lm, R, false);
      for (int64_t j = 0; j < lm; j += kLanes) {
        const Floats bias = load(&b[j]);
        for (int64_t l = 0; l < kTile; ++l) {
          Floats value, slope;
          gelu(load(z + l * lm + j) + bias, value, slope);
          store(z + l * lm + j, value);
        }
      }
      gemm<kTile, 1>(z, lm, 1, U.data(), lr, &s[i * lr], lr, kTile, lr, M, false);
    }
    finish<T>(p, first, rows, gamma.data(), s.data());
  }
}

#if E3VA_TILED
// The same for bfloat16, its products in tiles.
template <typename Tiles>
E3VA_INLINE void run_in_tiles(const AdaptersParams& p, int64_t begin, int64_t end) {
  const int64_t k = p.adapter, R = p.rank, M = p.hidden;
  if (k < 0) {
    const int64_t first = begin * kBlock;
    return begin_state<NativeBFloat16>(p, first, std::min(end * kBlock, p.tokens) - first);
  }
  const int64_t kr = round_up(R, kTileDepth), lr = round_up(R, kTileSide);
  const int64_t km = round_up(M, kTileDepth), squared = p.side * p.side;
  const Panels Q = pack(p.Q + k * R * M, R, M), U = pack(p.U + k * M * R, M, R);
  std::vector<float> b(km), mixed(lr), z(kBlock * km), s(kBlock * lr);
  widen(p.b + k * M, M, b.data());
  const Neighbours neighbours(
      p.height, p.width, p.side, R, p.D ? p.D + k * R * squared : nullptr);
  const std::vector<float> gamma = next_gamma(p);
  std::vector<BFloat16> t(kBlock * kr), a(kBlock * km);  // t is zero from lr on
  const NativeBFloat16* u = input<NativeBFloat16>(p, k);
  const typename Tiles::Scope scope;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      mix(neighbours, u, first + i, mixed.data());
      for (int64_t r = 0; r < lr; r += kLanes)
        halves(&t[i * kr + r]) = to_bfloat16(load(&mixed[r]));
    }
    Tiles::template gemm<3, 2>(t.data(), kr, Q.data(), z.data(), km, kBlock, km, kr, false);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t j = 0; j < km; j += kLanes) {
        Floats value, slope;
        gelu_bfloat16(load(&z[i * km + j]) + load(&b[j]), value, slope);
        halves(&a[i * km + j]) = to_bfloat16(value);
      }
    Tiles::template gemm<3, 1>(a.data(), km, U.data(), s.data(), lr, kBlock, lr, km, false);
    finish<NativeBFloat16>(p, first, rows, gamma.data(), s.data());
  }
}

E3VA_TILED_KERNEL(adapters_cpu, AdaptersParams)
#endif

E3VA_KERNEL(adapters_cpu, AdaptersParams)
#endif
