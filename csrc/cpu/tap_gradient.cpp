// dP_k = tap_kᵀ·dt_k of a stage's adapters on the CPU, from the taps as they are kept: a block of rows
// at a time, expanded in the cache.
#ifndef E3VA_SOURCE
#define E3VA_SOURCE "tap_gradient.cpp"
#include "tap_gradient.h"

#include <algorithm>

namespace {

constexpr int kBlock = 24;        // rows
constexpr int kTileBlock = 64;    // rows of bfloat16 in tiles
constexpr int64_t kParts = 64;    // of all taps together: enough for as many threads
constexpr int64_t kLeastRows = 8 * kTileBlock;

int64_t part_rows(const TapGradientParams& p) {
  const int64_t parts = std::max<int64_t>(1, kParts / std::max<int64_t>(1, p.adapters));
  const int64_t rows = std::max(kLeastRows, (p.tokens + parts - 1) / parts);
  return (rows + kTileBlock - 1) / kTileBlock * kTileBlock;
}

struct Part {
  int64_t adapter, begin, end;  // rows
  float* sums;                  // [rank, channels]

  Part(const TapGradientParams& p, int64_t item)
      : adapter(item / tap_gradient_parts(p)),
        begin(item % tap_gradient_parts(p) * part_rows(p)),
        end(std::min(p.tokens, begin + part_rows(p))),
        sums(p.partial_sums + item * p.rank * p.channels) {}
};

}  // namespace

#include "instruction_sets.h"

int64_t tap_gradient_parts(const TapGradientParams& p) {
  return (p.tokens + part_rows(p) - 1) / part_rows(p);
}

int64_t tap_gradient_items(const TapGradientParams& p) {
  return p.adapters * tap_gradient_parts(p);
}

E3VA_DISPATCH(tap_gradient_cpu, TapGradientParams)

void tap_gradient_sum(const TapGradientParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, parts = tap_gradient_parts(p);
  std::vector<float> sums(R * C);
  for (int64_t k = begin; k < end; ++k) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    const float* partial = p.partial_sums + k * parts * R * C;
    for (int64_t part = 0; part < parts; ++part, partial += R * C)
      for (int64_t i = 0; i < R * C; ++i) sums[i] += partial[i];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t r = 0; r < R; ++r) p.dP[(k * C + c) * R + r] = sums[r * C + c];
  }
}

#else  // in an instruction set
#include "tap_codes.h"

template <typename T>
E3VA_INLINE void run(const TapGradientParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank;
  const int64_t stored = p.storage == Storage::kInt4 ? (C + 1) / 2 : C;
  const int64_t lc = round_up(C, 2 * kLanes), lr = round_up(R, kLanes);
  const int64_t rank_tiles = round_up(R, kSumRows);
  std::vector<float> x(kBlock * lc + 2 * kLanes), dt(kBlock * lr + kSumRows), dP(rank_tiles * lc);
  std::vector<uint8_t> codes(lc);

  for (int64_t item = begin; item < end; ++item) {
    const Part part(p, item);
    const void* tap = p.taps[part.adapter];
    const T* dt_rows = static_cast<const T*>(p.dt) + part.adapter * p.tokens * R;
    std::fill(dP.begin(), dP.end(), 0.0f);
    for (int64_t first = part.begin; first < part.end; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, part.end - first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t token = first + i;
        widen(dt_rows + token * R, R, &dt[i * lr]);
        if (p.storage == Storage::kFull)
          widen(static_cast<const T*>(tap) + token * C, C, &x[i * lc]);
        else
          expand(static_cast<const uint8_t*>(tap) + token * stored, p.scale[part.adapter][token],
                 C, p.storage, codes.data(), &x[i * lc]);
      }
      gemm<kSumRows, kSumVectors>(
          dt.data(), 1, lr, x.data(), lc, dP.data(), lc, rank_tiles, lc, rows, true);
    }
    for (int64_t r = 0; r < R; ++r) narrow(&dP[r * lc], C, part.sums + r * C);
  }
}

#if E3VA_TILED
// Taps of two tokens as pairs of bfloat16, panels `pairs` vectors apart; those of kInt4 without
// their scale, as whole numbers. x has room for two taps as `expand` wants it.
E3VA_INLINE void pair_taps(
    const TapGradientParams& p, int64_t adapter, int64_t token, int64_t next, int64_t pairs,
    uint8_t* codes, float* x, uint32_t* to) {
  const int64_t C = p.channels, bytes = (C + 1) / 2;
  if (p.storage == Storage::kFull) {
    const BFloat16* low = static_cast<const BFloat16*>(p.taps[adapter]) + token * C;
    const BFloat16* high = static_cast<const BFloat16*>(p.taps[adapter]) + next * C;
    int64_t c = 0;
    for (; c + kTileSide <= C; c += kTileSide)
      words(to + c * pairs) = pair(halves(low + c), halves(high + c));
    for (; c < C; ++c)
      to[c / kTileSide * kTileSide * pairs + c % kTileSide] = low[c].bits | high[c].bits << 16;
    return;
  }
  const uint8_t* taps = static_cast<const uint8_t*>(p.taps[adapter]);
  const int64_t stored = p.storage == Storage::kInt4 ? bytes : C;
  if (p.storage == Storage::kInt4 && C % (2 * kTileSide) == 0) {
    for (int64_t c = 0; c < bytes; c += kTileSide) {
      const Words both = widened(bytes_at(taps + token * stored + c)) |
                         widened(bytes_at(taps + next * stored + c)) << 16;
      words(to + c * pairs) = signed_nibbles(both);
      words(to + (bytes + c) * pairs) = signed_nibbles(both >> 4);
    }
    return;
  }
  const int64_t room = round_up(C, kLanes) + 2 * kLanes;
  const float* scale = p.scale[adapter];
  const bool scaled = p.storage != Storage::kInt4;
  expand(taps + token * stored, scaled ? scale[token] : 1.0f, C, p.storage, codes, x);
  expand(taps + next * stored, scaled ? scale[next] : 1.0f, C, p.storage, codes, x + room);
  for (int64_t c = 0; c < C; c += kTileSide)
    words(to + c * pairs) = pair(to_bfloat16(load(x + c)), to_bfloat16(load(x + room + c)));
}

// The same for bfloat16, its products in tiles: dt is taken transposed, the taps in pairs of rows.
template <typename Tiles>
E3VA_INLINE void run_in_tiles(const TapGradientParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, pairs = kTileBlock / 2;
  const int64_t lr = round_up(R, kTileSide), lc = round_up(C, 2 * kTileSide);
  std::vector<BFloat16> dt(lr * kTileBlock);  // transposed
  Panels x_pairs(pairs * lc);
  std::vector<float> x(2 * (round_up(C, kLanes) + 2 * kLanes)), row(lr), dP(lr * lc);
  std::vector<uint8_t> codes(lc);
  const typename Tiles::Scope scope;

  for (int64_t item = begin; item < end; ++item) {
    const Part part(p, item);
    const NativeBFloat16* dt_rows =
        static_cast<const NativeBFloat16*>(p.dt) + part.adapter * p.tokens * R;
    const float* scale = p.storage == Storage::kInt4 ? p.scale[part.adapter] : nullptr;
    std::fill(dP.begin(), dP.end(), 0.0f);
    for (int64_t first = part.begin; first < part.end; first += kTileBlock) {
      for (int64_t i = 0; i < kTileBlock; ++i) {
        const int64_t token = first + i;
        std::fill(row.begin(), row.end(), 0.0f);  // rows beyond add nothing to the sums
        if (token < part.end) widen(dt_rows + token * R, R, row.data());
        const float factor = scale && token < part.end ? scale[token] : 1.0f;
        for (int64_t r = 0; r < lr; r += kLanes) {
          BFloat16 column[kLanes];
          halves(column) = to_bfloat16(load(&row[r]) * factor);
          for (int64_t l = 0; l < kLanes; ++l) dt[(r + l) * kTileBlock + i] = column[l];
        }
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t token = first + 2 * i, next = std::min(token + 1, part.end - 1);
        if (token < part.end)
          pair_taps(p, part.adapter, token, next, pairs, codes.data(), x.data(),
                    &x_pairs[i * kTileSide]);
      }
      Tiles::template gemm<1, 2>(
          dt.data(), kTileBlock, x_pairs.data(), dP.data(), lc, lr, lc, kTileBlock, true);
    }
    for (int64_t r = 0; r < R; ++r) narrow(&dP[r * lc], C, part.sums + r * C);
  }
}

E3VA_TILED_KERNEL(tap_gradient_cpu, TapGradientParams)
#endif

E3VA_KERNEL(tap_gradient_cpu, TapGradientParams)
#endif
