// Plain C++: any processor. Also the model for a new instruction set (NEON: 4 lanes, vusdotq or vdotq for `dot`).
#pragma once
#include <cstdint>

#include "pack.h"

constexpr int LANES = 8;
constexpr int PAIR = 0;
#define MANY(F) F(1)

struct vi { uint32_t v[LANES]; };
struct vf { float v[LANES]; };
#define EACH for (int l = 0; l < LANES; l++)

inline vi load(const void* p) { vi r; __builtin_memcpy(&r, p, sizeof r); return r; }
inline vf loadf(const float* p) { vf r; __builtin_memcpy(&r, p, sizeof r); return r; }
inline void storef(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vf setf(float a) { vf r; EACH r.v[l] = a; return r; }
inline vi seti(int a) { vi r; EACH r.v[l] = uint32_t(a); return r; }
inline vf mul(vf a, vf b) { EACH a.v[l] *= b.v[l]; return a; }
inline vf add(vf a, vf b) { EACH a.v[l] += b.v[l]; return a; }
inline vf fma(vf a, vf b, vf c) { EACH c.v[l] += a.v[l] * b.v[l]; return c; }
inline vf subf(vf a, vf b) { EACH a.v[l] -= b.v[l]; return a; }
inline vf divf(vf a, vf b) { EACH a.v[l] /= b.v[l]; return a; }
inline vf maxf(vf a, vf b) { EACH a.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l]; return a; }
inline vf minf(vf a, vf b) { EACH a.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l]; return a; }
inline vf absf(vf a) { EACH a.v[l] = __builtin_fabsf(a.v[l]); return a; }
inline float top(vf a) { float m = a.v[0]; EACH m = a.v[l] > m ? a.v[l] : m; return m; }
inline float total(vf a) { float s = 0; EACH s += a.v[l]; return s; }
inline vi nearest(vf a) { vi r; EACH r.v[l] = uint32_t(int32_t(__builtin_rintf(a.v[l]))); return r; }
inline vf power(vi a) { vf r; EACH r.v[l] = __builtin_bit_cast(float, (a.v[l] + 127) << 23); return r; }
inline int total(vi a) { uint32_t s = 0; EACH s += a.v[l]; return int(s); }
inline void narrow(int8_t* p, vi a) { EACH p[l] = int8_t(a.v[l]); }
inline vf cvt(vi a) { vf r; EACH r.v[l] = float(int32_t(a.v[l])); return r; }
inline vi addi(vi a, vi b) { EACH a.v[l] += b.v[l]; return a; }
inline vi band(vi a, vi b) { EACH a.v[l] &= b.v[l]; return a; }
inline vi bor(vi a, vi b) { EACH a.v[l] |= b.v[l]; return a; }
template <int S> inline vi shift(vi a) {  // what crosses bytes is masked by the caller
    if constexpr (S > 0) EACH a.v[l] >>= S;
    if constexpr (S < 0) EACH a.v[l] <<= -S;
    return a;
}
inline vi bytes(int v) { return seti(int(uint32_t(v) * 0x01010101u)); }
inline vf half16(const void* p) { vf r; EACH { uint16_t h; __builtin_memcpy(&h, (const char*)p + 2 * l, 2); r.v[l] = wherry::half_to_float(h); } return r; }
inline vf brain16(const void* p) { vf r; EACH { uint16_t h; __builtin_memcpy(&h, (const char*)p + 2 * l, 2); r.v[l] = __builtin_bit_cast(float, uint32_t(h) << 16); } return r; }
inline vf small16(const void* p) { vf r; EACH r.v[l] = float(((const int8_t*)p)[l]); return r; }

// acc + sum over N groups of 4: unsigned codes of at most BITS bits times signed x
template <int BITS, int N> inline vi dot(vi acc, const vi* w, const int8_t* x) {
    for (int j = 0; j < N; j++)
        EACH for (int i = 0; i < 4; i++) acc.v[l] += uint32_t(int32_t((w[j].v[l] >> 8 * i) & 255) * x[4 * j + i]);
    return acc;
}
template <int BITS, int N, int T> inline void dots(vi* acc, const vi* w, const Block* rows, int at) {
    for (int t = 0; t < T; t++) acc[t] = dot<BITS, N>(acc[t], w, rows[t].q + at);
}
// in each lane a.low * x[0] + a.high * x[1], 16 bits each
inline vi pairs16(vi a, const int16_t* x) {
    EACH a.v[l] = uint32_t(int16_t(a.v[l]) * x[0] + int16_t(a.v[l] >> 16) * x[1]);
    return a;
}
// pairs of bf16 from pairs of bytes: these integers are exact there
inline vi pairs8(const void* p) {
    vi r;
    EACH {
        const int8_t* q = (const int8_t*)p + 2 * l;
        r.v[l] = __builtin_bit_cast(uint32_t, float(q[0])) >> 16 | (__builtin_bit_cast(uint32_t, float(q[1])) & 0xffff0000u);
    }
    return r;
}
inline void ahead(const void*) {}

struct Two { float a, b; };
inline Two two(float a, float b) { return {a, b}; }
inline void twos(const float* p, int n, Two* out) { __builtin_memcpy((void*)out, p, size_t(n) * 4); }
inline vf dot2(vf acc, vi pairs, Two q) {
    EACH acc.v[l] += __builtin_bit_cast(float, pairs.v[l] << 16) * q.a + __builtin_bit_cast(float, pairs.v[l] & 0xffff0000u) * q.b;
    return acc;
}
