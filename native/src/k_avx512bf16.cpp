#include <immintrin.h>

#include "weight.h"
#define LANES_16 1
#define ISA_NAME "avx512bf16"

namespace wherry {
namespace {
#include "isa_avx512.h"
#include "rows.inl"
#include "kernels.inl"
#include "attention.inl"
}  // namespace
extern const Kernels* const kernels_avx512bf16;
const Kernels* const kernels_avx512bf16 = &TABLE;
}  // namespace wherry
