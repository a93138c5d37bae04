// 16 lanes of AVX-512 VNNI; with BF16 where the compiler was told so.
#pragma once
#include <immintrin.h>

using vi = __m512i;
using vf = __m512;
constexpr int LANES = 16;
constexpr int PAIR = 6;  // activations that one pass over two panels takes
#define MANY(F) F(8) F(4) F(2) F(1)

inline vi load(const void* p) { return _mm512_loadu_si512(p); }
inline vf loadf(const float* p) { return _mm512_loadu_ps(p); }
inline void storef(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline vf setf(float v) { return _mm512_set1_ps(v); }
inline vi seti(int v) { return _mm512_set1_epi32(v); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf subf(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf divf(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf maxf(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline vf minf(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf absf(vf a) { return _mm512_abs_ps(a); }
inline float top(vf a) { return _mm512_reduce_max_ps(a); }
inline float total(vf a) { return _mm512_reduce_add_ps(a); }
inline vi nearest(vf a) { return _mm512_cvtps_epi32(a); }
inline vf power(vi a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23)); }
inline int total(vi a) { return _mm512_reduce_add_epi32(a); }
inline void narrow(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
inline vf cvt(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi band(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi bor(vi a, vi b) { return _mm512_or_si512(a, b); }
template <int S> inline vi shift(vi a) {  // right; left where S is negative. 16-bit lanes.
    if constexpr (S > 0) return _mm512_srli_epi16(a, S);
    else if constexpr (S < 0) return _mm512_slli_epi16(a, -S);
    else return a;
}
inline vi bytes(int v) { return _mm512_set1_epi8(char(v)); }
inline vf half16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf brain16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf small16(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

// acc[t] += sum over N groups of 4: unsigned codes of at most BITS bits times signed x of row t. All rows at each step:
// one row's sum waits for itself, five cycles each time.
template <int BITS, int N, int T> inline void dots(vi* acc, const vi* w, const Block* rows, int at) {
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            int four;
            __builtin_memcpy(&four, rows[t].q + at + 4 * j, 4);
            acc[t] = _mm512_dpbusd_epi32(acc[t], w[j], _mm512_set1_epi32(four));
        }
}
// in each lane a.low * x[0] + a.high * x[1], 16 bits each
inline vi pairs16(vi a, const int16_t* x) {
    int two;
    __builtin_memcpy(&two, x, 4);
    return _mm512_madd_epi16(a, _mm512_set1_epi32(two));
}
inline vi dot1(vi acc, vi w, vi x) { return _mm512_dpbusd_epi32(acc, w, x); }
// pairs of bf16 from pairs of bytes: these integers are exact there
inline vi pairs8(const void* p) {
    vi v = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    vi even = _mm512_castps_si512(cvt(_mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16)));
    vi odd = _mm512_castps_si512(cvt(_mm512_srai_epi32(v, 16)));
    return bor(_mm512_srli_epi32(even, 16), band(odd, seti(int(0xffff0000))));
}
inline void ahead(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#ifdef __AVX512BF16__
using Two = unsigned;  // two bf16
inline Two two(float a, float b) {
    __m128bh v = _mm_cvtneps_pbh(_mm_setr_ps(a, b, 0, 0));
    return (Two)_mm_cvtsi128_si32((__m128i)v);
}
inline void twos(const float* p, int n, Two* out) {  // n a multiple of 32
    for (int i = 0; i < n; i += 32)
        _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(loadf(p + i + 16), loadf(p + i)));
}
inline vf dot2(vf acc, vi pairs, Two q) {
    return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int)q));
}
#else
struct Two { float a, b; };
inline Two two(float a, float b) { return {a, b}; }
inline void twos(const float* p, int n, Two* out) { __builtin_memcpy((void*)out, p, size_t(n) * 4); }
inline vf dot2(vf acc, vi pairs, Two q) {
    vf low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    vf high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
    return fma(high, setf(q.b), fma(low, setf(q.a), acc));
}
#endif
