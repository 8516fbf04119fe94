// The one file with torch headers: registers the kernels as e3va_native ops, over LibTorch's stable
// ABI, so that a build serves every torch from the targeted version on.
#include <initializer_list>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/highway_backward.h"
#include "cpu/sublayer_epilogue.h"
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
  STD_TORCH_CHECK(qkv_bias.scalar_type() == ScalarType::Float &&
                      position_bias.scalar_type() == ScalarType::Float,
                  "window_attention: biases must be float32");
  STD_TORCH_CHECK(qkv_bias.device() == qkv.device() && position_bias.device() == qkv.device(),
                  "window_attention: inputs must be on one device");
  const int64_t heads = position_bias.size(1), channels = qkv.size(3) / 3;
  STD_TORCH_CHECK(heads > 0 && qkv.size(3) == 3 * channels && channels % heads == 0 &&
                      qkv_bias.size(0) == 3 * channels && 0 <= shift && shift < window &&
                      position_bias.size(0) == (2 * window - 1) * (2 * window - 1),
                  "window_attention: shapes do not fit");
  return {qkv.const_data_ptr(),
          static_cast<const float*>(qkv_bias.const_data_ptr()),
          static_cast<const float*>(position_bias.const_data_ptr()),
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

Taps taps_of(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number <= int64_t(Taps::kInt4), "taps must be in [0, 3]");
  return Taps(number);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sublayer_epilogue_on_cpu(
    Tensor x, Tensor y, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
    double eps, std::optional<Tensor> P, std::optional<Tensor> Q, std::optional<Tensor> b,
    std::optional<Tensor> U, int64_t taps, int64_t seed, Tensor tap, Tensor tap_scale) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.is_contiguous() && y.is_contiguous() &&
                      x.numel() == y.numel() && x.scalar_type() == y.scalar_type(),
                  "sublayer_epilogue: x and y must be contiguous and alike");
  const bool norm = norm_weight.has_value(), adapter = Q.has_value();
  const int64_t channels = x.size(x.dim() - 1);
  const int64_t rank = adapter ? Q->size(0) : 0, hidden = adapter ? Q->size(1) : 0;
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  Tensor y_out = torch::stable::empty_like(y);
  Tensor z = norm ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  Tensor t = adapter ? torch::stable::new_empty(x, {tokens, rank})
                     : torch::stable::new_empty(x, {0});
  Tensor s = torch::stable::empty_like(t);
  const SublayerEpilogueParams params{x.const_data_ptr(),
                                      y.const_data_ptr(),
                                      norm ? weight(*norm_weight, {channels}) : nullptr,
                                      norm ? weight(norm_bias.value(), {channels}) : nullptr,
                                      adapter ? weight(P.value(), {channels, rank}) : nullptr,
                                      adapter ? weight(*Q, {rank, hidden}) : nullptr,
                                      adapter ? weight(b.value(), {hidden}) : nullptr,
                                      adapter ? weight(U.value(), {hidden, rank}) : nullptr,
                                      y_out.mutable_data_ptr(),
                                      z.mutable_data_ptr(),
                                      t.mutable_data_ptr(),
                                      s.mutable_data_ptr(),
                                      static_cast<uint8_t*>(tap.mutable_data_ptr()),
                                      static_cast<float*>(tap_scale.mutable_data_ptr()),
                                      dtype_of(x),
                                      taps_of(taps),
                                      uint32_t(seed),
                                      tokens,
                                      channels,
                                      rank,
                                      hidden,
                                      float(eps)};
  torch::stable::parallel_for(
      0, sublayer_epilogue_items(params), 1,
      [&](int64_t begin, int64_t end) { sublayer_epilogue_cpu(params, begin, end); });
  return {y_out, z, t, s};
}

// Columns [tap * rank, (tap + 1) * rank) of dS and S are this adapter's. Returns dPᵀ, dQ, dUᵀ
// and db, one after the other.
Tensor adapter_backward_on_cpu(
    Tensor x, std::optional<Tensor> scale, int64_t taps, Tensor t, Tensor dS, int64_t tap,
    int64_t channels, Tensor Q, Tensor b, Tensor U, Tensor S) {
  STD_TORCH_CHECK(t.dim() == 2 && dS.dim() == 2 && Q.dim() == 2 && x.dim() == 2 &&
                      t.is_contiguous() && x.is_contiguous(),
                  "adapter_backward: x, t, dS and Q must be matrices, x and t contiguous ones");
  const int64_t tokens = t.size(0), rank = t.size(1), hidden = Q.size(1), stride = dS.size(1);
  const Taps kept = taps_of(taps);
  STD_TORCH_CHECK(x.size(0) == tokens &&
                      x.size(1) == (kept == Taps::kInt4 ? (channels + 1) / 2 : channels) &&
                      (kept != Taps::kFull || x.scalar_type() == t.scalar_type()),
                  "adapter_backward: x must fit t, taps and channels");
  for (const Tensor& tensor : {dS, S})
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == t.scalar_type() &&
                        tensor.dim() == 2 && tensor.size(0) == tokens &&
                        tensor.size(1) == stride && 0 <= tap && (tap + 1) * rank <= stride,
                    "adapter_backward: dS and S must be contiguous [tokens, taps * rank]");
  const int64_t offset = tap * rank * (dtype_of(t) == Dtype::kFloat ? 4 : 2);
  AdapterBackwardParams params{x.const_data_ptr(),
                               kept == Taps::kFull ? nullptr : weight(scale.value(), {tokens}),
                               t.const_data_ptr(),
                               static_cast<const char*>(dS.const_data_ptr()) + offset,
                               weight(Q, {rank, hidden}),
                               weight(b, {hidden}),
                               weight(U, {hidden, rank}),
                               static_cast<char*>(S.mutable_data_ptr()) + offset,
                               nullptr,
                               dtype_of(t),
                               kept,
                               tokens,
                               channels,
                               rank,
                               hidden,
                               stride};
  const int64_t chunks = adapter_backward_chunks(params);
  const int64_t size = (channels + 2 * hidden) * rank + hidden;
  Tensor partial_sums = torch::stable::new_empty(Q, {chunks, size});
  params.partial_sums = static_cast<float*>(partial_sums.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    adapter_backward_cpu(params, begin, end);
  });
  Tensor sums = torch::stable::new_empty(Q, {size});
  adapter_backward_sum(params, static_cast<float*>(sums.mutable_data_ptr()));
  return sums;
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
      "Tensor? P, Tensor? Q, Tensor? b, Tensor? U, int taps, int seed, Tensor(a!) tap, "
      "Tensor(b!) tap_scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adapter_backward(Tensor x, Tensor? scale, int taps, Tensor t, Tensor dS, int tap, "
      "int channels, Tensor Q, Tensor b, Tensor U, Tensor(a!) S) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(e3va_native, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cpu));
  m.impl("sublayer_epilogue", TORCH_BOX(&sublayer_epilogue_on_cpu));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_on_cpu));
}

#ifdef E3VA_CUDA
STABLE_TORCH_LIBRARY_IMPL(e3va_native, CUDA, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cuda));
}
#endif
