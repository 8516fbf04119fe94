#include "instruction_set.h"

#include <cstdlib>
#include <string_view>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __x86_64__
// AVX-512's dot products of bfloat16, and its conversions to it.
bool have_dots() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// AMX for bfloat16, which the system hands out on request.
bool have_tiles() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet detect() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view asked = variable ? variable : "";
  if (asked == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return InstructionSet::kDefault;
  if (asked == "avx2" || !__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return InstructionSet::kAvx2;
  if (asked == "avx512" || !have_dots()) return InstructionSet::kAvx512;
  return asked == "avx512_bf16" || !have_tiles() ? InstructionSet::kDots : InstructionSet::kTiles;
}
#else
InstructionSet detect() { return InstructionSet::kDefault; }
#endif

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet found = detect();
  return found;
}
