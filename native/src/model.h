// A decoder of the Llama family or Gemma as data: sizes, weights, and what differs from layer to layer.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "pack.h"
#include "threads.h"

namespace wherry {

struct Config {
    int layers, hidden, inner, heads, kv_heads, width, vocab, context;
    int neighbours;  // rotary pairs are neighbours (llama in GGUF), else the two halves of a head
    int rotations;   // tables of frequencies, of which each layer has one
    int gelu;        // the gate's activation: gelu by tanh, else silu
    float eps;
    float embed_scale, query_scale;  // that these are multiplied with
    float attention_cap, logit_cap;  // c tanh(x / c) of scores and of logits; 0: as they are
};

struct Rotation {
    std::vector<float> frequencies;  // [width / 2]
    float factor = 1;                // of cosine and sine (YaRN)
};

struct Layer {
    Weight q, k, v, o, gate, up, down;
    const float *attention_norm = nullptr, *mlp_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr;
    const float *post_attention_norm = nullptr, *post_mlp_norm = nullptr;  // of what is added to the residual stream
    int rotation = 0;
    int window = 0;  // positions that a token sees; 0: all
};

enum class Part : int {
    embed, head, norm, attention_norm, mlp_norm, q, k, v, o, gate, up, down, q_norm, k_norm, post_attention_norm,
    post_mlp_norm, parts
};

struct Model {
    Config c;
    std::vector<Layer> layers;
    std::vector<Rotation> rotations;
    Weight embed, head;
    const float* norm = nullptr;
    std::deque<std::vector<float>> vectors;  // norms and biases
    Memory memory;                           // of the weights

    explicit Model(const Config& config) : c(config), layers(config.layers), rotations(config.rotations) {}
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    Weight* weight(Part part, int layer);               // nullptr: there is none
    std::string set(Part part, int layer, const float* values, int count, bool bias);
    std::string shape(Part part, int& n, int& k) const;  // what a weight must be
    std::string whole() const;                           // empty, or what is missing
    const Weight& output() const { return head.codes ? head : embed; }
    size_t bytes() const;
};

// Consecutive tokens of one sequence within a batch.
struct Run {
    int first, count, position;
    const int* pages;
};

struct Batch {
    std::vector<int> ids;
    std::vector<Run> runs;
    std::vector<int> wanted;  // tokens whose logits are asked for, ascending
    void clear() { ids.clear(), runs.clear(), wanted.clear(); }
};

// Keys and values in pages; memory is taken by the system when a page is first written.
struct Cache {
    uint8_t* data = nullptr;
    size_t head = 0, page = 0, layer = 0, size = 0;  // bytes
    int pages = 0;
    bool bytes = false;  // of 8 bits, else bf16
    Cache(const Config& c, int pages, bool bytes);
    ~Cache();
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;
};

constexpr int TOKENS = 256;  // of one step
constexpr int LOGITS = 32;   // rows of logits that are held at once
constexpr int SMALL = 2;     // up to so many tokens each thread quantises all of them by itself

// Computes steps. take(row, logits) is called from any of the threads, once for each wanted token.
class Runner {
  public:
    // bits: that activations are rounded to, 8 or 16
    Runner(const Model& m, Cache& cache, const Kernels& kernels, Pool& pool, int bits);
    void step(const Batch& batch, const std::function<void(int, float*)>& take);

  private:
    struct Rows {  // quantised activations and their memory
        std::vector<Block> blocks;
        std::vector<float> normed;
        Act act;
        std::unique_ptr<Rows> rest;
        void make(int rows, int k, int bits, const float* f, size_t stride);  // f: what is quantised, or nullptr: `normed`
    };
    struct Operands {
        Rows hidden, heads, inner;
    };
    struct Input {  // rows of x, or rows `at` of it, that weights are multiplied with
        const float* x;
        size_t stride;
        Rows &all, &own;  // where they are quantised, by all threads and by one
        int rows;
        const float* norm = nullptr;
        const int* at = nullptr;
    };
    struct Unit {  // of attention: queries of `heads` heads from `head` on times `tokens` tokens
        const Run* run;
        int token, tokens, head, heads, from, to, split;
    };
    void work(int tid);
    void plan();
    template <class Take>
    void tokens(int tid, int parts, const Take& take);
    template <class Take>
    void multiply(int tid, const Input& in, int items, const Take& take);
    void begin(int t);
    void fill(const Input& in, int row, Rows& to);
    void products(int tid, const Weight* const* w, int count, const Input& in, float* out, size_t stride, bool add);
    void residual(int tid, const Weight& w, const Input& in, const float* norm);
    void gated(int tid, const Layer& l, const Input& in);
    void head(int t, int h, const Layer& l, int layer);
    void attend(int tid, const Unit& u, const Layer& l, int layer);
    void merge(int i);

    const Model& m_;
    Cache& cache_;
    const Kernels& kernels_;
    Pool& pool_;
    const Batch* batch_ = nullptr;
    const std::function<void(int, float*)>* take_ = nullptr;
    int tokens_ = 0, splits_ = 1;
    bool many_ = false;                          // each thread has tokens of its own, else rows of weights
    size_t hidden_, inner_, query_, qkv_, out_;  // strides
    std::vector<float> x_, projected_, attended_, gated_, cosine_, sine_, logits_, partial_;
    Operands all_;
    std::vector<Operands> own_;  // of one thread each
    std::vector<std::vector<float>> scratch_;
    std::vector<Unit> units_;
    std::vector<const Run*> run_;  // of each token
};

}  // namespace wherry
