// One step: some tokens of some sequences through all layers, in phases that the threads share (threads.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace wherry {
namespace {

constexpr int DENSE = 16;      // tokens above which weights are unpacked two panels at a time
constexpr int OWN = 64;         // tokens for each thread from which on it takes its own through a layer, all panels
constexpr int SPLIT_LEAST = 512;  // positions of a part, when one sequence's context is split among threads

float* aligned(std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
}

}  // namespace

void Runner::Rows::make(int rows, int k, int bits, const float* f, size_t stride) {
    act.k = k, act.groups = (k + GROUP - 1) / GROUP, act.pitch = rows | 1;
    blocks.resize(size_t(act.pitch) * act.groups);
    act.block = blocks.data();
    if (!f) normed.resize(rows * stride), f = normed.data();
    act.f = f, act.stride = stride;
    if (bits <= 8) return;
    rest = std::make_unique<Rows>();
    rest->make(rows, k, bits - 8, f, stride);
    act.rest = &rest->act;
}

Runner::Runner(const Model& m, Cache& cache, const Kernels& kernels, Pool& pool, int bits)
    : m_(m), cache_(cache), kernels_(kernels), pool_(pool) {
    const Config& c = m.c;
    int query = c.heads * c.width;
    hidden_ = up(c.hidden, 32), inner_ = up(c.inner, 32), query_ = up(query, 32);
    qkv_ = query_ + 2 * up(c.kv_heads * c.width, 32), out_ = up(c.vocab, 32);
    x_.resize(TOKENS * hidden_), projected_.resize(TOKENS * qkv_);
    attended_.resize(TOKENS * query_), gated_.resize(TOKENS * inner_);
    cosine_.resize(size_t(TOKENS) * c.rotations * (c.width / 2)), sine_.resize(cosine_.size());
    logits_.resize(size_t(LOGITS) * out_);
    int n = pool.count(), widest = std::max({c.hidden, c.inner, query});
    partial_.resize(size_t(SMALL) * c.heads * n * (up(c.width, 16) + 2));
    own_.resize(n), scratch_.resize(n);
    auto make = [&](Operands& o, int rows) {
        o.hidden.make(rows, c.hidden, bits, nullptr, hidden_);
        o.heads.make(rows, query, bits, attended_.data(), query_);
        o.inner.make(rows, c.inner, bits, gated_.data(), inner_);
    };
    make(all_, TOKENS);
    for (int i = 0; i < n; i++) {
        make(own_[i], SMALL);
        scratch_[i].resize(std::max(workspace(widest) + TOKENS * 32, attend_space(c.width) * 2) + 32);
    }
}

void Runner::step(const Batch& batch, const std::function<void(int, float*)>& take) {
    batch_ = &batch, take_ = &take, tokens_ = int(batch.ids.size());
    many_ = tokens_ >= OWN * pool_.count();
    plan();
    pool_.run([this](int tid) { work(tid); });
}

// Units of attention: tiles of at most QUERIES queries; a long context of few tokens is split among the threads.
void Runner::plan() {
    const Config& c = m_.c;
    int group = c.heads / c.kv_heads, longest = 0;
    units_.clear(), run_.resize(tokens_);
    for (const Run& r : batch_->runs) {
        longest = std::max(longest, r.position + r.count);
        std::fill_n(run_.begin() + r.first, r.count, &r);
    }
    splits_ = tokens_ <= SMALL ? std::clamp(longest / SPLIT_LEAST, 1, pool_.count()) : 1;
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
    Operands& own = own_[tid];
    const Input heads{attended_.data(), query_, all_.heads, own.heads, tokens_};
    const Input inner{gated_.data(), inner_, all_.inner, own.inner, tokens_};
    tokens(tid, 1, [&](int t, int) { begin(t); });
    for (int i = 0; i < c.layers; i++) {
        const Layer& l = m_.layers[i];
        const Weight* qkv[] = {&l.q, &l.k, &l.v};
        const Input first{x_.data(), hidden_, all_.hidden, own.hidden, tokens_, l.attention_norm};
        products(tid, qkv, 3, first, projected_.data(), qkv_, false);
        tokens(tid, c.kv_heads, [&](int t, int h) { head(t, h, l, i); });
        if (many_) pool_.barrier();
        pool_.each(tid, int(units_.size()), [&](int u) { attend(tid, units_[u], l, i); });
        if (splits_ > 1) pool_.each(tid, tokens_ * c.heads, [&](int j) { merge(j); });
        residual(tid, l.o, heads, l.post_attention_norm);
        const Input second{x_.data(), hidden_, all_.hidden, own.hidden, tokens_, l.mlp_norm};
        gated(tid, l, second);
        residual(tid, l.down, inner, l.post_mlp_norm);
    }
    if (many_) pool_.barrier();
    int wanted = int(batch_->wanted.size());
    const Weight* out[] = {&m_.output()};
    for (int first = 0; first < wanted; first += LOGITS) {
        int rows = std::min(LOGITS, wanted - first);
        const Input last{x_.data(), hidden_, all_.hidden, own.hidden, rows, m_.norm, &batch_->wanted[first]};
        products(tid, out, 1, last, logits_.data(), out_, false);
        pool_.each(tid, rows, [&](int r) {
            if (c.logit_cap > 0) kernels_.soften(&logits_[r * out_], int(out_), c.logit_cap);
            (*take_)(first + r, &logits_[r * out_]);
        });
    }
}

// Each token's `parts`. Of many tokens each thread takes its own through all of a layer but attention: nobody waits, and
// rows stay in its cache.
template <class Take>
void Runner::tokens(int tid, int parts, const Take& take) {
    if (!many_) return pool_.each(tid, tokens_ * parts, [&](int i) { take(i / parts, i % parts); });
    Share mine(tokens_, tid, pool_.count());
    for (int i = mine.begin * parts; i < mine.end * parts; i++) take(i / parts, i % parts);
}

void Runner::begin(int t) {
    const Config& c = m_.c;
    unpack_row(m_.embed, batch_->ids[t], &x_[t * hidden_]);
    for (int d = 0; d < c.hidden; d++) x_[t * hidden_ + d] *= c.embed_scale;
    double position = run_[t]->position + t - run_[t]->first;
    size_t at = size_t(t) * c.rotations * (c.width / 2);
    for (const Rotation& table : m_.rotations)
        for (int d = 0; d < c.width / 2; d++, at++) {
            double angle = position * double(table.frequencies[d]);
            cosine_[at] = float(std::cos(angle)) * table.factor, sine_[at] = float(std::sin(angle)) * table.factor;
        }
}

// One row of what is multiplied: normed where it has a norm, and quantised.
void Runner::fill(const Input& in, int row, Rows& to) {
    const float* x = in.x + (in.at ? in.at[row] : row) * in.stride;
    if (in.norm) {
        float* normed = &to.normed[row * hidden_];
        kernels_.norm(x, in.norm, m_.c.eps, m_.c.hidden, normed);
        x = normed;
    }
    kernels_.quantize(x, to.act, row);
}

// take(item, act, rows) for each item of weights: with few rows each thread makes all of them for itself once it has an
// item, which is cheaper than to wait for the others; with many it has rows of its own, and all items.
template <class Take>
void Runner::multiply(int tid, const Input& in, int items, const Take& take) {
    if (many_ && !in.at) {
        Share mine(in.rows, tid, pool_.count());
        for (int r = mine.begin; r < mine.end; r++) fill(in, r, in.all);
        for (int i = 0; i < items; i++) take(i, in.all.act, mine);
        return;
    }
    bool few = in.rows <= SMALL, made = !few;
    if (!few) pool_.each(tid, in.rows, [&](int r) { fill(in, r, in.all); });
    Rows& x = few ? in.own : in.all;
    pool_.each(tid, items, [&](int i) {
        for (int r = 0; !made && r < in.rows; r++) fill(in, r, x);
        made = true;
        take(i, x.act, Share(in.rows, 0, 1));
    });
}

// The weights' rows beside each other in `out`; an item is two panels of one weight.
void Runner::products(int tid, const Weight* const* w, int count, const Input& in, float* out, size_t stride, bool add) {
    auto pairs = [](const Weight& weight) { return (weight.panels() + 1) / 2; };
    float* scratch = aligned(scratch_[tid]);
    int items = 0;
    for (int i = 0; i < count; i++) items += pairs(*w[i]);
    multiply(tid, in, items, [&](int item, const Act& x, Share mine) {
        int p = item, rows = mine.end - mine.begin;
        const Weight* const* of = w;
        while (p >= pairs(**of)) p -= pairs(**of++);
        float* o = out + mine.begin * stride + item * 2 * ROWS;
        bool two = 2 * p + 1 < (*of)->panels();
        if (rows > DENSE && two) {
            kernels_.pair(**of, 2 * p, **of, 2 * p + 1, x, mine.begin, rows, scratch, o, stride, add);
            return;
        }
        kernels_.panel(**of, 2 * p, x, mine.begin, rows, scratch, o, stride, add);
        if (two) kernels_.panel(**of, 2 * p + 1, x, mine.begin, rows, scratch, o + ROWS, stride, add);
    });
}

// x_ += the product, or its norm where the layer has one.
void Runner::residual(int tid, const Weight& w, const Input& in, const float* norm) {
    const Weight* one[] = {&w};
    if (!norm) return products(tid, one, 1, in, x_.data(), hidden_, true);
    float* sums = all_.hidden.normed.data();
    products(tid, one, 1, in, sums, hidden_, false);
    tokens(tid, 1, [&](int t, int) {
        float *row = sums + t * hidden_, *to = &x_[t * hidden_];
        kernels_.norm(row, norm, m_.c.eps, m_.c.hidden, row);
        for (int d = 0; d < m_.c.hidden; d++) to[d] += row[d];
    });
}

void Runner::gated(int tid, const Layer& l, const Input& in) {
    float* both = aligned(scratch_[tid]);  // [tokens][gate 16, up 16]
    float* scratch = both + TOKENS * 32;
    const auto gate = m_.c.gelu ? kernels_.gelu : kernels_.silu;
    multiply(tid, in, l.gate.panels(), [&](int p, const Act& x, Share mine) {
        int rows = mine.end - mine.begin;
        if (rows > DENSE) {
            kernels_.pair(l.gate, p, l.up, p, x, mine.begin, rows, scratch, both, 32, false);
        } else {
            kernels_.panel(l.gate, p, x, mine.begin, rows, scratch, both, 32, false);
            kernels_.panel(l.up, p, x, mine.begin, rows, scratch, both + ROWS, 32, false);
        }
        for (int t = 0; t < rows; t++)
            gate(both + t * 32, both + t * 32 + ROWS, ROWS, &gated_[(mine.begin + t) * inner_ + p * ROWS]);
    });
}

// Of the h-th head of keys of a token and its queries: norms, rotation, and keys and values into the cache.
void Runner::head(int t, int h, const Layer& l, int layer) {
    const Config& c = m_.c;
    const Run& r = *run_[t];
    int group = c.heads / c.kv_heads, position = r.position + t - r.first;
    size_t key = query_, value = key + up(c.kv_heads * c.width, 32);
    float* row = &projected_[t * qkv_];
    const size_t table = (size_t(t) * c.rotations + l.rotation) * (c.width / 2);
    const float *cosine = &cosine_[table], *sine = &sine_[table];
    float* k = row + key + h * c.width;
    if (l.k_norm) kernels_.norm(k, l.k_norm, c.eps, c.width, k);
    kernels_.turn(k, c.width, cosine, sine, c.neighbours);
    for (int g = h * group; g < (h + 1) * group; g++) {
        float* q = row + g * c.width;
        if (l.q_norm) kernels_.norm(q, l.q_norm, c.eps, c.width, q);
        kernels_.turn(q, c.width, cosine, sine, c.neighbours);
        for (int d = 0; d < c.width; d++) q[d] *= c.query_scale;
    }
    uint8_t* page = cache_.data + cache_.layer * layer + cache_.page * r.pages[position / PAGE] + cache_.head * h;
    kernels_.store(k, row + value + h * c.width, c.width, page, position % PAGE, cache_.bytes);
}

void Runner::attend(int tid, const Unit& u, const Layer& l, int layer) {
    const Config& c = m_.c;
    int group = c.heads / c.kv_heads, wide = up(c.width, 16);
    float* scratch = aligned(scratch_[tid]);
    Attend a;
    a.base = cache_.data + cache_.layer * layer, a.page_bytes = cache_.page, a.width = c.width;
    a.bytes = cache_.bytes, a.cap = c.attention_cap;
    a.out = scratch, a.scratch = scratch + QUERIES * wide;
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
        float* out = &attended_[t * query_ + h * c.width];
        for (int d = 0; d < c.width; d++) out[d] = a.out[m * wide + d] / a.total[m];
    }
}

// The parts of a split context, of one head of one token.
void Runner::merge(int i) {
    const Config& c = m_.c;
    size_t part = up(c.width, 16) + 2;
    const float* p = &partial_[size_t(i) * splits_ * part];
    float most = -INFINITY, total = 0;
    for (int s = 0; s < splits_; s++) most = std::max(most, p[s * part]);
    float* out = &attended_[i / c.heads * query_ + i % c.heads * c.width];
    std::fill_n(out, c.width, 0.0f);
    for (int s = 0; s < splits_; s++) {
        if (p[s * part + 1] == 0) continue;
        float by = std::exp(p[s * part] - most);
        total += by * p[s * part + 1];
        for (int d = 0; d < c.width; d++) out[d] += by * p[s * part + 2 + d];
    }
    for (int d = 0; d < c.width; d++) out[d] /= total;
}

}  // namespace wherry
