// Window attention on the CPU: gathers one window and head into fp32 scratch, two small GEMMs and a
// softmax there, scatters the result. Nothing the size of the map is ever made but the output.
#ifndef E3VA_SOURCE
#define E3VA_SOURCE "window_attention.cpp"
#include "window_attention.h"

#include "instruction_sets.h"

int64_t window_attention_items(const WindowAttentionParams& p) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  return p.batch * p.heads * rows.windows * columns.windows;
}

E3VA_DISPATCH(window_attention_cpu, WindowAttentionParams)

#else  // in an instruction set

// A GEMM tile: 7 rows, for windows of 7 × 7, and two vectors.
constexpr int kTile = 7;
constexpr int kVectors = 2;
constexpr float kMasked = -100.0f;

// to [columns, ld] = the transpose of from [rows, columns]; ld ≥ rows.
E3VA_INLINE void transpose(
    const float* __restrict__ from, int64_t rows, int64_t columns, float* __restrict__ to,
    int64_t ld) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to[j * ld + i] = from[i * columns + j];
}

// Columns of S [m, ld]: exp(S·scale + bias - their largest), and the inverse of their sums. Lanes
// are queries, so that nothing is reduced across a vector.
E3VA_INLINE void softmax(
    float* __restrict__ S, const float* __restrict__ bias, float scale, int64_t m, int64_t ld,
    float* __restrict__ inverse) {
  for (int64_t j = 0; j < ld; j += kLanes) {
    Floats top = broadcast(-INFINITY), total = {};
    for (int64_t i = 0; i < m; ++i) {
      const Floats score = load(S + i * ld + j) * scale + load(bias + i * ld + j);
      top = select(score > top, score, top);
      store(S + i * ld + j, score);
    }
    for (int64_t i = 0; i < m; ++i) {
      const Floats weight = exp_negative(load(S + i * ld + j) - top);
      total += weight;
      store(S + i * ld + j, weight);
    }
    store(inverse + j, 1.0f / total);
  }
}

// The table of position biases, in float32.
template <typename T>
E3VA_INLINE std::vector<float> position_biases(const WindowAttentionParams& p) {
  const int64_t n = (2 * p.window - 1) * (2 * p.window - 1) * p.heads;
  std::vector<float> table(round_up(n, kLanes));
  widen(static_cast<const T*>(p.position_bias), n, table.data());
  return table;
}

template <typename T>
E3VA_INLINE void run(const WindowAttentionParams& p, int64_t begin, int64_t end) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const int64_t tokens = p.window * p.window, windows = rows.windows * columns.windows;
  const int64_t d = p.head_dim, C = p.heads * d;
  const int64_t m = round_up(tokens, kTile), ld = round_up(tokens, 2 * kLanes);
  const int64_t dl = round_up(d, 2 * kLanes);
  // S is transposed, [keys, queries], and so is what makes it.
  std::vector<float> query(tokens * dl), q(dl * ld), k(m * dl), v(tokens * dl);
  std::vector<float> S(m * ld), inverse(ld), O(m * dl);
  std::vector<std::vector<float>> bias(p.heads);  // made when its head first comes
  std::vector<int64_t> token(tokens), region(tokens);
  const T* qkv = static_cast<const T*>(p.qkv);
  const T* qkv_bias = static_cast<const T*>(p.qkv_bias);
  const std::vector<float> table = position_biases<T>(p);
  T* out = static_cast<T*>(p.out);
  const float scale = 1.0f / std::sqrt(float(d));

  for (int64_t item = begin; item < end; ++item) {
    // Heads vary fastest: a window's rows of qkv stay in the cache until all are done.
    const int64_t head = item % p.heads, window = item / p.heads % windows;
    const int64_t image = item / p.heads / windows;
    const int64_t wi = window / columns.windows, wj = window % columns.windows;
    bool mixed = false;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t i = rows.position(wi, t / p.window), j = columns.position(wj, t % p.window);
      const bool inside = i < p.height && j < p.width;
      token[t] = inside ? (image * p.height + i) * p.width + j : -1;
      region[t] = rows.region(wi, t / p.window) * 3 + columns.region(wj, t % p.window);
      mixed |= region[t] != region[0];
      float* to[] = {&query[t * dl], &k[t * dl], &v[t * dl]};
      for (int64_t part = 0; part < 3; ++part)
        if (inside)
          widen(qkv + (token[t] * 3 + part) * C + head * d, d, to[part]);
        else
          widen(qkv_bias + part * C + head * d, d, to[part]);
    }
    transpose(query.data(), tokens, dl, q.data(), ld);
    if (bias[head].empty()) {
      bias[head].resize(tokens * ld);
      float* to = bias[head].data();
      for (int64_t ki = 0; ki < p.window; ++ki)
        for (int64_t kj = 0; kj < p.window; ++kj, to += ld)
          for (int64_t qi = 0; qi < p.window; ++qi)
            for (int64_t qj = 0; qj < p.window; ++qj)
              to[qi * p.window + qj] =
                  table[position_bias_row(p.window, qi, qj, ki, kj) * p.heads + head];
    }
    gemm<kTile, kVectors>(k.data(), dl, 1, q.data(), ld, S.data(), ld, m, ld, d, false);
    if (mixed)
      for (int64_t a = 0; a < tokens; ++a)
        for (int64_t b = 0; b < tokens; ++b)
          if (region[a] != region[b]) S[a * ld + b] += kMasked / scale;
    softmax(S.data(), bias[head].data(), scale, tokens, ld, inverse.data());
    gemm<kTile, kVectors>(S.data(), 1, ld, v.data(), dl, O.data(), dl, m, dl, tokens, false);
    for (int64_t t = 0; t < tokens; ++t) {
      if (token[t] < 0) continue;
      for (int64_t c = 0; c < dl; c += kLanes)
        store(&O[t * dl + c], load(&O[t * dl + c]) * inverse[t]);
      narrow(&O[t * dl], d, out + token[t] * C + head * d);
    }
  }
}

#if E3VA_TILED
// Sixteen rows of sixteen words, transposed in place: blocks of 1, 2, 4, 8 change sides.
template <int kSide>
E3VA_INLINE void exchange(Words* rows) {
  Words upper = {}, lower = {};
  for (uint32_t l = 0; l < kLanes; ++l) {
    upper[l] = l & kSide ? kLanes + l - kSide : l;
    lower[l] = l & kSide ? kLanes + l : l + kSide;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSide) continue;
    const Words above = rows[i], below = rows[i + kSide];
    rows[i] = permuted(above, below, upper);
    rows[i + kSide] = permuted(above, below, lower);
  }
}

template <typename Reduce>
E3VA_INLINE float across(Floats x, Reduce reduce) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = reduce(lanes[i], lanes[i + half]);
  return lanes[0];
}

// The same for bfloat16 and heads of 32, its products in tiles: rows are queries.
template <typename Tiles>
E3VA_INLINE void run_in_tiles(const WindowAttentionParams& p, int64_t begin, int64_t end) {
  constexpr int64_t d = kTileDepth;
  if (p.head_dim != d) return run<BFloat16>(p, begin, end);
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const int64_t tokens = p.window * p.window, windows = rows.windows * columns.windows;
  const int64_t C = p.heads * d, m = round_up(tokens, kTileDepth);  // keys beyond weigh nothing
  std::vector<BFloat16> q(m * d), k(m * d), v(m * d), weights(m * m);
  Panels k_pairs(m * d / 2), v_pairs(m * d / 2);
  std::vector<float> S(m * m), O(m * d), mask(tokens * m), inverse(tokens);
  std::vector<std::vector<float>> bias(p.heads);  // made when its head first comes
  std::vector<int64_t> token(tokens), region(tokens);
  const BFloat16* qkv = static_cast<const BFloat16*>(p.qkv);
  const BFloat16* qkv_bias = static_cast<const BFloat16*>(p.qkv_bias);
  const std::vector<float> table = position_biases<BFloat16>(p);
  NativeBFloat16* out = static_cast<NativeBFloat16*>(p.out);
  const float scale = 1.0f / std::sqrt(float(d));
  const typename Tiles::Scope scope;
  int64_t last_window = -1;
  bool mixed = false;

  for (int64_t item = begin; item < end; ++item) {
    // Heads vary fastest: a window's rows of qkv stay in the cache until all are done.
    const int64_t head = item % p.heads, window = item / p.heads % windows;
    const int64_t image = item / p.heads / windows;
    const int64_t wi = window / columns.windows, wj = window % columns.windows;
    if (item / p.heads != last_window) {
      last_window = item / p.heads;
      mixed = false;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t i = rows.position(wi, t / p.window), j = columns.position(wj, t % p.window);
        const bool inside = i < p.height && j < p.width;
        token[t] = inside ? (image * p.height + i) * p.width + j : -1;
        region[t] = rows.region(wi, t / p.window) * 3 + columns.region(wj, t % p.window);
        mixed |= region[t] != region[0];
      }
      if (mixed)
        for (int64_t a = 0; a < tokens; ++a)
          for (int64_t b = 0; b < tokens; ++b)
            mask[a * m + b] = region[a] == region[b] ? 0.0f : kMasked;
    }
    if (bias[head].empty()) {
      bias[head].assign(tokens * m, -INFINITY);
      float* to = bias[head].data();
      for (int64_t qi = 0; qi < p.window; ++qi)
        for (int64_t qj = 0; qj < p.window; ++qj, to += m)
          for (int64_t ki = 0; ki < p.window; ++ki)
            for (int64_t kj = 0; kj < p.window; ++kj)
              to[ki * p.window + kj] =
                  table[position_bias_row(p.window, qi, qj, ki, kj) * p.heads + head];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const BFloat16* from = token[t] < 0 ? qkv_bias : qkv + token[t] * 3 * C;
      from += head * d;
      std::copy_n(from, d, &q[t * d]);
      std::copy_n(from + C, d, &k[t * d]);
      std::copy_n(from + 2 * C, d, &v[t * d]);
      // The next head's: too far apart for the processor to foresee.
      for (int64_t part = 0; part < 3; ++part) prefetch(from, part * C + d);
    }
    for (int64_t t = 0; t < m; t += kTileSide) {
      Words block[kTileSide];
      std::memcpy(block, &k[t * d], sizeof block);
      exchange<1>(block);
      exchange<2>(block);
      exchange<4>(block);
      exchange<8>(block);
      std::memcpy(&k_pairs[t * d / 2], block, sizeof block);
    }
    for (int64_t t = 0; t < m; t += 2)
      for (int64_t c = 0; c < d; c += kTileSide)
        words(&v_pairs[(c * m + t * kTileSide) / 2]) =
            pair(halves(&v[t * d + c]), halves(&v[(t + 1) * d + c]));
    Tiles::template gemm<2, 2>(q.data(), d, k_pairs.data(), S.data(), m, m, m, d, false);
    for (int64_t a = 0; a < tokens; ++a) {
      float* scores = &S[a * m];
      Floats top = broadcast(-INFINITY), total = {};
      for (int64_t b = 0; b < m; b += kLanes) {
        Floats score = load(scores + b) * scale + load(&bias[head][a * m + b]);
        if (mixed) score += load(&mask[a * m + b]);
        top = larger(top, score);
        store(scores + b, score);
      }
      const float highest = across(top, [](float x, float y) { return x < y ? y : x; });
      for (int64_t b = 0; b < m; b += kLanes) {
        const Floats weight = exp_bfloat16(load(scores + b) - highest);
        total += weight;
        halves(&weights[a * m + b]) = to_bfloat16(weight);
      }
      inverse[a] = 1.0f / across(total, [](float x, float y) { return x + y; });
    }
    Tiles::template gemm<2, 2>(weights.data(), m, v_pairs.data(), O.data(), d, m, d, m, false);
    for (int64_t t = 0; t < tokens; ++t) {
      if (token[t] < 0) continue;
      for (int64_t c = 0; c < d; c += kLanes)
        store(out + token[t] * C + head * d + c, load(&O[t * d + c]) * inverse[t]);
    }
  }
}

E3VA_TILED_KERNEL(window_attention_cpu, WindowAttentionParams)
#endif

E3VA_KERNEL(window_attention_cpu, WindowAttentionParams)
#endif
