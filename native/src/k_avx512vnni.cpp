#include <immintrin.h>

#include "weight.h"
#define LANES_16 1
#define ISA_NAME "avx512vnni"

namespace wherry {
namespace {
#include "isa_avx512.h"
#include "rows.inl"
#include "kernels.inl"
#include "attention.inl"
}  // namespace
extern const Kernels* const kernels_avx512vnni;
const Kernels* const kernels_avx512vnni = &TABLE;
}  // namespace wherry
