// Attention over pages of keys and values in bf16 or in bytes, softmax block by block.
//
//   page of a head   keys [2][width / 2][16 positions][2], values [16 pairs of positions][width up to 16][2];
//                    where these are bytes, float scales of 32 keys and of 32 values behind them
// Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.

inline uint16_t brain(float f) {  // rounded to nearest, ties to even
    uint32_t x = __builtin_bit_cast(uint32_t, f);
    if ((x & 0x7fffffff) > 0x7f800000) return uint16_t(x >> 16 | 64);
    return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

// Where a head's page has what: keys first, then values, then the scales of both, where these are bytes.
template <bool BYTES> struct Place {
    static constexpr int SIZE = BYTES ? 1 : 2;  // bytes of a number
    static size_t values(int wide) { return size_t(PAGE) * wide * SIZE; }
    static const float* scales(const uint8_t* page, int wide) { return (const float*)(page + 2 * values(wide)); }
};

// The scale of a row in bytes; `by` is what its numbers are multiplied with. NaN and infinity make the scale NaN.
inline float scale8(const float* x, int width, float& by) {
    float most = 0, wrong = 0;
    for (int d = 0; d < width; d++) {
        float size = __builtin_fabsf(x[d]);
        most = size > most ? size : most, wrong += x[d] * 0;
    }
    by = wrong == wrong && most > 1e-30f ? 127 / most : 0;
    return wrong == wrong ? by > 0 ? most / 127 : 0 : wrong;
}

inline uint8_t byte(float x, float by) { return by > 0 ? uint8_t(int8_t(__builtin_rintf(x * by))) : 0; }

void store(const float* key, const float* value, int width, uint8_t* page, int slot, bool bytes) {
    const int wide = (width + 15) / 16 * 16;
    if (bytes) {
        float *scale = (float*)Place<true>::scales(page, wide), by;
        scale[slot] = scale8(key, width, by);
        uint8_t* k = page + size_t(slot / 16) * width * 16 + slot % 16 * 2;
        for (int d = 0; d < width; d++) k[d / 2 * 32 + d % 2] = byte(key[d], by);
        scale[PAGE + slot] = scale8(value, width, by);
        uint8_t* v = page + Place<true>::values(wide) + size_t(slot / 2) * wide * 2 + slot % 2;
        for (int d = 0; d < width; d++) v[2 * d] = byte(value[d], by);
        return;
    }
    uint16_t* k = (uint16_t*)page + size_t(slot / 16) * width * 16 + slot % 16 * 2;
    for (int d = 0; d < width / 2; d++) k[d * 32] = brain(key[2 * d]), k[d * 32 + 1] = brain(key[2 * d + 1]);
    uint16_t* v = (uint16_t*)page + size_t(PAGE) * wide + size_t(slot / 2) * wide * 2 + slot % 2;
    for (int d = 0; d < width; d++) v[2 * d] = brain(value[d]);
}

// Scores of a page's 32 positions for M queries.
template <int M, bool BYTES> void scores(const uint8_t* page, int width, const Two* q, float* out, size_t stride) {
    constexpr int V = 2;  // vectors at once
    for (int at = 0; at < PAGE; at += V * LANES) {
        vf f[V][M];
        for (int v = 0; v < V; v++)
            for (int m = 0; m < M; m++) f[v][m] = setf(0);
        const uint8_t* p[V];
        for (int v = 0; v < V; v++) {
            int pos = at + v * LANES;
            p[v] = page + (size_t(pos / 16) * width * 16 + pos % 16 * 2) * Place<BYTES>::SIZE;
        }
        for (int d = 0; d < width / 2; d++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                vi k = BYTES ? pairs8(p[v] + d * 32) : load(p[v] + d * 64);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) f[v][m] = dot2(f[v][m], k, q[m * (width / 2) + d]);
            }
        for (int v = 0; v < V; v++)
            for (int m = 0; m < M; m++) {
                if (BYTES) f[v][m] = mul(f[v][m], loadf(Place<BYTES>::scales(page, (width + 15) / 16 * 16) + at + v * LANES));
                storef(out + m * stride + at + v * LANES, f[v][m]);
            }
    }
}

// out[m][d..d + V vectors) += probabilities of `pairs` pairs of positions times values
template <int M, int V, bool BYTES> void values_at(const Attend& a, int block, int pairs, const Two* p, float* out, int d) {
    const int wide = (a.width + 15) / 16 * 16;
    constexpr int SIZE = Place<BYTES>::SIZE;
    vf f[V][M];
    for (int v = 0; v < V; v++)
        for (int m = 0; m < M; m++) f[v][m] = loadf(out + m * wide + d + v * LANES);
    for (int at = 0; at < pairs; at += PAGE / 2) {
        const uint8_t* page = a.base + a.page_bytes * a.pages[(block + 2 * at) / PAGE] + a.head_offset +
                              Place<BYTES>::values(wide) + d * 2 * SIZE;
        int n = pairs - at < PAGE / 2 ? pairs - at : PAGE / 2;
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const uint8_t* pair = page + (size_t(i) * wide + v * LANES) * 2 * SIZE;
                vi w = BYTES ? pairs8(pair) : load(pair);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) f[v][m] = dot2(f[v][m], w, p[m * (BLOCK / 2) + at + i]);
            }
    }
    for (int v = 0; v < V; v++)
        for (int m = 0; m < M; m++) storef(out + m * wide + d + v * LANES, f[v][m]);
}

template <int M, bool BYTES> void values(const Attend& a, int block, int pairs, const Two* p, float* out) {
    const int wide = (a.width + 15) / 16 * 16;
    constexpr int V = 2;  // vectors at once: a sum waits for itself, so as many as registers hold are under way
    int d = 0;
    for (; d + V * LANES <= wide; d += V * LANES) values_at<M, V, BYTES>(a, block, pairs, p, out, d);
    for (; d < wide; d += LANES) values_at<M, 1, BYTES>(a, block, pairs, p, out, d);
}

template <int M, bool BYTES> void attend_m(Attend& a) {
    const int wide = (a.width + 15) / 16 * 16, half = a.width / 2;
    float* score = a.scratch;                       // [M][BLOCK]
    Two* q = (Two*)(score + QUERIES * BLOCK);       // [M][width / 2], two floats each at most
    Two* p = (Two*)((float*)q + QUERIES * wide);    // [M][BLOCK / 2]
    for (int m = 0; m < M; m++) {
        const int whole = a.width / 32 * 16;
        twos(a.q[m], whole * 2, q + m * half);
        for (int d = whole; d < half; d++) q[m * half + d] = two(a.q[m][2 * d], a.q[m][2 * d + 1]);
        for (int d = 0; d < wide; d++) a.out[m * wide + d] = 0;
        a.most[m] = -__builtin_inff(), a.total[m] = 0;
    }
    for (int block = a.from / BLOCK * BLOCK; block < a.to; block += BLOCK) {
        int low = a.from > block ? a.from - block : 0, high = a.to - block < BLOCK ? a.to - block : BLOCK;
        int first = low / PAGE, last = (high + PAGE - 1) / PAGE;
        for (int g = first; g < last; g++) {
            const uint8_t* page = a.base + a.page_bytes * a.pages[block / PAGE + g] + a.head_offset;
            if (a.cold) {  // the next keys, and the values of these
                const int size = int(Place<BYTES>::values(wide));
                if (g + 1 < last) {
                    const uint8_t* next = a.base + a.page_bytes * a.pages[block / PAGE + g + 1] + a.head_offset;
                    for (int i = 0; i < size; i += 64) ahead(next + i);
                }
                for (int i = size; i < 2 * size; i += 64) ahead(page + i);
            }
            scores<M, BYTES>(page, a.width, q, score + g * PAGE, BLOCK);
        }
        for (int m = 0; m < M; m++) {
            float* s = score + m * BLOCK;
            int b = a.begin[m] - block > low ? a.begin[m] - block : low, e = a.end[m] - block < high ? a.end[m] - block : high;
            Two* pm = p + m * (BLOCK / 2);
            if (b >= e) {
                for (int i = 0; i < last * PAGE / 2; i++) pm[i] = two(0, 0);
                continue;
            }
            if (a.cap > 0) soften(s + first * PAGE, (last - first) * PAGE, a.cap);
            for (int i = first * PAGE; i < b; i++) s[i] = -__builtin_inff();
            for (int i = e; i < last * PAGE; i++) s[i] = -__builtin_inff();
            vf peak = setf(a.most[m]);
            for (int i = first * PAGE; i < last * PAGE; i += LANES) peak = maxf(peak, loadf(s + i));
            const float most = top(peak);
            if (a.most[m] < most && a.total[m] > 0) {
                float by = exponent(a.most[m] - most);
                a.total[m] *= by;
                for (int d = 0; d < wide; d += LANES) storef(a.out + m * wide + d, mul(loadf(a.out + m * wide + d), setf(by)));
            }
            a.most[m] = most;
            vf sum = setf(0);
            for (int i = first * PAGE; i < last * PAGE; i += LANES) {
                vf v = exponent(subf(loadf(s + i), setf(most)));
                storef(s + i, v);
                sum = add(sum, v);
            }
            for (int g = first; BYTES && g < last; g++) {  // the values' scales: they are multiplied with these
                const uint8_t* page = a.base + a.page_bytes * a.pages[block / PAGE + g] + a.head_offset;
                const float* scale = Place<BYTES>::scales(page, wide) + PAGE;
                for (int i = 0; i < PAGE; i += LANES)
                    storef(s + g * PAGE + i, mul(loadf(s + g * PAGE + i), loadf(scale + i)));
            }
            for (int i = first * PAGE; i < b; i++) s[i] = 0;  // e^-87 is small, but what is not seen counts nothing
            for (int i = e; i < last * PAGE; i++) s[i] = 0;
            a.total[m] += total(sum);
            twos(s + first * PAGE, (last - first) * PAGE, pm + first * PAGE / 2);
            for (int i = 0; i < first * PAGE / 2; i++) pm[i] = two(0, 0);
        }
        values<M, BYTES>(a, block, (high + 1) / 2, p, a.out);
    }
}

template <bool BYTES> void attend_any(Attend& a) {
    switch (a.queries) {
        case 1: return attend_m<1, BYTES>(a);
        case 2: return attend_m<2, BYTES>(a);
        case 3: return attend_m<3, BYTES>(a);
        case 4: return attend_m<4, BYTES>(a);
        case 5: return attend_m<5, BYTES>(a);
        case 6: return attend_m<6, BYTES>(a);
        case 7: return attend_m<7, BYTES>(a);
        default: return attend_m<8, BYTES>(a);
    }
}

void attend(Attend& a) { a.bytes ? attend_any<true>(a) : attend_any<false>(a); }

const Kernels TABLE = {ISA_NAME, quantize, norm, silu, gelu, soften, peak, panel, pair, turn, store, attend};
