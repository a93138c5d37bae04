// From blocks of a file, or from plain codes, to panels. Nothing is rounded.
#pragma once
#include <string>

#include "memory.h"
#include "weight.h"

namespace wherry {

// Sizes and form for a ggml type; empty text, or why not.
std::string plan_blocks(Weight& w, int kind, int n, int k);
// The same for codes: unsigned bytes, w = scale * (code - zero) or scale * code + minimum.
std::string plan_codes(Weight& w, int bits, int group, bool min, int zero, bool exact_half, int n, int k);
size_t row_bytes(int kind, int k);  // 0: not a type that is read
void allocate(Weight& w, Memory& memory);  // throws std::bad_alloc
size_t bytes(const Weight& w);
// Rows [first, first + count) of the weight.
void fill_blocks(Weight& w, const uint8_t* data, int first, int count);
void fill_codes(Weight& w, const uint8_t* code, const float* scale, const float* minimum, int first, int count);
// One row back as floats [k].
void unpack_row(const Weight& w, int row, float* out);

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

}  // namespace wherry
