#include "model.h"

#include <sys/mman.h>

#include <new>

namespace wherry {

Weight* Model::weight(Part part, int layer) {
    if (part == Part::embed) return &embed;
    if (part == Part::head) return &head;
    if (layer < 0 || layer >= c.layers) return nullptr;
    Layer& l = layers[layer];
    switch (part) {
        case Part::q: return &l.q;
        case Part::k: return &l.k;
        case Part::v: return &l.v;
        case Part::o: return &l.o;
        case Part::gate: return &l.gate;
        case Part::up: return &l.up;
        case Part::down: return &l.down;
        default: return nullptr;
    }
}

std::string Model::shape(Part part, int& n, int& k) const {
    int query = c.heads * c.width, key = c.kv_heads * c.width;
    switch (part) {
        case Part::embed:
        case Part::head: n = c.vocab, k = c.hidden; break;
        case Part::q: n = query, k = c.hidden; break;
        case Part::k:
        case Part::v: n = key, k = c.hidden; break;
        case Part::o: n = c.hidden, k = query; break;
        case Part::gate:
        case Part::up: n = c.inner, k = c.hidden; break;
        case Part::down: n = c.hidden, k = c.inner; break;
        default: return "this part is no matrix";
    }
    return "";
}

std::string Model::set(Part part, int layer, const float* values, int count, bool bias) {
    int want = 0, k = 0;
    const float** place = nullptr;
    Layer* l = layer >= 0 && layer < c.layers ? &layers[layer] : nullptr;
    if (bias) {
        Weight* w = weight(part, layer);
        if (!w || !shape(part, want, k).empty() || part == Part::embed) return "no such bias";
        place = &w->bias;
    } else if (part == Part::norm) {
        place = &norm, want = c.hidden;
    } else if (l && (part == Part::attention_norm || part == Part::mlp_norm)) {
        place = part == Part::attention_norm ? &l->attention_norm : &l->mlp_norm, want = c.hidden;
    } else if (l && (part == Part::post_attention_norm || part == Part::post_mlp_norm)) {
        place = part == Part::post_attention_norm ? &l->post_attention_norm : &l->post_mlp_norm, want = c.hidden;
    } else if (l && (part == Part::q_norm || part == Part::k_norm)) {
        place = part == Part::q_norm ? &l->q_norm : &l->k_norm, want = c.width;
    } else {
        return "no such vector";
    }
    if (count != want) return std::to_string(count) + " values, not " + std::to_string(want);
    vectors.emplace_back(values, values + count);
    *place = vectors.back().data();
    return "";
}

std::string Model::whole() const {
    auto full = [](const Weight& w) { return w.codes && w.filled == w.n; };
    if (!full(embed)) return "the embedding is not whole";
    if (head.codes && !full(head)) return "the head is not whole";
    if (!norm) return "the last norm is missing";
    for (int i = 0; i < c.layers; i++) {
        const Layer& l = layers[i];
        for (const Weight* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
            if (!full(*w)) return "a weight of layer " + std::to_string(i) + " is not whole";
        if (!l.attention_norm || !l.mlp_norm) return "a norm of layer " + std::to_string(i) + " is missing";
    }
    return "";
}

size_t Model::bytes() const {
    size_t sum = wherry::bytes(embed) + (head.codes ? wherry::bytes(head) : 0);
    for (const Layer& l : layers)
        for (const Weight* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) sum += wherry::bytes(*w);
    for (const auto& v : vectors) sum += v.size() * 4;
    return sum;
}

Cache::Cache(const Config& c, int count, bool in_bytes) : pages(count), bytes(in_bytes) {
    head = head_bytes(c.width, bytes), page = head * c.kv_heads, layer = page * count, size = layer * c.layers;
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data = static_cast<uint8_t*>(p);
}

Cache::~Cache() { munmap(data, size); }

}  // namespace wherry
