// The one file with torch headers: registers the kernels as e3va_native ops, over LibTorch's stable
// ABI, so that a build serves every torch from the targeted version on.
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/adapters.h"
#include "cpu/adapters_backward.h"
#include "cpu/sublayer_epilogue.h"
#include "cpu/tap_gradient.h"
#include "cpu/window_attention.h"
#ifdef E3VA_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/window_attention.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "the compiled kernels take float32, float16 or bfloat16");
  }
}

// Shapes are checked by e3va.ops.window_attention; what would be read out of bounds, here too.
WindowAttentionParams window_attention_params(
    const Tensor& qkv, const Tensor& qkv_bias, const Tensor& position_bias, const Tensor& out,
    int64_t window, int64_t shift) {
  STD_TORCH_CHECK(qkv.is_contiguous() && qkv_bias.is_contiguous() && position_bias.is_contiguous(),
                  "window_attention: inputs must be contiguous");
  STD_TORCH_CHECK(qkv_bias.scalar_type() == qkv.scalar_type() &&
                      position_bias.scalar_type() == qkv.scalar_type(),
                  "window_attention: biases must be of qkv's dtype");
  STD_TORCH_CHECK(qkv_bias.device() == qkv.device() && position_bias.device() == qkv.device(),
                  "window_attention: inputs must be on one device");
  const int64_t heads = position_bias.size(1), channels = qkv.size(3) / 3;
  STD_TORCH_CHECK(heads > 0 && qkv.size(3) == 3 * channels && channels % heads == 0 &&
                      qkv_bias.size(0) == 3 * channels && 0 <= shift && shift < window &&
                      position_bias.size(0) == (2 * window - 1) * (2 * window - 1),
                  "window_attention: shapes do not fit");
  return {qkv.const_data_ptr(),
          qkv_bias.const_data_ptr(),
          position_bias.const_data_ptr(),
          out.mutable_data_ptr(),
          dtype_of(qkv),
          qkv.size(0),
          qkv.size(1),
          qkv.size(2),
          heads,
          channels / heads,
          window,
          shift};
}

Tensor window_attention_out(const Tensor& qkv) {
  return torch::stable::new_empty(
      qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
}

Tensor window_attention_on_cpu(
    Tensor qkv, Tensor qkv_bias, Tensor position_bias, int64_t window, int64_t shift) {
  Tensor out = window_attention_out(qkv);
  const auto params = window_attention_params(qkv, qkv_bias, position_bias, out, window, shift);
  torch::stable::parallel_for(
      0, window_attention_items(params), 8,
      [&](int64_t begin, int64_t end) { window_attention_cpu(params, begin, end); });
  return out;
}

const float* weight(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == int64_t(shape.size()) && tensor.is_contiguous() &&
              tensor.scalar_type() == ScalarType::Float;
  for (int64_t i = 0; fits && i < tensor.dim(); ++i) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "weights must be contiguous float32 of shapes that fit");
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* gradient(const Tensor& tensor, const Tensor& parameter) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float &&
                      tensor.numel() == parameter.numel(),
                  "gradients must be contiguous float32, as large as their parameters");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

Storage storage_of(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number <= int64_t(Storage::kInt4), "storage must be in [0, 3]");
  return Storage(number);
}

// z, t, kept and scale are empty where they are not asked for.
Tensor sublayer_epilogue_on_cpu(
    Tensor x, Tensor y, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
    double eps, std::optional<Tensor> P, bool norm_tap, int64_t storage, int64_t seed, Tensor z,
    Tensor t, Tensor kept, Tensor scale) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.is_contiguous() && y.is_contiguous() &&
                      x.numel() == y.numel() && x.scalar_type() == y.scalar_type(),
                  "sublayer_epilogue: x and y must be contiguous and alike");
  STD_TORCH_CHECK(z.scalar_type() == x.scalar_type() && z.is_contiguous() &&
                      (z.numel() == 0 || z.numel() == x.numel()),
                  "sublayer_epilogue: z must be empty or like x");
  const int64_t channels = x.size(x.dim() - 1), rank = P ? P->size(1) : 0;
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  Tensor y_out = torch::stable::empty_like(y);
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == x.scalar_type() &&
                      t.numel() == tokens * rank && kept.is_contiguous() && scale.is_contiguous(),
                  "sublayer_epilogue: t, kept and scale must be contiguous and fit");
  const bool norm = norm_weight.has_value();
  const SublayerEpilogueParams params{
      x.const_data_ptr(),
      y.const_data_ptr(),
      norm ? weight(*norm_weight, {channels}) : nullptr,
      norm ? weight(norm_bias.value(), {channels}) : nullptr,
      P ? weight(*P, {channels, rank}) : nullptr,
      y_out.mutable_data_ptr(),
      z.numel() ? z.mutable_data_ptr() : nullptr,
      t.mutable_data_ptr(),
      static_cast<uint8_t*>(kept.mutable_data_ptr()),
      static_cast<float*>(scale.mutable_data_ptr()),
      dtype_of(x),
      norm_tap,
      storage_of(storage),
      uint32_t(seed),
      tokens,
      channels,
      rank,
      float(eps)};
  torch::stable::parallel_for(
      0, sublayer_epilogue_items(params), 1,
      [&](int64_t begin, int64_t end) { sublayer_epilogue_cpu(params, begin, end); });
  return y_out;
}

// A contiguous tensor of `like`'s dtype and of `numel` values.
const void* rows_of(const Tensor& tensor, const Tensor& like, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == like.scalar_type() &&
                      tensor.numel() == numel,
                  "adapters: tensors must be contiguous, of one dtype, and of sizes that fit");
  return tensor.const_data_ptr();
}

// What both passes are told of the parameters.
template <typename Params>
void set_adapters(
    Params& p, const Tensor& t, int64_t tokens, int64_t height, int64_t width,
    const std::optional<Tensor>& D, const std::optional<Tensor>& gamma, const Tensor& Q,
    const Tensor& b, const Tensor& U) {
  STD_TORCH_CHECK(Q.dim() == 3 && height > 0 && width > 0 && tokens % (height * width) == 0,
                  "adapters: Q and the map's size must fit");
  p.adapters = Q.size(0), p.rank = Q.size(1), p.hidden = Q.size(2);
  p.height = height, p.width = width, p.tokens = tokens;
  p.side = D ? D->size(3) : 0;
  p.D = D ? weight(*D, {p.adapters, p.rank, p.side, p.side}) : nullptr;
  p.gamma = gamma ? weight(*gamma, {p.adapters, p.rank}) : nullptr;
  p.Q = weight(Q, {p.adapters, p.rank, p.hidden});
  p.b = weight(b, {p.adapters, p.hidden});
  p.U = weight(U, {p.adapters, p.hidden, p.rank});
  p.dtype = dtype_of(t);
}

std::tuple<Tensor, Tensor, Tensor> adapters_on_cpu(
    Tensor t, std::optional<Tensor> carry, std::optional<Tensor> D, std::optional<Tensor> gamma,
    Tensor Q, Tensor b, Tensor U, int64_t height, int64_t width) {
  STD_TORCH_CHECK(t.dim() == 3, "adapters: t must be [adapters, tokens, rank]");
  const int64_t tokens = t.size(1);
  AdaptersParams p{};
  set_adapters(p, t, tokens, height, width, D, gamma, Q, b, U);
  p.t = rows_of(t, t, p.adapters * tokens * p.rank);
  p.carry = carry ? rows_of(*carry, t, tokens * p.rank) : nullptr;
  Tensor S = torch::stable::new_empty(t, {tokens, p.adapters * p.rank});
  Tensor u = gamma ? torch::stable::new_empty(t, {p.adapters, tokens, p.rank})
                   : torch::stable::new_empty(t, {0});
  Tensor after = gamma ? torch::stable::new_empty(t, {tokens, p.rank})
                       : torch::stable::new_empty(t, {0});
  Tensor state = torch::stable::new_empty(Q, {gamma ? tokens : 0, adapters_row(p.rank)});
  p.S = S.mutable_data_ptr();
  p.u = gamma ? u.mutable_data_ptr() : nullptr;
  p.after = after.mutable_data_ptr();
  p.state = static_cast<float*>(state.mutable_data_ptr());
  for (p.adapter = gamma ? -1 : 0; p.adapter < p.adapters; ++p.adapter)
    torch::stable::parallel_for(
        0, adapters_items(p), 1,
        [&](int64_t begin, int64_t end) { adapters_cpu(p, begin, end); });
  return {S, u, after};
}

// The last four are written to: gradients, as the parameters are; those that are not there, empty.
std::tuple<Tensor, Tensor, Tensor> adapters_backward_on_cpu(
    Tensor dS, std::optional<Tensor> dcarry, Tensor u, std::optional<Tensor> D,
    std::optional<Tensor> gamma, Tensor Q, Tensor b, Tensor U, int64_t height, int64_t width,
    Tensor dD, Tensor dQ, Tensor db, Tensor dU) {
  STD_TORCH_CHECK(dS.dim() == 2, "adapters_backward: dS must be [tokens, adapters * rank]");
  const int64_t tokens = dS.size(0);
  AdaptersBackwardParams p{};
  set_adapters(p, dS, tokens, height, width, D, gamma, Q, b, U);
  const int64_t rows = tokens * p.rank, room = tokens * adapters_row(p.rank);
  p.dS = rows_of(dS, dS, p.adapters * rows);
  p.dcarry = dcarry ? rows_of(*dcarry, dS, rows) : nullptr;
  p.u = rows_of(u, dS, p.adapters * rows);
  Tensor S = torch::stable::empty_like(dS);
  Tensor dt = torch::stable::new_empty(dS, {p.adapters, tokens, p.rank});
  Tensor dbefore = gamma ? torch::stable::new_empty(dS, {tokens, p.rank})
                         : torch::stable::new_empty(dS, {0});
  Tensor rooms = torch::stable::new_empty(Q, {gamma ? 3 : 2, room});
  float* first = static_cast<float*>(rooms.mutable_data_ptr());
  p.S = S.mutable_data_ptr();
  p.dt = dt.mutable_data_ptr();
  p.dbefore = dbefore.mutable_data_ptr();
  p.dmixed[0] = first;
  p.dmixed[1] = first + room;
  p.dstate = gamma ? first + 2 * room : nullptr;
  p.dD = D ? gradient(dD, *D) : nullptr;
  p.dQ = gradient(dQ, Q);
  p.db = gradient(db, b);
  p.dU = gradient(dU, U);
  const int64_t chunks = adapters_backward_chunks(p);
  Tensor partial_sums = torch::stable::new_empty(Q, {chunks, adapters_backward_sums(p)});
  p.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
  for (p.adapter = p.adapters - 1; p.adapter >= -1; --p.adapter) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      adapters_backward_cpu(p, begin, end);
    });
    adapters_backward_sum(p);
  }
  return {S, dt, dbefore};
}

Tensor tap_gradient_on_cpu(
    std::vector<Tensor> taps, std::vector<Tensor> scale, int64_t storage, Tensor dt,
    int64_t channels, Tensor like) {
  STD_TORCH_CHECK(dt.dim() == 3 && dt.is_contiguous() && int64_t(taps.size()) == dt.size(0),
                  "tap_gradient: dt must be contiguous, [taps, tokens, rank]");
  TapGradientParams p{};
  p.adapters = dt.size(0), p.tokens = dt.size(1), p.rank = dt.size(2), p.channels = channels;
  p.dt = dt.const_data_ptr();
  p.dtype = dtype_of(dt);
  p.storage = storage_of(storage);
  const bool full = p.storage == Storage::kFull;
  STD_TORCH_CHECK(full ? scale.empty() : scale.size() == taps.size(),
                  "tap_gradient: scales must go with the taps");
  const int64_t stored = p.storage == Storage::kInt4 ? (channels + 1) / 2 : channels;
  std::vector<const void*> rows;
  std::vector<const float*> scales;
  for (size_t k = 0; k < taps.size(); ++k) {
    STD_TORCH_CHECK(taps[k].is_contiguous() && taps[k].dim() == 2 && taps[k].size(0) == p.tokens &&
                        taps[k].size(1) == stored &&
                        (!full || taps[k].scalar_type() == dt.scalar_type()),
                    "tap_gradient: taps must be contiguous and fit dt and channels");
    rows.push_back(taps[k].const_data_ptr());
    if (!full) scales.push_back(weight(scale[k], {p.tokens}));
  }
  p.taps = rows.data();
  p.scale = scales.data();
  const int64_t items = tap_gradient_items(p);
  Tensor partial_sums = torch::stable::new_empty(like, {items, p.rank * channels});
  Tensor dP = torch::stable::new_empty(like, {p.adapters, channels, p.rank});
  p.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
  p.dP = static_cast<float*>(dP.mutable_data_ptr());
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    tap_gradient_cpu(p, begin, end);
  });
  torch::stable::parallel_for(0, p.adapters, 1, [&](int64_t begin, int64_t end) {
    tap_gradient_sum(p, begin, end);
  });
  return dP;
}

#ifdef E3VA_CUDA
Tensor window_attention_on_cuda(
    Tensor qkv, Tensor qkv_bias, Tensor position_bias, int64_t window, int64_t shift) {
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Tensor out = window_attention_out(qkv);
  const auto params = window_attention_params(qkv, qkv_bias, position_bias, out, window, shift);
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(qkv.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
      "window_attention: no current stream");
  const char* error = window_attention_cuda(params, stream);
  STD_TORCH_CHECK(error == nullptr, "window_attention: ", error);
  return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(e3va_native, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor qkv_bias, Tensor position_bias, int window, int shift) "
      "-> Tensor");
  m.def(
      "sublayer_epilogue(Tensor x, Tensor y, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor? P, bool norm_tap, int storage, int seed, Tensor(a!) z, Tensor(b!) t, Tensor(c!) kept, "
      "Tensor(d!) scale) -> Tensor");
  m.def(
      "adapters(Tensor t, Tensor? carry, Tensor? D, Tensor? gamma, Tensor Q, Tensor b, Tensor U, "
      "int height, int width) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adapters_backward(Tensor dS, Tensor? dcarry, Tensor u, Tensor? D, Tensor? gamma, Tensor Q, "
      "Tensor b, Tensor U, int height, int width, Tensor(a!) dD, Tensor(b!) dQ, Tensor(c!) db, "
      "Tensor(d!) dU) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tap_gradient(Tensor[] taps, Tensor[] scale, int storage, Tensor dt, int channels, Tensor like) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(e3va_native, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cpu));
  m.impl("sublayer_epilogue", TORCH_BOX(&sublayer_epilogue_on_cpu));
  m.impl("adapters", TORCH_BOX(&adapters_on_cpu));
  m.impl("adapters_backward", TORCH_BOX(&adapters_backward_on_cpu));
  m.impl("tap_gradient", TORCH_BOX(&tap_gradient_on_cpu));
}

#ifdef E3VA_CUDA
STABLE_TORCH_LIBRARY_IMPL(e3va_native, CUDA, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cuda));
}
#endif
