// Residual add, LayerNorm, the projection of a tap and the tap as it is kept, on the CPU: a row at a
// time while it is in the cache, its products a block of rows at a time.
#ifndef E3VA_SOURCE
#define E3VA_SOURCE "sublayer_epilogue.cpp"
#include "sublayer_epilogue.h"

namespace {
constexpr int kTile = 12;          // rows of a GEMM tile
constexpr int kBlock = 4 * kTile;  // rows: three tiles of bfloat16
}  // namespace

#include "instruction_sets.h"

int64_t sublayer_epilogue_items(const SublayerEpilogueParams& p) {
  return (p.tokens + kBlock - 1) / kBlock;
}

E3VA_DISPATCH(sublayer_epilogue_cpu, SublayerEpilogueParams)

#else  // in an instruction set
#include "tap_codes.h"

// y' = y + x as stored; its norm at z, where that is not null.
template <typename T>
E3VA_INLINE void add_and_normalise(
    const SublayerEpilogueParams& p, int64_t at, float* __restrict__ y_row, T* __restrict__ z) {
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
    if (p.z) prefetch<true>(static_cast<T*>(p.z), at + c + 2 * C);
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
  if (z == nullptr) return;
  const float mean = sum(total) / float(C);
  Floats squares = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats off = load(y_row + c) - mean;
    squares += off * off;
  }
  float variance = sum(squares);
  for (int64_t c = whole; c < C; ++c) variance += (y_row[c] - mean) * (y_row[c] - mean);
  const float scale = 1.0f / std::sqrt(variance / float(C) + p.eps);
  if (p.norm_weight == nullptr) {
    for (int64_t c = 0; c < whole; c += kLanes) store(z + c, (load(y_row + c) - mean) * scale);
    if (whole < C) store_some(z + whole, (load(y_row + whole) - mean) * scale, C - whole);
    return;
  }
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

// What a row leaves to be done later: its tap, kept, and the place of that among x or norms.
template <typename T>
class Rows {
 public:
  explicit Rows(const SublayerEpilogueParams& p)
      : p_(p), y_(round_up(p.channels, kLanes)), z_(p.norm_tap && p.P ? p.channels : 0) {}

  // The row's tap as stored.
  E3VA_INLINE const T* complete(int64_t token) {
    const int64_t at = token * p_.channels;
    T* z = p_.z ? static_cast<T*>(p_.z) + at : z_.empty() ? nullptr : z_.data();
    add_and_normalise<T>(p_, at, y_.data(), z);
    return p_.norm_tap ? z : static_cast<const T*>(p_.x) + at;
  }

 private:
  const SublayerEpilogueParams& p_;
  std::vector<float> y_;
  std::vector<T> z_;
};

template <typename T>
E3VA_INLINE void run(const SublayerEpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, lc = round_up(C, kLanes), lr = round_up(p.rank, kLanes);
  // Its columns padded to whole vectors; empty without an adapter.
  std::vector<float> P(p.P ? C * lr : 0);
  if (p.P)
    for (int64_t c = 0; c < C; ++c) widen(p.P + c * p.rank, p.rank, &P[c * lr]);
  std::vector<float> tap(kBlock * lc + kLanes), t(kBlock * lr);
  const int64_t stored = p.storage == Storage::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc + kLanes);
  T* t_out = static_cast<T*>(p.t);
  Rows<T> row(p);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first + i;
      const T* from = row.complete(token);
      if (p.P == nullptr) continue;
      widen(from, C, &tap[i * lc]);
      if (p.storage != Storage::kFull)
        compress(&tap[i * lc], token, C, p.storage, p.seed, codes.data(), p.kept + token * stored,
                 p.scale + token);
    }
    if (p.P == nullptr) continue;
    const int64_t padded = round_up(rows, kTile);
    gemm<kTile, 1>(tap.data(), lc, 1, P.data(), lr, t.data(), lr, padded, lr, C, false);
    for (int64_t i = 0; i < rows; ++i) narrow(&t[i * lr], p.rank, t_out + (first + i) * p.rank);
  }
}

#if E3VA_TILED
// The same for bfloat16, its products in tiles.
template <typename Tiles>
E3VA_INLINE void run_in_tiles(const SublayerEpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, R = p.rank, kc = round_up(C, kTileDepth);
  const int64_t lr = round_up(R, kTileSide);
  const int64_t lc = kc + kTileDepth;  // rows a power of two apart would share few cache lines
  Panels P;
  if (p.P) P = pack(p.P, C, R);
  std::vector<NativeBFloat16> tap(kBlock * lc + kLanes);
  std::vector<float> t(kBlock * lr);
  const int64_t stored = p.storage == Storage::kInt4 ? (C + 1) / 2 : C;
  std::vector<uint8_t> codes(lc);
  NativeBFloat16* t_out = static_cast<NativeBFloat16*>(p.t);
  Rows<NativeBFloat16> row(p);
  const typename Tiles::Scope scope;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kBlock, rows = std::min<int64_t>(kBlock, p.tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first + i;
      const NativeBFloat16* from = row.complete(token);
      if (p.P == nullptr) continue;
      std::copy_n(from, C, &tap[i * lc]);
      if (p.storage != Storage::kFull)
        compress(&tap[i * lc], token, C, p.storage, p.seed, codes.data(), p.kept + token * stored,
                 p.scale + token);
    }
    if (p.P == nullptr) continue;
    Tiles::template gemm<3, 1>(tap.data(), lc, P.data(), t.data(), lr, kBlock, lr, kc, false);
    for (int64_t i = 0; i < rows; ++i) narrow(&t[i * lr], R, t_out + (first + i) * R);
  }
}

E3VA_TILED_KERNEL(sublayer_epilogue_cpu, SublayerEpilogueParams)
#endif

E3VA_KERNEL(sublayer_epilogue_cpu, SublayerEpilogueParams)
#endif
