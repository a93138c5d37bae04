// Weights as panels of 16 output rows, activations as 8-bit rows, and the table of kernels of one instruction set.
//
//   integer panel   for each group of 32 inputs 64 * bits bytes: planes of 4, 2 and 1 bits (or whole bytes); byte j*64 +
//                   row*4 + i of a byte plane is the code of input 4*j + i. In a narrower plane of 8/width chunks,
//                   chunk c holds at bit width*s what a byte plane holds in its chunk c + s * (chunks).
//   scales          of the panel, beside it: see Scales
//   float panel     [k][16] of f16, bf16 or f32
//   w = scale * (code - zero), or scale * code + minimum
#pragma once
#include <cstddef>
#include <cstdint>

namespace wherry {

constexpr int ROWS = 16;    // of a panel
constexpr int GROUP = 32;   // inputs that share one activation scale
constexpr int SUPER = 256;  // inputs of a super-block
constexpr int PAGE = 32;    // positions of a page of the key-value cache
constexpr int QUERIES = 8;  // that one call of attention takes
constexpr int BLOCK = 256;  // positions whose scores are held at once

enum class Form : int { integer, f16, bf16, f32 };
enum class Scales : int {
    f16,   // per scale group: 16 halves (and 16 minimums)
    f32,   // the same in float
    super  // per 256 inputs: 16 halves d (and 16 dmin), then per scale group 16 int8 (and 16 int8): scale = d * int
};

inline int up(int n, int to) { return (n + to - 1) / to * to; }

struct Weight {
    int n = 0, k = 0;  // rows, inputs
    Form form = Form::integer;
    int bits = 0;
    int group = 0;  // inputs per scale: 16, or a multiple of 32, or at least k
    int zero = 0;   // of all codes, where there are no minimums
    bool min = false;
    Scales scales = Scales::f16;
    int kind = -1;  // ggml type it came from, -1: codes
    uint8_t *codes = nullptr, *scale = nullptr;
    size_t panel_codes = 0, panel_scales = 0;  // bytes per panel
    const float* bias = nullptr;
    int filled = 0;  // rows that were given

    int groups() const { return (k + GROUP - 1) / GROUP; }
    int scale_groups() const { return group >= k ? 1 : (k + group - 1) / group; }
    int panels() const { return (n + ROWS - 1) / ROWS; }
    bool half() const { return group == 16; }
};

// 32 inputs of a row: x = scale * q, and the sums of the two halves of q.
struct Block {
    int8_t q[GROUP];
    float scale;
    int16_t sum[2];
};

// Quantised rows, group by group: a kernel that goes along the groups finds all its rows beside each other. `f` are the
// rows themselves, for float weights. What this leaves of x may be rounded again: `rest`, which makes 16 bits of 8.
struct Act {
    int k = 0, groups = 0;
    int pitch = 0;  // blocks from group to group; an odd number spreads them over the cache
    Block* block = nullptr;
    const float* f = nullptr;
    size_t stride = 0;  // floats from row to row of f
    const Act* rest = nullptr;
    Block& at(int g, int row) const { return block[size_t(g) * pitch + row]; }
};

// One tile of attention: queries of one key-value head of one sequence, over positions [from, to).
struct Attend {
    const uint8_t* base = nullptr;  // this layer's cache
    size_t page_bytes = 0, head_offset = 0;
    const int* pages = nullptr;
    int width = 0;  // of a head
    bool bytes = false;  // keys and values of 8 bits
    float cap = 0;       // scores are cap * tanh(score / cap), unless it is 0
    int from = 0, to = 0, queries = 0;
    bool cold = false;  // nobody has just read these pages: fetch them ahead
    const float* q[QUERIES];          // scaled
    int begin[QUERIES], end[QUERIES];  // positions that each query sees
    float* out = nullptr;              // [queries][width up to 16], not normalised
    float most[QUERIES], total[QUERIES];
    float* scratch = nullptr;
};

struct Kernels {
    const char* name;
    // x [k] -> a row of `a`, and of a.rest where that is. k need not be a multiple of 32: the rest is zero.
    void (*quantize)(const float* x, const Act& a, int row);
    void (*norm)(const float* x, const float* w, float eps, int n, float* out);
    void (*silu)(const float* gate, const float* up, int n, float* out);
    void (*gelu)(const float* gate, const float* up, int n, float* out);  // by tanh
    void (*soften)(float* x, int n, float cap);  // x = cap * tanh(x / cap); n a multiple of 16
    float (*peak)(const float* x, int n);  // the largest; NaN where there is one
    // out[t * stride + 0..15] (+)= rows of a panel times `count` activations from `first` on. scratch: workspace()
    void (*panel)(const Weight& w, int panel, const Act& x, int first, int count, float* scratch, float* out,
                  size_t stride, bool add);
    // two panels, of one weight or of two with the same k: out[t * stride + 0..31]. For many activations.
    void (*pair)(const Weight& a, int pa, const Weight& b, int pb, const Act& x, int first, int count, float* scratch,
                 float* out, size_t stride, bool add);
    void (*turn)(float* head, int width, const float* cosine, const float* sine, bool neighbours);
    void (*store)(const float* key, const float* value, int width, uint8_t* page, int slot, bool bytes);
    void (*attend)(Attend& a);
};

// floats that `panel` and `pair` need for weights of up to k inputs; `attend` needs attend_space()
inline size_t workspace(int k) { return size_t(up(k, 256)) / 16 * ROWS * 4 + size_t(up(k, GROUP)) * 32 / 4 + 256; }
inline size_t attend_space(int width) { return size_t(QUERIES) * (up(width, 16) + BLOCK * 3) + 64; }
// keys and values of a page of one head: 2 of bf16, or 2 of bytes and a float scale of each for every position
inline size_t head_bytes(int width, bool bytes) {
    return size_t(PAGE) * up(width, 16) * 2 * (bytes ? 1 : 2) + (bytes ? PAGE * 2 * 4 : 0);
}

int isa_count();
const Kernels* isa(int i);  // nullptr: this processor cannot run it
const char* isa_name(int i);
const Kernels* best_isa();

}  // namespace wherry
