#include <immintrin.h>

#include "weight.h"
#define LANES_16 0
#define ISA_NAME "avx2"

namespace wherry {
namespace {
#include "isa_avx2.h"
#include "rows.inl"
#include "kernels.inl"
#include "attention.inl"
}  // namespace
extern const Kernels* const kernels_avx2;
const Kernels* const kernels_avx2 = &TABLE;
}  // namespace wherry
