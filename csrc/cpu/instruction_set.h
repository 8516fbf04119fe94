#pragma once

// In the order of what they include.
enum class InstructionSet { kDefault, kAvx2, kAvx512, kTiles };

// The largest that this processor, the system and ATEN_CPU_CAPABILITY ("default", "avx2" or
// "avx512", as PyTorch's own kernels obey it) allow; asked for once.
InstructionSet instruction_set();
