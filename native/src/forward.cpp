// One step: some tokens of some sequences through all layers. Every thread runs all of it on its share.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace wherry {
namespace {

struct Share {
    int begin, end;
    Share(int count, int tid, int threads)
        : begin(int(int64_t(count) * tid / threads)), end(int(int64_t(count) * (tid + 1) / threads)) {}
};

constexpr int DENSE = 16;      // tokens above which weights are unpacked two panels at a time
constexpr int OWN = 64;         // tokens for each thread from which on it takes its own through a layer, all panels
constexpr int SPLIT_LEAST = 512;  // positions of a part, when one sequence's context is split among threads

float* aligned(std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
}

}  // namespace

void Runner::Rows::make(int rows, int k, int bits) {
    act.k = k, act.groups = (k + GROUP - 1) / GROUP, act.pitch = rows | 1;
    blocks.resize(size_t(act.pitch) * act.groups);
    act.block = blocks.data();
    if (bits <= 8) return;
    rest = std::make_unique<Rows>();
    rest->make(rows, k, bits - 8);
    act.rest = &rest->act;
}

Runner::Runner(const Model& m, Cache& cache, const Kernels& kernels, Pool& pool, int bits)
    : m_(m), cache_(cache), kernels_(kernels), pool_(pool), next_(m.c.layers) {
    const Config& c = m.c;
    int query = c.heads * c.width;
    hidden_ = up(c.hidden, 32), inner_ = up(c.inner, 32);
    qkv_ = up(query, 32) + 2 * up(c.kv_heads * c.width, 32), out_ = up(c.vocab, 32);
    x_.resize(TOKENS * hidden_), normed_.resize(TOKENS * hidden_), projected_.resize(TOKENS * qkv_);
    attended_.resize(size_t(TOKENS) * up(query, 32)), gated_.resize(TOKENS * inner_);
    cosine_.resize(size_t(TOKENS) * c.width / 2), sine_.resize(cosine_.size());
    logits_.resize(size_t(LOGITS) * out_);
    hidden_rows_.make(TOKENS, c.hidden, bits), head_rows_.make(TOKENS, query, bits), inner_rows_.make(TOKENS, c.inner, bits);
    hidden_rows_.act.f = normed_.data(), hidden_rows_.act.stride = hidden_;
    head_rows_.act.f = attended_.data(), head_rows_.act.stride = up(query, 32);
    inner_rows_.act.f = gated_.data(), inner_rows_.act.stride = inner_;
    int n = pool.count();
    partial_.resize(size_t(SMALL) * c.heads * n * (up(c.width, 16) + 2));
    own_hidden_.resize(n), own_heads_.resize(n), own_inner_.resize(n), own_normed_.resize(n), scratch_.resize(n);
    int widest = std::max({c.hidden, c.inner, query});
    for (int i = 0; i < n; i++) {
        own_hidden_[i].make(SMALL, c.hidden, bits), own_heads_[i].make(SMALL, query, bits);
        own_inner_[i].make(SMALL, c.inner, bits);
        own_normed_[i].resize(SMALL * hidden_);
        scratch_[i].resize(std::max(workspace(widest) + TOKENS * 32, attend_space(c.width) * 2) + 32);
    }
}

void Runner::step(const Batch& batch, const std::function<void(int, float*)>& take) {
    batch_ = &batch, take_ = &take, tokens_ = int(batch.ids.size());
    own_ = tokens_ >= OWN * pool_.count();
    plan();
    for (auto& n : next_) n.store(0, std::memory_order_relaxed);
    pool_.run([this](int tid) { work(tid); });
}

// Units of attention: tiles of at most QUERIES queries; a long context of few tokens is split among the threads.
void Runner::plan() {
    const Config& c = m_.c;
    int group = c.heads / c.kv_heads, longest = 0;
    units_.clear();
    for (const Run& r : batch_->runs) longest = std::max(longest, r.position + r.count);
    splits_ = small() ? std::clamp(longest / SPLIT_LEAST, 1, pool_.count()) : 1;
    int per = std::max(1, QUERIES / group);  // tokens of a tile
    for (const Run& r : batch_->runs)
        for (int t = r.count; t > 0; t -= per) {  // the last, which see most, first
            int first = std::max(0, t - per);
            for (int h = 0; h < c.heads; h += std::min(QUERIES, group - h % group)) {
                int heads = std::min(QUERIES, group - h % group), end = r.position + t;
                for (int s = 0; s < splits_; s++) {
                    int from = int(int64_t(end) * s / splits_) / PAGE * PAGE;
                    int to = s + 1 == splits_ ? end : int(int64_t(end) * (s + 1) / splits_) / PAGE * PAGE;
                    units_.push_back({&r, first, t - first, h, heads, from, to, s});
                }
            }
        }
}

void Runner::work(int tid) {
    const Config& c = m_.c;
    const int query = up(c.heads * c.width, 32);
    begin(tid);
    together();
    for (int i = 0; i < c.layers; i++) {
        const Layer& l = m_.layers[i];
        const Act& h = normed(tid, l.attention_norm, tokens_, nullptr);
        const Weight *qkv[] = {&l.q, &l.k, &l.v}, *o[] = {&l.o}, *down[] = {&l.down};
        products(tid, own_, qkv, 3, h, tokens_, projected_.data(), qkv_, false);
        together();
        heads(tid, l, i);
        pool_.barrier();
        attention(tid, l, i);
        pool_.barrier();
        if (splits_ > 1) {
            merge(tid);
            pool_.barrier();
        }
        const Act& a = quantised(tid, head_rows_, own_heads_, attended_.data(), query);
        products(tid, own_, o, 1, a, tokens_, x_.data(), hidden_, true);
        together();
        gated(tid, l, normed(tid, l.mlp_norm, tokens_, nullptr));
        together();
        const Act& g = quantised(tid, inner_rows_, own_inner_, gated_.data(), inner_);
        products(tid, own_, down, 1, g, tokens_, x_.data(), hidden_, true);
        together();
    }
    if (own_) pool_.barrier();
    int wanted = int(batch_->wanted.size());
    const Weight* out[] = {&m_.output()};
    for (int first = 0; first < wanted; first += LOGITS) {
        int rows = std::min(LOGITS, wanted - first);
        const Act& h = normed(tid, m_.norm, rows, &batch_->wanted[first]);
        products(tid, false, out, 1, h, rows, logits_.data(), out_, false);
        pool_.barrier();
        for (int r = tid; r < rows; r += pool_.count()) (*take_)(first + r, &logits_[r * out_]);
        pool_.barrier();
    }
}

void Runner::begin(int tid) {
    const Config& c = m_.c;
    Share mine(tokens_, tid, pool_.count());
    for (const Run& r : batch_->runs)
        for (int t = std::max(r.first, mine.begin); t < std::min(r.first + r.count, mine.end); t++) {
            unpack_row(m_.embed, batch_->ids[t], &x_[t * hidden_]);
            double position = r.position + t - r.first;
            for (int d = 0; d < c.width / 2; d++) {
                double angle = position * double(m_.frequencies[d]);
                cosine_[size_t(t) * (c.width / 2) + d] = float(std::cos(angle)) * c.rotary_factor;
                sine_[size_t(t) * (c.width / 2) + d] = float(std::sin(angle)) * c.rotary_factor;
            }
        }
}

// Of many tokens each thread takes its own through all of a layer but attention: nobody waits, and rows stay in its cache.
void Runner::together() {
    if (!own_) pool_.barrier();
}

// RMS norm of rows (rows at[i] of x, else the i-th), quantised. With few tokens each thread does all for itself,
// which is cheaper than to wait for the others.
const Act& Runner::normed(int tid, const float* weight, int rows, const int* at) {
    bool alone = rows <= SMALL;
    Rows& r = alone ? own_hidden_[tid] : hidden_rows_;
    float* f = alone ? own_normed_[tid].data() : normed_.data();
    Share mine(rows, alone ? 0 : tid, alone ? 1 : pool_.count());
    for (int t = mine.begin; t < mine.end; t++) {
        kernels_.norm(&x_[(at ? at[t] : t) * hidden_], weight, m_.c.eps, m_.c.hidden, f + t * hidden_);
        kernels_.quantize(f + t * hidden_, r.act, t);
    }
    if (alone) r.act.f = f, r.act.stride = hidden_;
    else if (at || !own_) pool_.barrier();
    return r.act;
}

const Act& Runner::quantised(int tid, Rows& shared, std::vector<Rows>& own, const float* x, size_t stride) {
    Rows& r = small() ? own[tid] : shared;
    Share mine(tokens_, small() ? 0 : tid, small() ? 1 : pool_.count());
    for (int t = mine.begin; t < mine.end; t++) kernels_.quantize(x + t * stride, r.act, t);
    if (small()) r.act.f = x, r.act.stride = stride;
    else together();
    return r.act;
}

void Runner::products(int tid, bool own, const Weight* const* w, int count, const Act& x, int rows, float* out,
                      size_t stride, bool add) {
    float* scratch = aligned(scratch_[tid]);
    int total = 0, first = 0;
    for (int i = 0; i < count; i++) total += (w[i]->panels() + 1) / 2;
    Share mine(total, tid, pool_.count());
    if (own) {
        Share tokens(tokens_, tid, pool_.count());
        mine = {total, 0, 1}, first = tokens.begin, rows = tokens.end - first, out += first * stride;
    }
    bool dense = rows > DENSE;
    int at = 0;
    for (int i = 0; i < count; i++) {
        int pairs = (w[i]->panels() + 1) / 2;
        for (int p = std::max(0, mine.begin - at); p < std::min(pairs, mine.end - at); p++) {
            float* o = out + p * 2 * ROWS;
            bool two = 2 * p + 1 < w[i]->panels();
            if (dense && two) {
                kernels_.pair(*w[i], 2 * p, *w[i], 2 * p + 1, x, first, rows, scratch, o, stride, add);
                continue;
            }
            kernels_.panel(*w[i], 2 * p, x, first, rows, scratch, o, stride, add);
            if (two) kernels_.panel(*w[i], 2 * p + 1, x, first, rows, scratch, o + ROWS, stride, add);
        }
        at += pairs;
        out += pairs * 2 * ROWS;
    }
}

void Runner::gated(int tid, const Layer& l, const Act& x) {
    float* both = aligned(scratch_[tid]);  // [tokens][gate 16, up 16]
    float* scratch = both + TOKENS * 32;
    Share mine = own_ ? Share(l.gate.panels(), 0, 1) : Share(l.gate.panels(), tid, pool_.count());
    Share tokens = own_ ? Share(tokens_, tid, pool_.count()) : Share(tokens_, 0, 1);
    const int first = tokens.begin, rows = tokens.end - first;
    for (int p = mine.begin; p < mine.end; p++) {
        if (rows > DENSE) {
            kernels_.pair(l.gate, p, l.up, p, x, first, rows, scratch, both, 32, false);
        } else {
            kernels_.panel(l.gate, p, x, first, rows, scratch, both, 32, false);
            kernels_.panel(l.up, p, x, first, rows, scratch, both + ROWS, 32, false);
        }
        for (int t = 0; t < rows; t++)
            kernels_.silu(both + t * 32, both + t * 32 + ROWS, ROWS, &gated_[(first + t) * inner_ + p * ROWS]);
    }
}

// Norms of heads, rotation, and keys and values into the cache.
void Runner::heads(int tid, const Layer& l, int layer) {
    const Config& c = m_.c;
    int group = c.heads / c.kv_heads, key = up(c.heads * c.width, 32), value = key + up(c.kv_heads * c.width, 32);
    Share mine(tokens_ * c.kv_heads, tid, pool_.count());
    if (own_) mine = Share(tokens_, tid, pool_.count()), mine.begin *= c.kv_heads, mine.end *= c.kv_heads;
    float scale = 1.0f / std::sqrt(float(c.width));
    for (const Run& r : batch_->runs)
        for (int i = std::max(r.first * c.kv_heads, mine.begin); i < std::min((r.first + r.count) * c.kv_heads, mine.end); i++) {
            int t = i / c.kv_heads, h = i % c.kv_heads, position = r.position + t - r.first;
            float* row = &projected_[t * qkv_];
            const float *cosine = &cosine_[size_t(t) * (c.width / 2)], *sine = &sine_[size_t(t) * (c.width / 2)];
            float* k = row + key + h * c.width;
            if (l.k_norm) kernels_.norm(k, l.k_norm, c.eps, c.width, k);
            kernels_.turn(k, c.width, cosine, sine, c.neighbours);
            for (int g = h * group; g < (h + 1) * group; g++) {
                float* q = row + g * c.width;
                if (l.q_norm) kernels_.norm(q, l.q_norm, c.eps, c.width, q);
                kernels_.turn(q, c.width, cosine, sine, c.neighbours);
                for (int d = 0; d < c.width; d++) q[d] *= scale;
            }
            uint8_t* page = cache_.data + cache_.layer * layer + cache_.page * r.pages[position / PAGE] + cache_.head * h;
            kernels_.store(k, row + value + h * c.width, c.width, page, position % PAGE, cache_.bytes);
        }
}

void Runner::attention(int tid, const Layer& l, int layer) {
    const Config& c = m_.c;
    int group = c.heads / c.kv_heads, wide = up(c.width, 16);
    size_t stride = up(c.heads * c.width, 32);
    float* scratch = aligned(scratch_[tid]);
    Attend a;
    a.base = cache_.data + cache_.layer * layer, a.page_bytes = cache_.page, a.width = c.width;
    a.bytes = cache_.bytes;
    a.out = scratch, a.scratch = scratch + QUERIES * wide;
    for (int i; (i = next_[layer].fetch_add(1, std::memory_order_relaxed)) < int(units_.size());) {
        const Unit& u = units_[i];
        a.head_offset = cache_.head * (u.head / group), a.pages = u.run->pages;
        a.queries = u.tokens * u.heads, a.cold = u.run->count == 1;
        int first = u.run->position + u.token;
        int low = l.window ? std::max(0, first - l.window + 1) : 0;
        a.from = std::max(u.from, low / PAGE * PAGE), a.to = std::max(u.to, a.from);
        for (int t = 0; t < u.tokens; t++)
            for (int h = 0; h < u.heads; h++) {
                int m = t * u.heads + h;
                a.q[m] = &projected_[(u.run->first + u.token + t) * qkv_ + (u.head + h) * c.width];
                a.end[m] = first + t + 1;
                a.begin[m] = l.window ? std::max(0, first + t + 1 - l.window) : 0;
            }
        kernels_.attend(a);
        for (int m = 0; m < a.queries; m++) {
            int t = u.run->first + u.token + m / u.heads, h = u.head + m % u.heads;
            if (splits_ > 1) {
                float* p = &partial_[((size_t(t) * c.heads + h) * splits_ + u.split) * (wide + 2)];
                p[0] = a.most[m], p[1] = a.total[m];
                std::memcpy(p + 2, a.out + m * wide, c.width * sizeof(float));
                continue;
            }
            float* out = &attended_[t * stride + h * c.width];
            for (int d = 0; d < c.width; d++) out[d] = a.out[m * wide + d] / a.total[m];
        }
    }
}

void Runner::merge(int tid) {
    const Config& c = m_.c;
    size_t stride = up(c.heads * c.width, 32), part = up(c.width, 16) + 2;
    Share mine(tokens_ * c.heads, tid, pool_.count());
    for (int i = mine.begin; i < mine.end; i++) {
        const float* p = &partial_[size_t(i) * splits_ * part];
        float most = -INFINITY, total = 0;
        for (int s = 0; s < splits_; s++) most = std::max(most, p[s * part]);
        float* out = &attended_[i / c.heads * stride + i % c.heads * c.width];
        std::fill_n(out, c.width, 0.0f);
        for (int s = 0; s < splits_; s++) {
            if (p[s * part + 1] == 0) continue;
            float by = std::exp(p[s * part] - most);
            total += by * p[s * part + 1];
            for (int d = 0; d < c.width; d++) out[d] += by * p[s * part + 2 + d];
        }
        for (int d = 0; d < c.width; d++) out[d] /= total;
    }
}

}  // namespace wherry
