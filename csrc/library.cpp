// The one file with torch headers: registers the kernels as e3va_native ops, over LibTorch's stable
// ABI, so that a build serves every torch from the targeted version on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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
      STD_TORCH_CHECK(false, "window_attention: qkv must be float32, float16 or bfloat16");
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
}

STABLE_TORCH_LIBRARY_IMPL(e3va_native, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cpu));
}

#ifdef E3VA_CUDA
STABLE_TORCH_LIBRARY_IMPL(e3va_native, CUDA, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention_on_cuda));
}
#endif
