// The C interface that Python calls. Functions return 0 or a positive number; on failure -1, and wn_error says why.
#include <cstring>
#include <new>
#include <string>

#include "engine.h"

using namespace wherry;

namespace {
thread_local std::string failure;
int fail(const std::string& reason) {
    failure = reason;
    return -1;
}
template <class F> int guarded(F&& f) {  // no exception leaves the library
    try {
        return f();
    } catch (const std::bad_alloc&) {
        return fail("out of memory");
    } catch (const std::exception& e) {
        return fail(e.what());
    }
}
const Kernels* chosen(int i) { return i < 0 ? best_isa() : i < isa_count() ? isa(i) : nullptr; }

struct Handle {  // a model that is filled, then an engine that has it
    std::unique_ptr<Model> model;
    std::unique_ptr<Engine> engine;
};
}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* wn_error() { return failure.c_str(); }
API int wn_version() { return 5; }
API int wn_isas() { return isa_count(); }
API const char* wn_isa_name(int i) { return i < 0 ? best_isa()->name : i < isa_count() ? isa_name(i) : ""; }
API int wn_isa_runs(int i) { return i >= 0 && i < isa_count() && isa(i) != nullptr; }

// frequencies [rotations][width / 2], factors [rotations]; windows and the number of its rotation for each layer
API Handle* wn_model(const Config* c, const float* frequencies, const float* factors, const int* windows, const int* rotation) {
    auto sane = [](int v, int most) { return v >= 1 && v <= most; };
    if (!sane(c->layers, 1 << 12) || !sane(c->hidden, 1 << 17) || !sane(c->inner, 1 << 19) || !sane(c->heads, 1 << 12) ||
        !sane(c->kv_heads, c->heads) || !sane(c->width, 1 << 10) || !sane(c->vocab, 1 << 22) || !sane(c->context, 1 << 24) ||
        c->heads % c->kv_heads || c->width % 2 || !sane(c->rotations, 16)) {
        fail("sizes that no model has");
        return nullptr;
    }
    Handle* h = nullptr;
    guarded([&] {
        auto made = std::make_unique<Handle>();
        made->model = std::make_unique<Model>(*c);
        for (Rotation& table : made->model->rotations) {
            table.frequencies.assign(frequencies, frequencies + c->width / 2), table.factor = *factors++;
            frequencies += c->width / 2;
        }
        for (int i = 0; i < c->layers; i++) {
            if (!sane(rotation[i] + 1, c->rotations)) return fail("a layer's rotation that there is not");
            made->model->layers[i].window = windows[i], made->model->layers[i].rotation = rotation[i];
        }
        h = made.release();
        return 0;
    });
    return h;
}

API int wn_vector(Handle* h, int part, int layer, int bias, const float* values, int count) {
    return guarded([&] {
        if (!h->model || part < 0 || part >= int(Part::parts)) return fail("no such vector");
        std::string reason = h->model->set(Part(part), layer, values, count, bias);
        return reason.empty() ? 0 : fail(reason);
    });
}

// Prepares a weight for blocks of a ggml type (bits 0), or for codes.
API int wn_weight(Handle* h, int part, int layer, int n, int k, int kind, int bits, int group, int min, int zero, int half) {
    return guarded([&] {
        Weight* w = h->model && part >= 0 && part < int(Part::parts) ? h->model->weight(Part(part), layer) : nullptr;
        if (!w || w->codes) return fail("no such weight, or there already");
        int rows = 0, inputs = 0;
        std::string reason = h->model->shape(Part(part), rows, inputs);
        if (reason.empty() && (rows != n || inputs != k)) reason = "a weight of another shape than the model's";
        if (reason.empty()) reason = bits ? plan_codes(*w, bits, group, min, zero, half, n, k) : plan_blocks(*w, kind, n, k);
        if (!reason.empty()) return fail(reason);
        allocate(*w, h->model->memory);
        return 0;
    });
}

API int wn_fill(Handle* h, int part, int layer, const uint8_t* data, int64_t size, const float* scale, const float* minimum,
                int first, int count) {
    return guarded([&] {
        Weight* w = h->model && part >= 0 && part < int(Part::parts) ? h->model->weight(Part(part), layer) : nullptr;
        if (!w || !w->codes || first != w->filled || count < 1 || count > w->n - first) return fail("rows out of order");
        size_t row = w->kind >= 0 ? row_bytes(w->kind, w->k) : size_t(w->k);
        if (size_t(size) != row * size_t(count)) return fail("rows of another size");
        if (w->kind >= 0) fill_blocks(*w, data, first, count);
        else fill_codes(*w, data, scale, minimum, first, count);
        return 0;
    });
}

API int wn_start(Handle* h, int isa, int threads, const int* cores, int core_count, int pages, int sequences,
                 int bits, int cache_bits) {
    return guarded([&] {
        const Kernels* k = chosen(isa);
        if (!k) return fail("this processor cannot run these kernels");
        if (!h->model || threads < 1 || threads > 1024 || pages < 1 || sequences < 1 || sequences > TOKENS / 2)
            return fail("threads, pages or sequences out of range");
        if (bits != 8 && bits != 16) return fail("activations of other than 8 or 16 bits");
        if (cache_bits != 8 && cache_bits != 16) return fail("keys and values of other than 8 or 16 bits");
        std::string missing = h->model->whole();
        if (!missing.empty()) return fail(missing);
        h->engine = std::make_unique<Engine>(std::move(h->model), *k, threads, std::vector<int>(cores, cores + core_count),
                                             pages, sequences, bits, cache_bits == 8);
        return 0;
    });
}

API int wn_submit(Handle* h, const int* tokens, int count, const Sampling* s, const int* stop, int stops, float* logits) {
    return guarded([&] {
        int id = 0;
        std::string reason = h->engine->submit(tokens, count, *s, stop, stops, logits, id);
        return reason.empty() ? id : fail(reason);
    });
}

API int wn_read(Handle* h, int id, int* tokens, float* logprob, int least, int most, double seconds, int* end) {
    return guarded([&] {
        End e = End::running;
        int n = h->engine->read(id, tokens, logprob, least, most, seconds, e);
        *end = int(e);
        return n < 0 ? fail("no such request") : n;
    });
}

API void wn_cancel(Handle* h, int id) { h->engine->cancel(id); }
API void wn_stats(Handle* h, Stats* s) { *s = h->engine->stats(); }
API int64_t wn_bytes(Handle* h, int cache) {
    if (cache) return h->engine ? int64_t(h->engine->cache_bytes()) : 0;
    return int64_t(h->engine ? h->engine->model().bytes() : h->model->bytes());
}
API void wn_free(Handle* h) { delete h; }

// ---- for tests: one product of one weight, by the kernels of one instruction set

struct Alone : Weight {
    Memory memory;
};

API Alone* wn_alone(int n, int k, int kind, int bits, int group, int min, int zero, int half, const uint8_t* data,
                     const float* scale, const float* minimum) {
    Alone* made = nullptr;
    guarded([&] {
        auto w = std::make_unique<Alone>();
        std::string reason = bits ? plan_codes(*w, bits, group, min, zero, half, n, k) : plan_blocks(*w, kind, n, k);
        if (!reason.empty()) return fail(reason);
        allocate(*w, w->memory);
        if (bits) fill_codes(*w, data, scale, minimum, 0, n);
        else fill_blocks(*w, data, 0, n);
        made = w.release();
        return 0;
    });
    return made;
}
API void wn_alone_free(Alone* w) { delete w; }
API int64_t wn_alone_bytes(const Alone* w) { return int64_t(bytes(*w)); }
API void wn_row(const Alone* w, int row, float* out) { unpack_row(*w, row, out); }

// y [tokens][n up to 32] = x [tokens][k] times the weight; dense: two panels at a time. q [levels][tokens][k up to 32],
// scale [levels][tokens][groups]: what x became, rounded once, or twice (levels 2: 16 bits).
API int wn_product(const Alone* w, int which, const float* x, int tokens, int dense, int levels, float* y, int8_t* q,
                   float* scale) {
    return guarded([&] {
        const Kernels* kernels = chosen(which);
        if (!kernels) return fail("this processor cannot run these kernels");
        Act a;
        a.k = w->k, a.groups = w->groups(), a.pitch = tokens | 1, a.f = x, a.stride = w->k;
        std::vector<Block> blocks(size_t(a.pitch) * a.groups * 2);
        a.block = blocks.data();
        Act rest = a;
        rest.block += size_t(a.pitch) * a.groups;
        if (levels == 2) a.rest = &rest;
        for (int t = 0; t < tokens; t++) kernels->quantize(x + size_t(t) * w->k, a, t);
        for (const Act* part = &a; part; part = part->rest)
            for (int t = 0; t < tokens; t++)
                for (int g = 0; g < a.groups; g++, q += GROUP) {
                    std::memcpy(q, part->at(g, t).q, GROUP);
                    *scale++ = part->at(g, t).scale;
                }
        std::vector<float> space(workspace(w->k) + 32);
        float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
        size_t stride = size_t(up(w->n, 32));
        for (int p = 0; p < w->panels(); p += 2) {
            float* out = y + p * ROWS;
            if (dense && p + 1 < w->panels()) {
                kernels->pair(*w, p, *w, p + 1, a, 0, tokens, scratch, out, stride, false);
                continue;
            }
            kernels->panel(*w, p, a, 0, tokens, scratch, out, stride, false);
            if (p + 1 < w->panels()) kernels->panel(*w, p + 1, a, 0, tokens, scratch, out + ROWS, stride, false);
        }
        return 0;
    });
}
