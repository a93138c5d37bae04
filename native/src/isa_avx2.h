// 8 lanes of AVX2 with FMA and F16C; AVX-VNNI where the compiler was told so.
#pragma once
#include <immintrin.h>

using vi = __m256i;
using vf = __m256;
constexpr int LANES = 8;
constexpr int PAIR = 0;  // no pass over two panels: too few registers
#define MANY(F) F(4) F(2) F(1)

inline vi load(const void* p) { return _mm256_loadu_si256((const vi*)p); }
inline vf loadf(const float* p) { return _mm256_loadu_ps(p); }
inline void storef(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline vf setf(float v) { return _mm256_set1_ps(v); }
inline vi seti(int v) { return _mm256_set1_epi32(v); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf subf(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf divf(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf maxf(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf minf(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf absf(vf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
inline float top(vf a) {
    float v[8], m;
    _mm256_storeu_ps(v, a);
    m = v[0];
    for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
    return m;
}
inline float total(vf a) {
    float v[8];
    _mm256_storeu_ps(v, a);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline vi nearest(vf a) { return _mm256_cvtps_epi32(a); }
inline vf power(vi a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(127)), 23)); }
inline int total(vi a) {
    int v[8];
    _mm256_storeu_si256((vi*)v, a);
    return v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7];
}
inline void narrow(int8_t* p, vi a) {
    __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(s, s));
}
inline vf cvt(vi a) { return _mm256_cvtepi32_ps(a); }
inline vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi band(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi bor(vi a, vi b) { return _mm256_or_si256(a, b); }
template <int S> inline vi shift(vi a) {
    if constexpr (S > 0) return _mm256_srli_epi16(a, S);
    else if constexpr (S < 0) return _mm256_slli_epi16(a, -S);
    else return a;
}
inline vi bytes(int v) { return _mm256_set1_epi8(char(v)); }
inline vf half16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vf brain16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf small16(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }

// acc + sum over N groups of 4: unsigned codes of at most BITS bits times signed x
template <int BITS, int N> inline vi dot(vi acc, const vi* w, const int8_t* x) {
#ifdef __AVXVNNI__
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
        int four;
        __builtin_memcpy(&four, x + 4 * j, 4);
        acc = _mm256_dpbusd_avx_epi32(acc, w[j], _mm256_set1_epi32(four));
    }
    return acc;
#else
    // vpmaddubsw saturates at 32767: a pair of codes reaches 2 * (2^BITS - 1) * 127, so eight pairs of 4-bit codes fit
    // (30480), two of 6-bit ones (32004), and bytes do not at all: these go through 16-bit products.
    const vi one = _mm256_set1_epi16(1);
    constexpr int RUN = BITS <= 4 ? N : BITS <= 6 ? 2 : 1;
#pragma GCC unroll 8
    for (int j = 0; j < N; j += RUN) {
        vi sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = j; i < j + RUN; i++) {
            int four;
            __builtin_memcpy(&four, x + 4 * i, 4);
            vi b = _mm256_set1_epi32(four);
            if constexpr (BITS <= 6) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], b));
            else {
                vi even = _mm256_and_si256(w[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w[i], 8);
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8)));
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(odd, _mm256_srai_epi16(b, 8)));
            }
        }
        if constexpr (BITS <= 6) acc = _mm256_add_epi32(acc, _mm256_madd_epi16(sum, one));
    }
    return acc;
#endif
}
template <int BITS, int N, int T> inline void dots(vi* acc, const vi* w, const Block* rows, int at) {
    for (int t = 0; t < T; t++) acc[t] = dot<BITS, N>(acc[t], w, rows[t].q + at);
}
// in each lane a.low * x[0] + a.high * x[1], 16 bits each
inline vi pairs16(vi a, const int16_t* x) {
    int two;
    __builtin_memcpy(&two, x, 4);
    return _mm256_madd_epi16(a, _mm256_set1_epi32(two));
}
// pairs of bf16 from pairs of bytes: these integers are exact there
inline vi pairs8(const void* p) {
    vi v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    vi even = _mm256_castps_si256(cvt(_mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16)));
    vi odd = _mm256_castps_si256(cvt(_mm256_srai_epi32(v, 16)));
    return bor(_mm256_srli_epi32(even, 16), band(odd, seti(int(0xffff0000))));
}
inline void ahead(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

struct Two { float a, b; };
inline Two two(float a, float b) { return {a, b}; }
inline void twos(const float* p, int n, Two* out) { __builtin_memcpy((void*)out, p, size_t(n) * 4); }
inline vf dot2(vf acc, vi pairs, Two q) {
    vf low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    vf high = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
    return fma(high, setf(q.b), fma(low, setf(q.a), acc));
}
