// Work on single rows, written once over the lanes of an instruction set: rounding, norms, gates, rotation.
// No functions of the standard library that could be emitted here and be picked by the linker for everybody.

inline vf exponent(vf x) {  // e^x within 2e-7 for x in [-87, 88]; the ends are held
    x = maxf(setf(-87.0f), minf(setf(88.0f), x));  // in this order NaN stays
    vi i = nearest(mul(x, setf(1.44269504f)));
    vf n = cvt(i), f = fma(n, setf(2.12194440e-4f), fma(n, setf(-0.693359375f), x));
    vf p = fma(setf(1.9875691500e-4f), f, setf(1.3981999507e-3f));
    p = fma(p, f, setf(8.3334519073e-3f));
    p = fma(p, f, setf(4.1665795894e-2f));
    p = fma(p, f, setf(1.6666665459e-1f));
    p = fma(p, f, setf(5.0000001201e-1f));
    return mul(add(fma(mul(p, f), f, f), setf(1.0f)), power(i));
}

inline float exponent(float x) {
    float v[LANES];
    storef(v, exponent(setf(x)));
    return v[0];
}

// 32 floats -> a block. left: what the rounding leaves of them, or null.
inline void round32(const float* x, Block& b, float* left) {
    vf most = setf(0), nan = setf(0);
    for (int i = 0; i < GROUP; i += LANES) {
        vf v = loadf(x + i);
        most = maxf(absf(v), most);
        nan = add(nan, mul(v, setf(0)));  // maxima lose NaN; this keeps it, and infinity
    }
    float highest = top(most), wrong = total(nan);
    if (wrong != wrong) {  // the scale alone tells it: no integer can
        b.scale = wrong, b.sum[0] = b.sum[1] = 0;
        for (int i = 0; i < GROUP; i++) b.q[i] = 0;
        for (int i = 0; left && i < GROUP; i++) left[i] = 0;
        return;
    }
    bool some = highest > 1e-30f;
    float scale = some ? highest / 127.0f : 0.0f;
    vf by = setf(some ? 127.0f / highest : 0.0f);
    for (int h = 0; h < 2; h++) {
        vi s = seti(0);
        for (int i = 16 * h; i < 16 * h + 16; i += LANES) {
            vf v = loadf(x + i);
            vi r = nearest(mul(v, by));
            narrow(b.q + i, r);
            s = addi(s, r);
            if (left) storef(left + i, fma(cvt(r), setf(-scale), v));
        }
        b.sum[h] = int16_t(total(s));
    }
    b.scale = scale;
}

void quantize(const float* x, const Act& a, int row) {
    for (int g = 0; g < a.groups; g++, x += GROUP) {
        float padded[GROUP], left[GROUP];
        const float* from = x;
        if (a.k - g * GROUP < GROUP) {
            for (int i = 0; i < GROUP; i++) padded[i] = i < a.k - g * GROUP ? x[i] : 0.0f;
            from = padded;
        }
        round32(from, a.at(g, row), a.rest ? left : nullptr);
        if (a.rest) round32(left, a.rest->at(g, row), nullptr);
    }
}

void norm(const float* x, const float* w, float eps, int n, float* out) {
    vf lanes = setf(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) lanes = fma(loadf(x + i), loadf(x + i), lanes);
    float sum = total(lanes);
    for (; i < n; i++) sum += x[i] * x[i];
    float by = 1.0f / __builtin_sqrtf(sum / float(n) + eps);
    for (i = 0; i + LANES <= n; i += LANES) storef(out + i, mul(mul(loadf(x + i), setf(by)), loadf(w + i)));
    for (; i < n; i++) out[i] = x[i] * by * w[i];
}

float peak(const float* x, int n) {
    vf most = setf(-__builtin_inff()), wrong = setf(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = loadf(x + i);
        most = maxf(v, most);
        wrong = add(wrong, subf(v, v));  // NaN from NaN and from infinity
    }
    float best = top(most), bad = total(wrong);
    for (; i < n; i++) best = x[i] > best ? x[i] : best, bad += x[i] - x[i];
    if (bad == bad) return best;
    for (i = 0; i < n; i++)  // minus infinity alone is no fault
        if (x[i] != x[i]) return x[i];
    return best;
}

// n a multiple of 16
void silu(const float* gate, const float* up, int n, float* out) {
    for (int i = 0; i < n; i += LANES) {
        vf g = loadf(gate + i);
        storef(out + i, mul(divf(g, add(setf(1), exponent(subf(setf(0), g)))), loadf(up + i)));
    }
}

// x * sigmoid(2 u) = x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
void gelu(const float* gate, const float* up, int n, float* out) {
    for (int i = 0; i < n; i += LANES) {
        vf g = loadf(gate + i);
        vf u = mul(g, fma(mul(g, g), setf(-2 * 0.7978845608f * 0.044715f), setf(-2 * 0.7978845608f)));
        storef(out + i, mul(divf(g, add(setf(1), exponent(u))), loadf(up + i)));
    }
}

void soften(float* x, int n, float cap) {  // tanh(y) = 1 - 2 / (1 + e^2y)
    for (int i = 0; i < n; i += LANES) {
        vf e = exponent(mul(loadf(x + i), setf(2 / cap)));
        storef(x + i, mul(setf(cap), subf(setf(1), divf(setf(2), add(setf(1), e)))));
    }
}

void turn(float* head, int width, const float* cosine, const float* sine, bool neighbours) {
    int half = width / 2;
    if (neighbours) {
        for (int i = 0; i < half; i++) {
            float a = head[2 * i], b = head[2 * i + 1];
            head[2 * i] = a * cosine[i] - b * sine[i];
            head[2 * i + 1] = a * sine[i] + b * cosine[i];
        }
        return;
    }
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = a * sine[i] + b * cosine[i];
    }
}
