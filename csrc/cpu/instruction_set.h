#pragma once

// In the order of what they include.
// kDots: dot products of bfloat16 in vectors (AVX512_BF16); kTiles: in tiles (AMX).
enum class InstructionSet { kDefault, kAvx2, kAvx512, kDots, kTiles };

// The largest that this processor, the system and ATEN_CPU_CAPABILITY ("default", "avx2" or
// "avx512", as PyTorch's own kernels obey it, or "avx512_bf16") allow; asked for once.
InstructionSet instruction_set();
