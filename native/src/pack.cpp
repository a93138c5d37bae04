#include "pack.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace wherry {
namespace {

enum : int { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12,
             Q5_K = 13, Q6_K = 14, BF16 = 30, TQ2_0 = 35 };

struct Type {
    int kind, inputs, bytes;  // of a block
    Form form;
    int bits, group, zero;
    bool min;
    Scales scales;
};

constexpr Type TYPES[] = {
    {F32, 1, 4, Form::f32, 0, 0, 0, false, Scales::f32},
    {F16, 1, 2, Form::f16, 0, 0, 0, false, Scales::f32},
    {BF16, 1, 2, Form::bf16, 0, 0, 0, false, Scales::f32},
    {Q4_0, 32, 18, Form::integer, 4, 32, 8, false, Scales::f16},
    {Q4_1, 32, 20, Form::integer, 4, 32, 0, true, Scales::f16},
    {Q5_0, 32, 22, Form::integer, 5, 32, 16, false, Scales::f16},
    {Q5_1, 32, 24, Form::integer, 5, 32, 0, true, Scales::f16},
    {Q8_0, 32, 34, Form::integer, 8, 32, 128, false, Scales::f16},
    {TQ2_0, 256, 66, Form::integer, 2, 256, 1, false, Scales::f16},
    {Q2_K, 256, 84, Form::integer, 2, 16, 0, true, Scales::super},
    {Q3_K, 256, 110, Form::integer, 3, 16, 4, false, Scales::super},
    {Q4_K, 256, 144, Form::integer, 4, 32, 0, true, Scales::super},
    {Q5_K, 256, 176, Form::integer, 5, 32, 0, true, Scales::super},
    {Q6_K, 256, 210, Form::integer, 6, 16, 32, false, Scales::super},
};

const Type* type_of(int kind) {
    for (const Type& t : TYPES)
        if (t.kind == kind) return &t;
    return nullptr;
}

uint16_t u16(const uint8_t* p) { uint16_t v; std::memcpy(&v, p, 2); return v; }

// One row of a file in the terms of its scales: codes, then per scale group either halves or 8-bit integers.
struct Row {
    std::vector<uint8_t> code;
    std::vector<uint16_t> d, m;      // Scales::f16: per group; Scales::super: per 256
    std::vector<float> fd, fm;       // Scales::f32
    std::vector<int8_t> sc, mn;      // Scales::super, per group
};

// The 6-bit scales and minimums of Q4_K and Q5_K. Source: ggml, get_scale_min_k4.
void six(const uint8_t* s, int j, int8_t& scale, int8_t& minimum) {
    if (j < 4) {
        scale = int8_t(s[j] & 63);
        minimum = int8_t(s[j + 4] & 63);
    } else {
        scale = int8_t((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        minimum = int8_t((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

void super_block(int kind, const uint8_t* b, uint8_t* q, Row& r, int at) {
    int8_t* sc = &r.sc[size_t(at) * (kind == Q4_K || kind == Q5_K ? 8 : 16)];
    int8_t* mn = r.mn.empty() ? nullptr : &r.mn[size_t(at) * (kind == Q2_K ? 16 : 8)];
    switch (kind) {
        case Q2_K:  // scales 16, qs 64, d, dmin
            for (int j = 0; j < 16; j++) sc[j] = int8_t(b[j] & 15), mn[j] = int8_t(b[j] >> 4);
            for (int i = 0; i < SUPER; i++) q[i] = (b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
            r.d[at] = u16(b + 80), r.m[at] = u16(b + 82);
            break;
        case Q3_K: {  // hmask 32, qs 64, scales 12, d
            const uint8_t* s = b + 96;
            for (int j = 0; j < 16; j++) {
                int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
                sc[j] = int8_t((low | ((s[8 + j % 4] >> (j / 4 * 2)) & 3) << 4) - 32);
            }
            for (int i = 0; i < SUPER; i++) {
                int low = (b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
                q[i] = uint8_t(low | ((b[i % 32] >> (i / 32)) & 1) << 2);
            }
            r.d[at] = u16(b + 108);
            break;
        }
        case Q4_K:  // d, dmin, scales 12, qs 128
        case Q5_K: {  // d, dmin, scales 12, qh 32, qs 128
            r.d[at] = u16(b), r.m[at] = u16(b + 2);
            for (int j = 0; j < 8; j++) six(b + 4, j, sc[j], mn[j]);
            const uint8_t* low = b + (kind == Q4_K ? 16 : 48);
            for (int i = 0; i < SUPER; i++) {
                uint8_t v = low[i / 64 * 32 + i % 32];
                q[i] = uint8_t(i % 64 < 32 ? v & 15 : v >> 4);
                if (kind == Q5_K) q[i] = uint8_t(q[i] | ((b[16 + i % 32] >> (i / 32)) & 1) << 4);
            }
            break;
        }
        default:  // Q6_K: ql 128, qh 64, scales 16, d
            for (int i = 0; i < SUPER; i++) {
                int j = i % 128, l = j % 32;
                uint8_t v = b[i / 128 * 64 + l + (j / 32 % 2) * 32];
                int low = j < 64 ? v & 15 : v >> 4;
                q[i] = uint8_t(low | ((b[128 + i / 128 * 32 + l] >> (j / 32 * 2)) & 3) << 4);
            }
            std::memcpy(sc, b + 192, 16);
            r.d[at] = u16(b + 208);
    }
}

void read_row(const Weight& w, const Type& t, const uint8_t* data, Row& r) {
    for (int i = 0; i < w.k / t.inputs; i++, data += t.bytes) {
        uint8_t* q = &r.code[size_t(i) * t.inputs];
        if (t.scales == Scales::super) {
            super_block(t.kind, data, q, r, i);
            continue;
        }
        if (t.kind == TQ2_0) {  // qs 64, d
            for (int j = 0; j < 256; j++) q[j] = uint8_t((data[j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2)) & 3);
            r.d[i] = u16(data + 64);
            continue;
        }
        r.d[i] = u16(data);
        if (t.min) r.m[i] = u16(data + 2);
        const uint8_t* p = data + (t.min ? 4 : 2);
        if (t.kind == Q8_0) {
            for (int j = 0; j < 32; j++) q[j] = uint8_t(p[j] ^ 128);
            continue;
        }
        uint32_t high = 0;
        if (t.bits == 5) std::memcpy(&high, p, 4), p += 4;
        for (int j = 0; j < 32; j++)
            q[j] = uint8_t((j < 16 ? p[j] & 15 : p[j - 16] >> 4) | ((high >> j) & 1) << 4);
    }
}

// One code into its panel: see weight.h for the places of bits.
void put(const Weight& w, uint8_t* panel, int row, int input, int value) {
    uint8_t* g = panel + size_t(input / GROUP) * 64 * w.bits;
    int j = input % GROUP / 4, lane = row * 4 + input % 4, done = 0;
    for (int width : {8, 4, 2, 1}) {
        if (!(w.bits & width)) continue;
        int chunks = width;  // a plane of `width` bits has `width` chunks of 64 bytes
        int part = (value >> done) & ((1 << width) - 1);
        g[j % chunks * 64 + lane] = uint8_t(g[j % chunks * 64 + lane] | part << (j / chunks * width));
        g += chunks * 64;
        done += width;
    }
}

int get(const Weight& w, const uint8_t* panel, int row, int input) {
    const uint8_t* g = panel + size_t(input / GROUP) * 64 * w.bits;
    int j = input % GROUP / 4, lane = row * 4 + input % 4, done = 0, value = 0;
    for (int width : {8, 4, 2, 1}) {
        if (!(w.bits & width)) continue;
        value |= ((g[j % width * 64 + lane] >> (j / width * width)) & ((1 << width) - 1)) << done;
        g += width * 64;
        done += width;
    }
    return value;
}

size_t element(Form f) { return f == Form::f32 ? 4 : 2; }

void put_row(Weight& w, int at, const Row& r) {
    uint8_t* panel = w.codes + size_t(at / ROWS) * w.panel_codes;
    uint8_t* s = w.scale + size_t(at / ROWS) * w.panel_scales;
    int row = at % ROWS;
    for (int i = 0; i < w.k; i++) put(w, panel, row, i, r.code[i]);
    for (int i = 0; i < w.scale_groups(); i++) {
        if (w.scales == Scales::super) {
            if (i * w.group % SUPER == 0) {
                int b = i * w.group / SUPER;
                std::memcpy(s + row * 2, &r.d[b], 2), s += 32;
                if (w.min) std::memcpy(s + row * 2, &r.m[b], 2), s += 32;
            }
            s[row] = uint8_t(r.sc[i]), s += 16;
            if (w.min) s[row] = uint8_t(r.mn[i]), s += 16;
        } else if (w.scales == Scales::f16) {
            std::memcpy(s + row * 2, &r.d[i], 2), s += 32;
            if (w.min) std::memcpy(s + row * 2, &r.m[i], 2), s += 32;
        } else {
            std::memcpy(s + row * 4, &r.fd[i], 4), s += 64;
            if (w.min) std::memcpy(s + row * 4, &r.fm[i], 4), s += 64;
        }
    }
}

std::string sized(Weight& w) {
    if (w.n < 1 || w.k < 1 || int64_t(w.n) * w.k > (int64_t(1) << 36)) return "a weight of absurd size";
    if (w.form != Form::integer) {
        w.panel_codes = size_t(w.k) * ROWS * element(w.form);
        w.panel_scales = 0;
        return "";
    }
    bool whole = w.group >= w.k || (w.k % w.group == 0 && (w.group == 16 || w.group % GROUP == 0));
    if (!whole) return "groups of " + std::to_string(w.group) + " in rows of " + std::to_string(w.k);
    w.panel_codes = size_t(w.groups()) * 64 * w.bits;
    size_t per = w.min ? 2 : 1, sg = w.scale_groups();
    if (w.scales == Scales::super) w.panel_scales = size_t(w.k) / SUPER * 32 * per + sg * 16 * per;
    else w.panel_scales = sg * per * ROWS * (w.scales == Scales::f16 ? 2 : 4);
    w.panel_scales = (w.panel_scales + 63) / 64 * 64;
    return "";
}

}  // namespace

float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, bits;
    if (e == 31) bits = 0x7f800000 | m << 13;
    else if (e) bits = (e + 112) << 23 | m << 13;
    else {  // subnormal: m * 2^-24
        float f = float(m) * 5.9604644775390625e-08f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Exact values only: what a half holds.
uint16_t float_to_half(float f) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    uint32_t sign = (x >> 16) & 0x8000, magnitude = x & 0x7fffffff;
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0));
    if (magnitude < 0x38800000) {
        float a;
        std::memcpy(&a, &magnitude, 4);
        return uint16_t(sign | uint32_t(a * 16777216.0f + 0.5f));
    }
    return uint16_t(sign | (magnitude - 0x38000000) >> 13);
}

size_t row_bytes(int kind, int k) {
    const Type* t = type_of(kind);
    return t && k % t->inputs == 0 ? size_t(k) / t->inputs * t->bytes : 0;
}

std::string plan_blocks(Weight& w, int kind, int n, int k) {
    const Type* t = type_of(kind);
    if (!t) return "a type of block that is not read (" + std::to_string(kind) + ")";
    if (n < 1 || k < 1 || k % t->inputs) return "rows of " + std::to_string(k) + " do not fill blocks";
    w.n = n, w.k = k, w.kind = kind, w.form = t->form, w.bits = t->bits, w.group = t->group, w.zero = t->zero;
    w.min = t->min, w.scales = t->scales;
    return sized(w);
}

std::string plan_codes(Weight& w, int bits, int group, bool min, int zero, bool exact_half, int n, int k) {
    if (bits < 2 || bits > 8 || bits == 7) return "codes of " + std::to_string(bits) + " bits";
    w.n = n, w.k = k, w.kind = -1, w.form = Form::integer, w.bits = bits, w.group = group, w.zero = zero;
    w.min = min, w.scales = exact_half ? Scales::f16 : Scales::f32;
    return group < 1 ? "no group" : sized(w);
}

size_t bytes(const Weight& w) { return size_t(w.panels()) * (w.panel_codes + w.panel_scales); }

void allocate(Weight& w, Memory& memory) {
    w.codes = memory.take(size_t(w.panels()) * w.panel_codes);
    w.scale = memory.take(size_t(w.panels()) * w.panel_scales);
}

void fill_blocks(Weight& w, const uint8_t* data, int first, int count) {
    const Type& t = *type_of(w.kind);
    size_t stride = row_bytes(w.kind, w.k);
    if (w.form != Form::integer) {
        size_t size = element(w.form);
        for (int i = 0; i < count; i++) {
            int at = first + i;
            uint8_t* panel = w.codes + size_t(at / ROWS) * w.panel_codes + at % ROWS * size;
            for (int j = 0; j < w.k; j++) std::memcpy(panel + size_t(j) * ROWS * size, data + i * stride + j * size, size);
        }
        w.filled += count;
        return;
    }
    Row r;
    r.code.resize(w.k);
    size_t blocks = size_t(w.k) / t.inputs;
    r.d.resize(blocks), r.m.resize(t.min ? blocks : 0);
    if (t.scales == Scales::super) r.sc.resize(w.scale_groups()), r.mn.resize(t.min ? w.scale_groups() : 0);
    for (int i = 0; i < count; i++) {
        read_row(w, t, data + i * stride, r);
        put_row(w, first + i, r);
    }
    w.filled += count;
}

void fill_codes(Weight& w, const uint8_t* code, const float* scale, const float* minimum, int first, int count) {
    Row r;
    r.code.resize(w.k);
    int sg = w.scale_groups();
    r.d.resize(sg), r.m.resize(sg), r.fd.resize(sg), r.fm.resize(sg);
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < w.k; j++) r.code[j] = uint8_t(code[size_t(i) * w.k + j] & ((1 << w.bits) - 1));
        for (int j = 0; j < sg; j++) {
            r.fd[j] = scale[size_t(i) * sg + j], r.fm[j] = minimum ? minimum[size_t(i) * sg + j] : 0;
            if (w.scales == Scales::f16) r.d[j] = float_to_half(r.fd[j]), r.m[j] = float_to_half(r.fm[j]);
        }
        put_row(w, first + i, r);
    }
    w.filled += count;
}

void unpack_row(const Weight& w, int at, float* out) {
    const uint8_t* panel = w.codes + size_t(at / ROWS) * w.panel_codes;
    const uint8_t* s = w.scale + size_t(at / ROWS) * w.panel_scales;
    int row = at % ROWS;
    if (w.form != Form::integer) {
        for (int i = 0; i < w.k; i++) {
            const uint8_t* p = panel + (size_t(i) * ROWS + row) * element(w.form);
            if (w.form == Form::f32) std::memcpy(out + i, p, 4);
            else if (w.form == Form::f16) out[i] = half_to_float(u16(p));
            else {
                uint32_t bits = uint32_t(u16(p)) << 16;
                std::memcpy(out + i, &bits, 4);
            }
        }
        return;
    }
    float d = 0, dmin = 0, scale = 0, minimum = 0;
    for (int g = 0; g < w.scale_groups(); g++) {
        if (w.scales == Scales::super) {
            if (g * w.group % SUPER == 0) {
                d = half_to_float(u16(s + row * 2)), s += 32;
                if (w.min) dmin = half_to_float(u16(s + row * 2)), s += 32;
            }
            scale = d * float(int8_t(s[row])), s += 16;
            if (w.min) minimum = -dmin * float(int8_t(s[row])), s += 16;
        } else if (w.scales == Scales::f16) {
            scale = half_to_float(u16(s + row * 2)), s += 32;
            if (w.min) minimum = half_to_float(u16(s + row * 2)), s += 32;
        } else {
            std::memcpy(&scale, s + row * 4, 4), s += 64;
            if (w.min) std::memcpy(&minimum, s + row * 4, 4), s += 64;
        }
        int end = w.group >= w.k ? w.k : (g + 1) * w.group;
        for (int i = g * w.group; i < end; i++) {
            int q = get(w, panel, row, i);
            out[i] = w.min ? scale * float(q) + minimum : scale * float(q - w.zero);
        }
    }
}

}  // namespace wherry
