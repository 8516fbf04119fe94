// Window attention on a GPU, plainly: a block per window and head, a thread per query, fp32
// arithmetic, keys and values of the window in shared memory, softmax online over the keys.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../window_index.h"
#include "window_attention.h"

namespace {

constexpr int kHeadDim = 32;  // of every published Swin
constexpr float kMasked = -100.0f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float* out, float x) { *out = x; }
__device__ void store(__half* out, float x) { *out = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

template <typename T>
__global__ void window_attention_kernel(WindowAttentionParams p) {
  extern __shared__ float shared[];
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const int64_t tokens = p.window * p.window, C = p.heads * kHeadDim;
  float* keys = shared;                       // [tokens, kHeadDim]
  float* values = keys + tokens * kHeadDim;   // [tokens, kHeadDim]
  const int64_t windows = rows.windows() * columns.windows();
  const int64_t window = blockIdx.x % windows, image = blockIdx.x / windows, head = blockIdx.y;
  const int64_t wi = window / columns.windows(), wj = window % columns.windows();
  const T* qkv = static_cast<const T*>(p.qkv);

  auto token = [&](int64_t t) -> int64_t {
    const int64_t i = rows.position(wi, t / p.window), j = columns.position(wj, t % p.window);
    return i < p.height && j < p.width ? (image * p.height + i) * p.width + j : -1;
  };
  auto region = [&](int64_t t) {
    return rows.region(wi, t / p.window) * 3 + columns.region(wj, t % p.window);
  };
  // Channel c of part 0 (query), 1 (key) or 2 (value): the bias alone where the map is padded.
  auto load = [&](int64_t position, int part, int64_t c) {
    const int64_t channel = part * C + head * kHeadDim + c;
    return position < 0 ? p.qkv_bias[channel] : to_float(qkv[position * 3 * C + channel]);
  };

  for (int64_t i = threadIdx.x; i < tokens * kHeadDim; i += blockDim.x) {
    const int64_t position = token(i / kHeadDim);
    keys[i] = load(position, 1, i % kHeadDim);
    values[i] = load(position, 2, i % kHeadDim);
  }
  __syncthreads();

  const int64_t query = threadIdx.x;
  if (query >= tokens) return;
  const int64_t position = token(query);
  if (position < 0) return;
  float q[kHeadDim], sum[kHeadDim];
#pragma unroll
  for (int c = 0; c < kHeadDim; ++c) {
    q[c] = load(position, 0, c) * 0.17677669529663687f;  // 1 / sqrt(kHeadDim)
    sum[c] = 0.0f;
  }
  const int own = region(query);
  float top = -INFINITY, total = 0.0f;
  for (int64_t key = 0; key < tokens; ++key) {
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < kHeadDim; ++c) score += q[c] * keys[key * kHeadDim + c];
    const int64_t row = position_bias_row(
        p.window, query / p.window, query % p.window, key / p.window, key % p.window);
    score += p.position_bias[row * p.heads + head];
    if (region(key) != own) score += kMasked;
    const float higher = fmaxf(top, score);
    const float keep = expf(top - higher), weight = expf(score - higher);
    total = total * keep + weight;
    top = higher;
#pragma unroll
    for (int c = 0; c < kHeadDim; ++c) {
      sum[c] = sum[c] * keep + weight * values[key * kHeadDim + c];
    }
  }
  T* out = static_cast<T*>(p.out) + position * C + head * kHeadDim;
  const float inverse = 1.0f / total;
#pragma unroll
  for (int c = 0; c < kHeadDim; ++c) store(out + c, sum[c] * inverse);
}

template <typename T>
const char* launch(const WindowAttentionParams& p, cudaStream_t stream) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const int64_t tokens = p.window * p.window;
  const dim3 blocks(unsigned(p.batch * rows.windows() * columns.windows()), unsigned(p.heads));
  const unsigned threads = unsigned((tokens + 31) / 32 * 32);
  const size_t shared = 2 * tokens * kHeadDim * sizeof(float);
  window_attention_kernel<T><<<blocks, threads, shared, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* window_attention_cuda(const WindowAttentionParams& p, void* stream) {
  if (p.head_dim != kHeadDim) return "head_dim must be 32";
  if (p.window > 12) return "window must be at most 12";
  if (p.batch == 0) return nullptr;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat:
      return launch<float>(p, on);
    case Dtype::kHalf:
      return launch<__half>(p, on);
    case Dtype::kBFloat16:
      return launch<__nv_bfloat16>(p, on);
  }
  return "unknown dtype";
}
