// Compares what the CPU kernels make of bfloat16 by dot products and in tiles, these instructions
// emulated, with what they make of it in vectors of fp32. Names what differs, and fails.
#include <cstdio>

#include "../../csrc/cpu/instruction_set.h"
#include "cases.h"

namespace {

InstructionSet chosen = InstructionSet::kDefault;
int failures = 0;

void fail(const std::string& name, const std::string& result, double error) {
  const char* set = chosen == InstructionSet::kTiles ? "tiles" : "dots";
  std::fprintf(stderr, "%s, in %s: %s differs by %.2g\n", name.c_str(), set, result.c_str(), error);
  ++failures;
}

void compare(
    const std::vector<Result>& wanted, const std::vector<Result>& got, const std::string& name) {
  constexpr double kTolerance = 1e-2;  // of the norm
  for (size_t i = 0; i < wanted.size(); ++i) {
    const bool stored = wanted[i].values.empty();
    const auto a = stored ? widened(wanted[i].stored) : wanted[i].values;
    const auto b = stored ? widened(got[i].stored) : got[i].values;
    double size = 0, error = 0;
    for (size_t j = 0; j < a.size(); ++j) {
      size += double(a[j]) * a[j];
      error += (double(a[j]) - b[j]) * (double(a[j]) - b[j]);
    }
    if (a.size() != b.size() || !(std::sqrt(error) <= kTolerance * std::sqrt(size)))
      fail(name, wanted[i].name, std::sqrt(error / size));
  }
}

// Codes are the same where the tap is, which its norm is up to its rounding.
void compare(const SublayerResults& wanted, const SublayerResults& got, const std::string& name) {
  compare(wanted.results, got.results, name);
  const size_t tokens = wanted.scale.size();
  if (tokens == 0) return;
  const size_t width = wanted.tap.size() / tokens, stored = wanted.kept.size() / tokens;
  size_t same = 0;
  for (size_t i = 0; i < tokens; ++i) {
    if (std::memcmp(&wanted.tap[i * width], &got.tap[i * width], width)) continue;
    ++same;
    if (std::memcmp(&wanted.kept[i * stored], &got.kept[i * stored], stored) ||
        wanted.scale[i] != got.scale[i])
      fail(name, "the code of row " + std::to_string(i), 1);
  }
  if (2 * same < tokens) fail(name, "the norm of most rows", 1);
}

}  // namespace

InstructionSet instruction_set() { return chosen; }

int main() {
  for_each_case([](const auto& a, const std::string& name) {
    chosen = InstructionSet::kDefault;
    const auto wanted = run(a, Dtype::kBFloat16);
    for (const InstructionSet set : {InstructionSet::kDots, InstructionSet::kTiles}) {
      chosen = set;
      compare(wanted, run(a, Dtype::kBFloat16), name);
    }
  });
  return failures > 0;
}
