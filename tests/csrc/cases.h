// The CPU kernels as csrc/library.cpp runs them, over odd shapes, on buffers of exactly the right
// size: what is read or written beyond is a heap overflow. What they are to write is NaN before.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/adapters.h"
#include "../../csrc/cpu/adapters_backward.h"
#include "../../csrc/cpu/sublayer_epilogue.h"
#include "../../csrc/cpu/tap_gradient.h"
#include "../../csrc/cpu/window_attention.h"

inline uint32_t random_state = 1;

inline float random_float() {
  random_state = random_state * 1664525 + 1013904223;
  return float(int32_t(random_state)) / 2147483648.0f;
}

// Values of a storage type, as bytes.
typedef std::vector<char> Values;

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

inline Values values(int64_t n, Dtype dtype) {
  Values bytes(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const float value = random_float();
    if (dtype == Dtype::kFloat)
      reinterpret_cast<float*>(bytes.data())[i] = value;
    else  // any 16 bits of a moderate exponent
      reinterpret_cast<uint16_t*>(bytes.data())[i] =
          uint16_t((random_state >> 16 & 0x83ff) | (dtype == Dtype::kHalf ? 0x3800 : 0x3e00));
  }
  return bytes;
}

inline Values unwritten(int64_t n, Dtype dtype) { return Values(n * size_of(dtype), '\xff'); }

inline std::vector<float> unwritten(int64_t n) {
  return std::vector<float>(n, std::numeric_limits<float>::quiet_NaN());
}

inline std::vector<float> weights(int64_t n, float size = 0.3f) {
  std::vector<float> w(n);
  for (float& value : w) value = random_float() * size;
  return w;
}

// Whether all was written, and nothing is infinite.
inline bool finite(const Values& bytes, Dtype dtype) {
  const uint16_t exponent = dtype == Dtype::kHalf ? 0x7c00 : 0x7f80;
  for (size_t i = size_of(dtype) - 2; i < bytes.size(); i += size_of(dtype)) {
    uint16_t high;
    std::memcpy(&high, &bytes[i], 2);
    if ((high & exponent) == exponent) return false;
  }
  return true;
}

// Of bfloat16.
inline std::vector<float> widened(const Values& bytes) {
  std::vector<float> wide(bytes.size() / 2);
  for (size_t i = 0; i < wide.size(); ++i)
    std::memcpy(reinterpret_cast<char*>(&wide[i]) + 2, &bytes[2 * i], 2);
  return wide;
}

// In two pieces, as two threads would.
template <typename Run>
void in_pieces(int64_t items, Run run) {
  const int64_t half = items / 2;
  if (half > 0) run(0, half);
  run(half, items);
}

// One result, as stored or in fp32.
struct Result {
  std::string name;
  Values stored;
  std::vector<float> values;

  Result(std::string name, Values stored) : name(std::move(name)), stored(std::move(stored)) {}
  Result(std::string name, std::vector<float> values)
      : name(std::move(name)), values(std::move(values)) {}
};

struct Attention {
  int64_t batch, height, width, heads, head_dim, window, shift;
};

inline std::vector<Result> run(const Attention& a, Dtype dtype) {
  random_state = 1;
  const int64_t C = a.heads * a.head_dim, tokens = a.batch * a.height * a.width;
  const int64_t side = 2 * a.window - 1;
  const auto qkv = values(tokens * 3 * C, dtype);
  const auto bias = values(3 * C, dtype), table = values(side * side * a.heads, dtype);
  auto out = unwritten(tokens * C, dtype);
  const WindowAttentionParams p{
      qkv.data(), bias.data(), table.data(), out.data(), dtype,    a.batch,
      a.height,   a.width,     a.heads,      a.head_dim, a.window, a.shift};
  in_pieces(window_attention_items(p), [&](int64_t begin, int64_t end) {
    window_attention_cpu(p, begin, end);
  });
  return {{"out", out}};
}

struct Sublayer {
  int64_t tokens, channels, rank;  // 0: no adapter
  Storage storage;
  bool norm, norm_tap;
};

struct SublayerResults {
  std::vector<Result> results;
  Values tap;
  std::vector<uint8_t> kept;
  std::vector<float> scale;
};

inline SublayerResults run(const Sublayer& s, Dtype dtype) {
  random_state = 2;
  const int64_t C = s.channels, R = s.rank, N = s.tokens;
  const bool keeps = R && s.storage != Storage::kFull;
  const auto x = values(N * C, dtype), y = values(N * C, dtype);
  const auto weight = weights(C, 1.0f), bias = weights(C, 1.0f), P = weights(C * R);
  auto y_out = unwritten(N * C, dtype), t = unwritten(N * R, dtype), t_again = t;
  auto z = unwritten(s.norm || s.norm_tap ? N * C : 0, dtype);
  std::vector<uint8_t> kept(keeps ? N * (s.storage == Storage::kInt4 ? (C + 1) / 2 : C) : 0);
  auto scale = unwritten(keeps ? N : 0);
  SublayerEpilogueParams p{
      x.data(), y.data(),     s.norm ? weight.data() : nullptr, s.norm ? bias.data() : nullptr,
      R ? P.data() : nullptr, y_out.data(), z.empty() ? nullptr : z.data(),
      t.data(), kept.data(),  scale.data(), dtype, s.norm_tap, s.storage, 7, N, C, R, 1e-5f};
  auto both = [&](int64_t begin, int64_t end) { sublayer_epilogue_cpu(p, begin, end); };
  in_pieces(sublayer_epilogue_items(p), both);
  p.z = nullptr, p.t = t_again.data();  // a norm that is not asked for may still be the tap
  in_pieces(sublayer_epilogue_items(p), both);
  std::vector<Result> results{
      {"y_out", y_out}, {"z", z}, {"t", t}, {"t without z", t_again}, {"scale", scale}};
  return {results, s.norm_tap ? z : x, kept, scale};
}

struct Adapters {
  int64_t adapters, batch, height, width, rank, hidden, side;  // 0: no mixing
  bool state, carry;
};

inline std::vector<Result> run(const Adapters& a, Dtype dtype) {
  random_state = 3;
  const int64_t K = a.adapters, R = a.rank, M = a.hidden, N = a.batch * a.height * a.width;
  const int64_t room = N * adapters_row(R);
  const auto t = values(K * N * R, dtype), carry = values(N * R, dtype);
  const auto dS = values(N * K * R, dtype), dcarry = values(N * R, dtype);
  const auto D = weights(K * R * a.side * a.side, 0.1f), gamma = weights(K * R, 1.0f);
  const auto Q = weights(K * R * M), b = weights(K * M), U = weights(K * M * R, 0.1f);
  auto S = unwritten(N * K * R, dtype), u = unwritten(a.state ? K * N * R : 0, dtype);
  auto after = unwritten(a.state ? N * R : 0, dtype);
  auto state = unwritten(a.state ? room : 0);

  auto set = [&](auto& p) {
    p.D = a.side ? D.data() : nullptr, p.gamma = a.state ? gamma.data() : nullptr;
    p.Q = Q.data(), p.b = b.data(), p.U = U.data();
    p.dtype = dtype, p.adapters = K, p.height = a.height, p.width = a.width, p.tokens = N;
    p.rank = R, p.hidden = M, p.side = a.side;
  };
  AdaptersParams p{};
  set(p);
  p.state = a.state ? state.data() : nullptr;
  p.t = t.data(), p.carry = a.carry ? carry.data() : nullptr;
  p.S = S.data(), p.u = a.state ? u.data() : nullptr, p.after = after.data();
  for (p.adapter = a.state ? -1 : 0; p.adapter < K; ++p.adapter)
    in_pieces(adapters_items(p), [&](int64_t begin, int64_t end) { adapters_cpu(p, begin, end); });

  auto S_again = unwritten(N * K * R, dtype), dt = unwritten(K * N * R, dtype);
  auto dbefore = unwritten(a.state ? N * R : 0, dtype);
  auto dstate = unwritten(a.state ? room : 0), dmixed_0 = unwritten(room), dmixed_1 = dmixed_0;
  auto dD = unwritten(D.size());
  auto dQ = unwritten(Q.size()), db = unwritten(b.size()), dU = unwritten(U.size());
  AdaptersBackwardParams q{};
  set(q);
  q.dS = dS.data(), q.dcarry = a.carry ? dcarry.data() : nullptr;
  q.u = a.state ? u.data() : t.data(), q.S = S_again.data(), q.dt = dt.data();
  q.dbefore = dbefore.data(), q.dstate = a.state ? dstate.data() : nullptr;
  q.dmixed[0] = dmixed_0.data(), q.dmixed[1] = dmixed_1.data();
  q.dD = a.side ? dD.data() : nullptr;
  q.dQ = dQ.data(), q.db = db.data(), q.dU = dU.data();
  const int64_t chunks = adapters_backward_chunks(q);
  auto partial_sums = unwritten(chunks * adapters_backward_sums(q));
  q.partial_sums = partial_sums.data();
  for (q.adapter = K - 1; q.adapter >= -1; --q.adapter) {
    in_pieces(chunks, [&](int64_t begin, int64_t end) { adapters_backward_cpu(q, begin, end); });
    adapters_backward_sum(q);
  }
  return {{"S", S},   {"u", u},   {"S of backward", S_again}, {"dt", dt}, {"dbefore", dbefore},
          {"dQ", dQ}, {"db", db}, {"dU", dU},                 {"dD", dD}, {"after", after}};
}

struct TapGradient {
  int64_t adapters, tokens, channels, rank;
  Storage storage;
};

inline std::vector<Result> run(const TapGradient& g, Dtype dtype) {
  random_state = 4;
  const int64_t K = g.adapters, C = g.channels, R = g.rank, N = g.tokens;
  const bool full = g.storage == Storage::kFull;
  const int64_t stored = g.storage == Storage::kInt4 ? (C + 1) / 2 : C;
  std::vector<Values> taps;
  std::vector<std::vector<float>> scales;
  std::vector<const void*> tap;
  std::vector<const float*> scale;
  for (int64_t k = 0; k < K; ++k) {
    taps.push_back(full ? values(N * C, dtype) : Values(N * stored));
    if (!full)
      for (char& code : taps.back()) {
        random_float();
        code = char(random_state >> 24 & (g.storage == Storage::kFp8 ? 0xf7 : 0xff));  // no NaN of fp8
      }
    tap.push_back(taps.back().data());
    scales.push_back(weights(full ? 0 : N, 1.0f));
    if (!full) scale.push_back(scales.back().data());
  }
  const auto dt = values(K * N * R, dtype);
  auto dP = unwritten(K * C * R);
  TapGradientParams p{tap.data(), scale.data(), dt.data(), nullptr, dP.data(),
                      dtype,      g.storage,       K,         N,       C,         R};
  auto partial_sums = unwritten(tap_gradient_items(p) * R * C);
  p.partial_sums = partial_sums.data();
  in_pieces(tap_gradient_items(p), [&](int64_t begin, int64_t end) {
    tap_gradient_cpu(p, begin, end);
  });
  in_pieces(K, [&](int64_t begin, int64_t end) { tap_gradient_sum(p, begin, end); });
  return {{"dP", dP}};
}

// Calls check(a case, its name) for each.
template <typename Check>
void for_each_case(Check check) {
  for (const Attention& a : {
           Attention{1, 1, 1, 1, 1, 1, 0},
           Attention{1, 1, 1, 1, 32, 1, 0},
           Attention{2, 5, 4, 2, 32, 7, 3},
           Attention{1, 13, 8, 3, 17, 7, 3},
           Attention{1, 14, 9, 2, 32, 7, 0},
           Attention{1, 13, 12, 1, 32, 12, 6},
       })
    check(a, "window_attention of " + std::to_string(a.height) + " × " + std::to_string(a.width) +
                 ", window " + std::to_string(a.window));

  struct Size {
    int64_t tokens, channels, rank;
  };
  for (const Storage storage : {Storage::kFull, Storage::kFp8, Storage::kInt8, Storage::kInt4}) {
    const std::string kept = ", tap " + std::to_string(int(storage));
    for (const Size& s : {Size{1, 1, 1}, Size{11, 24, 5}, Size{61, 37, 16}, Size{97, 96, 20}})
      for (const bool norm_tap : {false, true})
        for (const bool norm : {false, true})
          check(Sublayer{s.tokens, s.channels, s.rank, storage, norm, norm_tap},
                "sublayer_epilogue of " + std::to_string(s.channels) + " channels" + kept +
                    (norm_tap ? " of the norm" : ""));
    for (const Size& s :
         {Size{1, 1, 1}, Size{11, 24, 5}, Size{61, 37, 16}, Size{523, 70, 20}, Size{65, 64, 16}})
      check(TapGradient{s.tokens == 1 ? 1 : 2, s.tokens, s.channels, s.rank, storage},
            "tap_gradient of " + std::to_string(s.tokens) + " tokens, " +
                std::to_string(s.channels) + " channels" + kept);
  }
  check(Sublayer{11, 24, 0, Storage::kFull, true, false}, "sublayer_epilogue without an adapter");
  check(Sublayer{11, 24, 0, Storage::kFull, false, false}, "sublayer_epilogue of a sum alone");

  for (const Adapters& a : {
           Adapters{1, 1, 1, 1, 1, 1, 0, false, false},
           Adapters{1, 1, 1, 1, 1, 1, 3, true, true},
           Adapters{2, 1, 1, 11, 5, 12, 0, false, false},
           Adapters{3, 2, 5, 6, 16, 33, 3, true, false},
           Adapters{2, 1, 7, 9, 20, 48, 7, true, true},
           Adapters{2, 2, 13, 13, 16, 32, 3, false, false},
           Adapters{3, 3, 12, 9, 24, 70, 5, true, true},
           Adapters{2, 1, 2, 50, 33, 20, 0, true, true},
       })
    check(a, "adapters of rank " + std::to_string(a.rank) + ", side " + std::to_string(a.side) +
                 (a.state ? a.carry ? ", carrying a state" : ", a state" : ""));
}
