#include "pack.h"

#include "weight.h"
#define LANES_16 0
#define ISA_NAME "plain"

namespace wherry {
namespace {
#include "isa_plain.h"
#include "rows.inl"
#include "kernels.inl"
#include "attention.inl"
}  // namespace
extern const Kernels* const kernels_plain;
const Kernels* const kernels_plain = &TABLE;
}  // namespace wherry
