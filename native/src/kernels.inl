// Products of weights and rows, written once over the lanes of an instruction set (isa_*.h and rows.inl before this).

template <int BITS> inline void codes(const uint8_t* p, vi w[8]) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) w[j] = load(p + 64 * j);
        return;
    }
    if constexpr (BITS & 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vi v = load(p + 64 * j);
            w[j] = band(v, bytes(15)), w[j + 4] = band(shift<4>(v), bytes(15));
        }
        p += 256;
    }
    if constexpr (BITS & 2) {
        constexpr int AT = BITS & 4;  // where these two bits stand in the code
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vi v = load(p + 64 * j), m = bytes(3 << AT);
            vi part[4] = {band(shift<0 - AT>(v), m), band(shift<2 - AT>(v), m), band(shift<4 - AT>(v), m),
                          band(shift<6 - AT>(v), m)};
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) w[j + 2 * s] = AT ? bor(w[j + 2 * s], part[s]) : part[s];
        }
        p += 128;
    }
    if constexpr (BITS & 1) {
        constexpr int AT = BITS - 1 == 4 ? 4 : 2;
        vi v = load(p), m = bytes(1 << AT);
        vi part[8] = {band(shift<0 - AT>(v), m), band(shift<1 - AT>(v), m), band(shift<2 - AT>(v), m),
                      band(shift<3 - AT>(v), m), band(shift<4 - AT>(v), m), band(shift<5 - AT>(v), m),
                      band(shift<6 - AT>(v), m), band(shift<7 - AT>(v), m)};
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) w[j] = bor(w[j], part[j]);
    }
}

// A panel's scales and minimums as floats [scale group][16].
void scales(const Weight& w, int panel, float* S, float* M) {
    const uint8_t* s = w.scale + size_t(panel) * w.panel_scales;
    const int count = w.scale_groups();
    for (size_t i = 0; i < w.panel_scales; i += 64) ahead(s + w.panel_scales + i);
    for (int h = 0; h < ROWS / LANES; h++) {
        const uint8_t* at = s;
        vf d = setf(0), dmin = setf(0);
        float *so = S + h * LANES, *mo = M + h * LANES;
        for (int g = 0; g < count; g++) {
            vf scale, minimum = setf(0);
            if (w.scales == Scales::super) {
                if (g * w.group % SUPER == 0) {
                    d = half16(at + h * LANES * 2), at += 32;
                    if (w.min) dmin = mul(half16(at + h * LANES * 2), setf(-1)), at += 32;
                }
                scale = mul(d, small16(at + h * LANES)), at += 16;
                if (w.min) minimum = mul(dmin, small16(at + h * LANES)), at += 16;
            } else if (w.scales == Scales::f16) {
                scale = half16(at + h * LANES * 2), at += 32;
                if (w.min) minimum = half16(at + h * LANES * 2), at += 32;
            } else {
                scale = loadf((const float*)at + h * LANES), at += 64;
                if (w.min) minimum = loadf((const float*)at + h * LANES), at += 64;
            }
            storef(so, scale), so += ROWS;
            if (w.min) storef(mo, minimum), mo += ROWS;
        }
    }
}

inline void give(float* out, vf v, bool more) { storef(out, more ? add(loadf(out), v) : v); }

// What a block's two sums are multiplied with: -zero for what the codes are too high, 1 where there are minimums.
template <bool HALF, bool MIN> inline vi of_sums(int zero, int part) {
    int by = (MIN ? 1 : -zero) & 0xffff;
    return seti(!HALF ? by << 16 | by : part ? by << 16 : by);
}

// 16 rows times T activations. HALF: a scale per 16 inputs; MIN: a minimum beside each scale, else `zero`.
template <int BITS, bool HALF, bool MIN, int T>
void tile(const Weight& w, const uint8_t* code, const float* S, const float* M, const Act& x, int first, float* out,
          size_t stride, bool more) {
    constexpr int PARTS = ROWS / LANES, N = HALF ? 4 : 8;
    vf f[PARTS][T];
    for (int h = 0; h < PARTS; h++)
        for (int t = 0; t < T; t++) f[h][t] = setf(0);
    const int per = HALF ? 1 : w.group >= w.k ? w.groups() : w.group / GROUP;
    const int groups = w.groups();
    const vi zero[2] = {of_sums<HALF, MIN>(w.zero, 0), of_sums<HALF, MIN>(w.zero, 1)};
    const size_t next = w.panel_codes < 4096 ? w.panel_codes : 4096;
    const Block* rows = &x.at(0, first);
    for (int g = 0, left = per; g < groups; g++, code += 64 * BITS, rows += x.pitch) {
        for (int l = 0; l < BITS; l++) ahead(code + next + 64 * l);  // of the panel that comes next, if that is near
#pragma GCC unroll 2
        for (int h = 0; h < PARTS; h++) {
            vi u[8];
            codes<BITS>(code + h * LANES * 4, u);
#pragma GCC unroll 2
            for (int p = 0; p < 8 / N; p++) {
                const float* at = S + p * ROWS + h * LANES;
                vf s = loadf(at), m = MIN ? loadf(at + (M - S)) : setf(0);
                vi acc[T];
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) acc[t] = MIN ? seti(0) : pairs16(zero[p], rows[t].sum);
                dots<BITS, N, T>(acc, u + p * N, rows, p * 16);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const vf by = setf(rows[t].scale);
                    f[h][t] = fma(cvt(acc[t]), mul(s, by), f[h][t]);
                    if constexpr (MIN) f[h][t] = fma(m, mul(cvt(pairs16(zero[p], rows[t].sum)), by), f[h][t]);
                }
            }
        }
        if constexpr (HALF) S += 2 * ROWS, M += 2 * ROWS;
        else if (--left == 0) S += ROWS, M += ROWS, left = per;
    }
    for (int h = 0; h < PARTS; h++)
        for (int t = 0; t < T; t++) give(out + t * stride + h * LANES, f[h][t], more);
}

using Tile = void (*)(const Weight&, const uint8_t*, const float*, const float*, const Act&, int, float*, size_t, bool);

template <int BITS, int T> Tile tile_of(bool half, bool min) {
    return half ? (min ? tile<BITS, true, true, T> : tile<BITS, true, false, T>)
                : (min ? tile<BITS, false, true, T> : tile<BITS, false, false, T>);
}

template <int T> Tile tile_for(const Weight& w) {
    switch (w.bits) {
        case 2: return tile_of<2, T>(w.half(), w.min);
        case 3: return tile_of<3, T>(w.half(), w.min);
        case 4: return tile_of<4, T>(w.half(), w.min);
        case 5: return tile_of<5, T>(w.half(), w.min);
        case 6: return tile_of<6, T>(w.half(), w.min);
        default: return tile_of<8, T>(w.half(), w.min);
    }
}

// Float weights: activations in float, too.
void panel_float(const Weight& w, int panel, const Act& x, int first, int count, float* out, size_t stride, bool more) {
    const uint8_t* base = w.codes + size_t(panel) * w.panel_codes;
    for (int h = 0; h < ROWS / LANES; h++)
        for (int t = 0; t < count; t += 4) {
            const int n = count - t < 4 ? count - t : 4;
            const float* row[4];
            for (int i = 0; i < 4; i++) row[i] = x.f + (first + t + (i < n ? i : 0)) * x.stride;
            vf f[4] = {setf(0), setf(0), setf(0), setf(0)};
            for (int j = 0; j < w.k; j++) {
                const uint8_t* p = base + (size_t(j) * ROWS + h * LANES) * (w.form == Form::f32 ? 4 : 2);
                vf v = w.form == Form::f32 ? loadf((const float*)p) : w.form == Form::f16 ? half16(p) : brain16(p);
                for (int i = 0; i < 4; i++) f[i] = fma(v, setf(row[i][j]), f[i]);
            }
            for (int i = 0; i < n; i++) give(out + (t + i) * stride + h * LANES, f[i], more);
        }
}

void lean(const Weight& w, int panel, float* out, size_t stride, int count) {
    if (!w.bias) return;
    for (int t = 0; t < count; t++)
        for (int r = 0; r < ROWS && panel * ROWS + r < w.n; r++) out[t * stride + r] += w.bias[panel * ROWS + r];
}

void panel(const Weight& w, int p, const Act& x, int first, int count, float* scratch, float* out, size_t stride,
           bool more) {
    if (w.form != Form::integer) {
        panel_float(w, p, x, first, count, out, stride, more);
    } else {
        float *S = scratch, *M = scratch + size_t(w.scale_groups()) * ROWS;
        scales(w, p, S, M);
        const uint8_t* code = w.codes + size_t(p) * w.panel_codes;
        for (const Act* part = &x; part; part = part->rest, more = true) {
            int t = 0;
#define RUN(T) \
    for (Tile f = tile_for<T>(w); t + T <= count; t += T) f(w, code, S, M, *part, first + t, out + t * stride, stride, more);
            MANY(RUN)
#undef RUN
        }
    }
    lean(w, p, out, stride, count);
}

// ---- two panels, unpacked to bytes once, times many activations

#if LANES_16
template <int BITS> void widen(const uint8_t* code, int groups, uint8_t* out) {
    for (int g = 0; g < groups; g++, code += 64 * BITS, out += 1024) {
        vi w[8];
        codes<BITS>(code, w);
        for (int j = 0; j < 8; j++) _mm512_store_si512(out + 64 * j, w[j]);
    }
}

void widen_panel(const Weight& w, int p, uint8_t* out) {
    const uint8_t* code = w.codes + size_t(p) * w.panel_codes;
    switch (w.bits) {
        case 2: return widen<2>(code, w.groups(), out);
        case 3: return widen<3>(code, w.groups(), out);
        case 4: return widen<4>(code, w.groups(), out);
        case 5: return widen<5>(code, w.groups(), out);
        case 6: return widen<6>(code, w.groups(), out);
        default: return widen<8>(code, w.groups(), out);
    }
}

struct Two_panels {
    const uint8_t* code;    // [group][2][8][64]
    const float *S[2], *M[2];  // [scale group][16]
    int per[2], zero, groups;
    const uint8_t* next[2];  // what is unpacked after these
    size_t ahead;            // its bytes
};

template <bool HALF, bool MIN, int T>
void tile2(const Two_panels& w, const Act& x, int first, float* out, size_t stride, bool more) {
    vf f[2][T];
    for (int t = 0; t < T; t++) f[0][t] = f[1][t] = setf(0);
    const float *S[2] = {w.S[0], w.S[1]}, *M[2] = {w.M[0], w.M[1]};
    int left[2] = {w.per[0], w.per[1]};
    const vi zero[2] = {of_sums<HALF, MIN>(w.zero, 0), of_sums<HALF, MIN>(w.zero, 1)};
    const uint8_t* code = w.code;
    const Block* rows = &x.at(0, first);
    for (int g = 0; g < w.groups; g++, code += 1024, rows += x.pitch) {
#pragma GCC unroll 2
        for (int p = 0; p < (HALF ? 2 : 1); p++) {
            vi a[2][T];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) a[0][t] = a[1][t] = MIN ? seti(0) : pairs16(zero[p], rows[t].sum);
#pragma GCC unroll 8
            for (int j = HALF ? 4 * p : 0; j < (HALF ? 4 * p + 4 : 8); j++) {
                vi w0 = load(code + 64 * j), w1 = load(code + 512 + 64 * j);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    int four;
                    __builtin_memcpy(&four, rows[t].q + 4 * j, 4);
                    vi b = seti(four);
                    a[0][t] = dot1(a[0][t], w0, b), a[1][t] = dot1(a[1][t], w1, b);
                }
            }
            vf s0 = loadf(S[0] + p * ROWS), s1 = loadf(S[1] + p * ROWS);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                vf b = setf(rows[t].scale);
                f[0][t] = fma(cvt(a[0][t]), mul(s0, b), f[0][t]);
                f[1][t] = fma(cvt(a[1][t]), mul(s1, b), f[1][t]);
            }
            if constexpr (MIN) {
                vf m0 = loadf(M[0] + p * ROWS), m1 = loadf(M[1] + p * ROWS);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    vf b = mul(cvt(pairs16(zero[p], rows[t].sum)), setf(rows[t].scale));
                    f[0][t] = fma(m0, b, f[0][t]), f[1][t] = fma(m1, b, f[1][t]);
                }
            }
        }
        for (int i = 0; i < 2; i++) {
            if constexpr (HALF) S[i] += 2 * ROWS, M[i] += 2 * ROWS;
            else if (--left[i] == 0) S[i] += ROWS, M[i] += ROWS, left[i] = w.per[i];
        }
    }
    for (int t = 0; t < T; t++)
        give(out + t * stride, f[0][t], more), give(out + t * stride + ROWS, f[1][t], more);
}

template <bool HALF, bool MIN>
void tiles2(const Two_panels& w, const Act& x, int first, int count, float* out, size_t stride, bool more) {
    size_t fetched = 0;
    for (int t = 0, n; t < count; t += n) {  // as equal as can be: 16 are 6, 5 and 5
        const int tiles = (count - t + PAIR - 1) / PAIR;
        n = (count - t + tiles - 1) / tiles;
        for (size_t end = w.ahead * size_t(t + n) / size_t(count) / 64 * 64; fetched < end && !more; fetched += 64)
            ahead(w.next[0] + fetched), ahead(w.next[1] + fetched);
        switch (n) {
#define RUN(T) case T: tile2<HALF, MIN, T>(w, x, first + t, out + t * stride, stride, more); break;
            RUN(1) RUN(2) RUN(3) RUN(4) RUN(5) RUN(6)
#undef RUN
        }
    }
}
#endif

void pair(const Weight& a, int pa, const Weight& b, int pb, const Act& x, int first, int count, float* scratch,
          float* out, size_t stride, bool more) {
#if LANES_16
    if (a.form == Form::integer && b.form == Form::integer && count > 2 && a.min == b.min && a.half() == b.half() && a.zero == b.zero) {
        const Weight* w[2] = {&a, &b};
        const int at[2] = {pa, pb};
        Two_panels two;
        uint8_t* code = (uint8_t*)scratch;
        float* S = scratch + size_t(a.groups()) * 256;
        two.code = code, two.groups = a.groups(), two.zero = a.zero;
        for (int i = 0; i < 2; i++) {
            widen_panel(*w[i], at[i], code + 512 * i);
            two.S[i] = S, two.M[i] = S + size_t(w[i]->scale_groups()) * ROWS;
            scales(*w[i], at[i], S, S + size_t(w[i]->scale_groups()) * ROWS);
            S += size_t(w[i]->scale_groups()) * ROWS * 2;
            two.next[i] = w[i]->codes + size_t(at[i] + (&a == &b ? 2 : 1)) * w[i]->panel_codes;
            two.per[i] = w[i]->group >= w[i]->k ? w[i]->groups() : w[i]->group / GROUP;
        }
        two.ahead = a.panel_codes < b.panel_codes ? a.panel_codes : b.panel_codes;
        auto tiles = a.half() ? (a.min ? tiles2<true, true> : tiles2<true, false>)
                              : (a.min ? tiles2<false, true> : tiles2<false, false>);
        for (const Act* part = &x; part; part = part->rest, more = true) tiles(two, *part, first, count, out, stride, more);
        lean(a, pa, out, stride, count), lean(b, pb, out + ROWS, stride, count);
        return;
    }
#endif
    panel(a, pa, x, first, count, scratch, out, stride, more);
    panel(b, pb, x, first, count, scratch, out + ROWS, stride, more);
}
