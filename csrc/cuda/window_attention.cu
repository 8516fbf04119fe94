// Window attention on a GPU, a block per window and head, nothing rolled, padded or partitioned. In
// 16 bits on tensor cores: the scores of a query stay in registers, for a softmax in fp32. Plainly
// otherwise: a thread per query, fp32 arithmetic, softmax online over the keys.
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../window_index.h"
#include "tensor_cores.cuh"
#include "window_attention.h"

namespace {

constexpr int kHeadDim = 32;  // of every published Swin
constexpr float kScale = 0.17677669529663687f;  // 1 / sqrt(kHeadDim)
constexpr float kMasked = -100.0f;
constexpr float kLog2E = 1.4426950408889634f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float* out, float x) { *out = x; }
__device__ void store(__half* out, float x) { *out = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

// What a block works on. Heads vary fastest: blocks that run at once read neighbouring channels.
struct Work {
  const WindowAxis &rows, &columns;
  int head, wi, wj, image;

  __device__ Work(const WindowAxis& rows, const WindowAxis& columns, int64_t heads)
      : rows(rows), columns(columns) {
    unsigned rest = blockIdx.x;  // 32 bits: 64-bit division is slow
    head = rest % unsigned(heads), rest /= unsigned(heads);
    wj = rest % unsigned(columns.windows), rest /= unsigned(columns.windows);
    wi = rest % unsigned(rows.windows), image = rest / unsigned(rows.windows);
  }

  // The token of the batch's maps at place (i, j) of the window; -1: padding.
  __device__ int64_t token(int i, int j) const {
    const int64_t row = rows.position(wi, i), column = columns.position(wj, j);
    return row < rows.size && column < columns.size
               ? (image * rows.size + row) * columns.size + column
               : -1;
  }

  __device__ int region(int i, int j) const {
    return rows.region(wi, i) * 3 + columns.region(wj, j);
  }
};

template <typename T>
__global__ void plain_kernel(WindowAttentionParams p, WindowAxis rows, WindowAxis columns) {
  extern __shared__ float shared[];
  const Work work(rows, columns, p.heads);
  const int window = int(p.window), tokens = window * window;
  const int64_t C = p.heads * kHeadDim;
  float* keys = shared;                      // [tokens, kHeadDim]
  float* values = keys + tokens * kHeadDim;  // [tokens, kHeadDim]
  const T* qkv = static_cast<const T*>(p.qkv);
  const T* qkv_bias = static_cast<const T*>(p.qkv_bias);
  const T* position_bias = static_cast<const T*>(p.position_bias);

  // Channel c of part 0 (query), 1 (key) or 2 (value): the bias alone where the map is padded.
  auto load = [&](int64_t token, int part, int c) {
    const int64_t channel = part * C + work.head * kHeadDim + c;
    return to_float(token < 0 ? qkv_bias[channel] : qkv[token * 3 * C + channel]);
  };

  for (int i = threadIdx.x; i < tokens * kHeadDim; i += blockDim.x) {
    const int64_t token = work.token(i / kHeadDim / window, i / kHeadDim % window);
    keys[i] = load(token, 1, i % kHeadDim);
    values[i] = load(token, 2, i % kHeadDim);
  }
  __syncthreads();

  const int query = threadIdx.x, qi = query / window, qj = query % window;
  if (query >= tokens) return;
  const int64_t token = work.token(qi, qj);
  if (token < 0) return;
  float q[kHeadDim], sum[kHeadDim];
#pragma unroll
  for (int c = 0; c < kHeadDim; ++c) {
    q[c] = load(token, 0, c) * kScale;
    sum[c] = 0.0f;
  }
  const int own = work.region(qi, qj);
  float top = -INFINITY, total = 0.0f;
  for (int key = 0; key < tokens; ++key) {
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < kHeadDim; ++c) score += q[c] * keys[key * kHeadDim + c];
    const int ki = key / window, kj = key % window;
    const int64_t row = position_bias_row(window, qi, qj, ki, kj);
    score += to_float(position_bias[row * p.heads + work.head]);
    if (work.region(ki, kj) != own) score += kMasked;
    const float higher = fmaxf(top, score);
    const float keep = expf(top - higher), weight = expf(score - higher);
    total = total * keep + weight;
    top = higher;
#pragma unroll
    for (int c = 0; c < kHeadDim; ++c) {
      sum[c] = sum[c] * keep + weight * values[key * kHeadDim + c];
    }
  }
  T* out = static_cast<T*>(p.out) + token * C + work.head * kHeadDim;
  const float inverse = 1.0f / total;
#pragma unroll
  for (int c = 0; c < kHeadDim; ++c) store(out + c, sum[c] * inverse);
}

// Two values as T, the first in the low half.
template <typename T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// exp2f, without its care for results below 2^-126.
__device__ float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ float max_of_four_lanes(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// A warp per 16 places, and of windows of 12 × 12 per 48: 9 warps would take so many registers that
// a multiprocessor had room for one block alone, with nothing to do while it loads. Of 3, 5 fit.
__host__ __device__ constexpr int threads_of(int side) {
  return side == 12 ? 96 : 2 * side * side;
}

// Windows of up to kSide × kSide; each warp takes 16 queries at a time. The order of channels means
// nothing to q · k, nor that of v's to the weights: here lane 4g + t holds channels 8t … 8t + 7
// wherever a fragment has columns 2t and 2t + 1, so that 16 bytes at a time go to and from memory.
template <typename T, int kSide>
__global__ void __launch_bounds__(threads_of(kSide), kSide == 12 ? 5 : 0)
    tensor_core_kernel(WindowAttentionParams p, WindowAxis rows, WindowAxis columns) {
  constexpr int kPlaces = kSide * kSide, kMostRows = (2 * kSide - 1) * (2 * kSide - 1);
  constexpr int kThreads = threads_of(kSide), kLoads = kPlaces * 4 / kThreads;
  constexpr int kBeyond = -2;  // the window, as -1 is beyond the map
  __shared__ uint4 keys[kPlaces][kHeadDim / 8];
  // Pair t of tile j is channels 8t + 2j and the next; 16 bytes between rows part their banks.
  __shared__ __align__(16) uint32_t values[kPlaces][kHeadDim / 2 + 4];
  __shared__ float bias[kMostRows + 2 * kSide * (kSide - 1) + 1];
  __shared__ __align__(8) int offsets[kPlaces], regions[kPlaces];
  __shared__ int tokens[kPlaces];

  const Work work(rows, columns, p.heads);
  const int window = int(p.window);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t C = p.heads * kHeadDim, channel = work.head * kHeadDim + 8 * t;

  // A query and a key meet in row middle - offset of the query + offset of the key of the bias; with
  // a key beyond the window, in one of the middle + 1 rows added below, which are -inf.
  const int bias_rows = (2 * window - 1) * (2 * window - 1), middle = 2 * window * (window - 1);
  int region = 0;
#pragma unroll 1
  for (unsigned place = threadIdx.x; place < kPlaces; place += kThreads) {
    const int i = place / unsigned(window), j = place % unsigned(window);
    const bool inside = i < window;
    offsets[place] = inside ? -i * (2 * window - 1) - j : bias_rows - middle;
    regions[place] = inside ? work.region(i, j) : 0;
    tokens[place] = inside ? int(work.token(i, j)) : kBeyond;  // no memory holds 2^31
    region |= regions[place];
  }
  const bool mixed = __syncthreads_or(region);  // where regions differ, one is not 0

  const T* qkv = static_cast<const T*>(p.qkv) + channel;
  const T* qkv_bias = static_cast<const T*>(p.qkv_bias) + channel;
  const T* position_bias = static_cast<const T*>(p.position_bias);
  auto load_query = [&](int place) {  // zeros off the map
    const T* x = qkv + 3ll * tokens[place] * C;
    return tokens[place] < 0 ? uint4{} : __ldg(reinterpret_cast<const uint4*>(x));
  };
  auto load = [&](int place, int part) {  // the bias alone where padded, zeros beyond the window
    const T* x = (tokens[place] < 0 ? qkv_bias : qkv + 3ll * tokens[place] * C) + part * C;
    return tokens[place] == kBeyond ? uint4{} : __ldg(reinterpret_cast<const uint4*>(x));
  };
  uint4 k[kLoads], v[kLoads];  // all under way before the first is stored
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    k[i] = load((threadIdx.x + i * kThreads) / 4, 1);
    v[i] = load((threadIdx.x + i * kThreads) / 4, 2);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < bias_rows + middle + 1; i += kThreads) {
    const T* x = position_bias + i * p.heads + work.head;
    bias[i] = i < bias_rows ? to_float(*x) * (1.0f / kScale) : -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int place = (threadIdx.x + i * kThreads) / 4;
    keys[place][t] = k[i];
    values[place][t] = v[i].x;
    values[place][4 + t] = v[i].y;
    values[place][8 + t] = v[i].z;
    values[place][12 + t] = v[i].w;
  }
  __syncthreads();

#pragma unroll 1
  for (int first = threadIdx.x / 32 * 16; first < window * window; first += kThreads / 2) {
    const int query[2] = {first + g, first + g + 8};
    const uint4 q[2] = {load_query(query[0]), load_query(query[1])};
    const uint32_t q_fragments[2][4] = {{q[0].x, q[1].x, q[0].y, q[1].y},
                                        {q[0].z, q[1].z, q[0].w, q[1].w}};
    const float* row[2] = {bias + middle - min(offsets[query[0]], 0),
                           bias + middle - min(offsets[query[1]], 0)};
    float s[kPlaces / 8][4];  // scores / kScale
#pragma unroll
    for (int tile = 0; tile < kPlaces / 8; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[tile][i] = row[i / 2][offsets[8 * tile + 2 * t + i % 2]];
    if (mixed) {
      const int own[2] = {regions[query[0]], regions[query[1]]};
#pragma unroll
      for (int tile = 0; tile < kPlaces / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (regions[8 * tile + 2 * t + i % 2] != own[i / 2]) s[tile][i] += kMasked / kScale;
    }
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int tile = 0; tile < kPlaces / 8; ++tile) {
      const uint4 key = keys[8 * tile + g][t];
      mma<T>(s[tile], q_fragments[0], {key.x, key.y});
      mma<T>(s[tile], q_fragments[1], {key.z, key.w});
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[tile][i]);
    }

    float total[2] = {};
    uint32_t weights[kPlaces / 16][4];  // a fragment for every 16 keys
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = max_of_four_lanes(top[i]) * (kScale * kLog2E);
#pragma unroll
    for (int tile = 0; tile < kPlaces / 8; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float left = exp2_flushed(s[tile][2 * i] * (kScale * kLog2E) - top[i]);
        const float right = exp2_flushed(s[tile][2 * i + 1] * (kScale * kLog2E) - top[i]);
        total[i] += left + right;
        weights[tile / 2][tile % 2 * 2 + i] = pack<T>(left, right);
      }

    float sum[kHeadDim / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kPlaces / 16; ++step)
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; tile += 2) {
        uint32_t value[4];
        load_transposed(value, &values[16 * step + lane % 16][4 * (tile + lane / 16)]);
        mma<T>(sum[tile], weights[step], {value[0], value[1]});
        mma<T>(sum[tile + 1], weights[step], {value[2], value[3]});
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = 1.0f / sum_of_four_lanes(total[i]);
      uint32_t out[4];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
        out[tile] = pack<T>(sum[tile][2 * i] * inverse, sum[tile][2 * i + 1] * inverse);
      if (const int token = tokens[query[i]]; token >= 0) {
        T* to = static_cast<T*>(p.out) + token * C + channel;
        *reinterpret_cast<uint4*>(to) = {out[0], out[1], out[2], out[3]};
      }
    }
  }
}

template <typename T>
const char* launch(const WindowAttentionParams& p, cudaStream_t stream) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const unsigned blocks = unsigned(p.batch * rows.windows * columns.windows * p.heads);
  const unsigned tokens = unsigned(p.window * p.window);
  auto kernel = plain_kernel<T>;
  unsigned threads = (tokens + 31) / 32 * 32;
  size_t shared = 2 * tokens * kHeadDim * sizeof(float);
  if constexpr (kTensorCores<T> > 0) {
    const unsigned side = p.window <= 4 ? 4 : p.window <= 8 ? 8 : 12;
    const auto faster = side == 4   ? tensor_core_kernel<T, 4>
                        : side == 8 ? tensor_core_kernel<T, 8>
                                    : tensor_core_kernel<T, 12>;
    cudaFuncAttributes code;  // a GPU may run PTX that was made for an older one
    const cudaError_t error = cudaFuncGetAttributes(&code, faster);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const uintptr_t pointers = uintptr_t(p.qkv) | uintptr_t(p.qkv_bias) | uintptr_t(p.out);
    const bool aligned = pointers % sizeof(uint4) == 0;
    if (aligned && code.ptxVersion >= kTensorCores<T>) {
      kernel = faster;
      threads = threads_of(side);
      shared = 0;
    }
  }
  kernel<<<blocks, threads, shared, stream>>>(p, rows, columns);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* window_attention_cuda(const WindowAttentionParams& p, void* stream) {
  if (p.head_dim != kHeadDim) return "head_dim must be 32";
  if (p.window > 12) return "window must be at most 12";
  if (p.batch * p.height * p.width == 0) return nullptr;
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
