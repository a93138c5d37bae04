// Which kernels this processor can run. Built without an instruction set: its pointer is not there.
#include "weight.h"

namespace wherry {
extern const Kernels* const kernels_plain;
#ifdef WHERRY_X86
extern const Kernels *const kernels_avx2, *const kernels_avxvnni, *const kernels_avx512vnni, *const kernels_avx512bf16;
#endif

namespace {
const char* const NAMES[] = {"plain", "avx2", "avxvnni", "avx512vnni", "avx512bf16"};
}

int isa_count() { return int(sizeof NAMES / sizeof *NAMES); }
const char* isa_name(int i) { return NAMES[i]; }

const Kernels* isa(int i) {
    if (i == 0) return kernels_plain;
#ifdef WHERRY_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("bmi2");
    bool wide = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni");
    if (i == 1 && avx2) return kernels_avx2;
    if (i == 2 && avx2 && __builtin_cpu_supports("avxvnni")) return kernels_avxvnni;
    if (i == 3 && wide) return kernels_avx512vnni;
    if (i == 4 && wide && __builtin_cpu_supports("avx512bf16")) return kernels_avx512bf16;
#endif
    return nullptr;
}

const Kernels* best_isa() {
    int best = isa_count() - 1;
#ifdef WHERRY_X86
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel")) best--;  // one product of bf16 pairs takes four times as long as an FMA there
#endif
    for (int i = best; i > 0; i--)
        if (const Kernels* k = isa(i)) return k;
    return kernels_plain;
}

}  // namespace wherry
