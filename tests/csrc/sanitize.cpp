// Runs every CPU kernel by this processor's instructions, to be compiled with address and
// undefined-behaviour sanitizers, which end it. It fails, too, where a value is not finite or was
// not written.
#include <cstdio>

#include "cases.h"

namespace {

int failures = 0;

void check(const std::vector<Result>& results, Dtype dtype, const std::string& name) {
  for (const Result& result : results) {
    bool fine = finite(result.stored, dtype);
    for (float value : result.values) fine = fine && std::isfinite(value);
    if (fine) continue;
    std::fprintf(stderr, "%s: %s is not finite\n", name.c_str(), result.name.c_str());
    ++failures;
  }
}

void check(const SublayerResults& all, Dtype dtype, const std::string& name) {
  check(all.results, dtype, name);
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16})
    for_each_case(
        [&](const auto& a, const std::string& name) { check(run(a, dtype), dtype, name); });
  return failures > 0;
}
