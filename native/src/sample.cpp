#include "sample.h"

#include <algorithm>
#include <cmath>

namespace wherry {
namespace {

uint64_t mixed(uint64_t& x) {  // splitmix64: a seed's neighbours become unlike
    uint64_t z = (x += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

}  // namespace

Sampler::Sampler(const Sampling& s, const int* prompt, int count) : s_(s) {
    uint64_t seed = s.seed;
    state_[0] = mixed(seed), state_[1] = mixed(seed);
    if (s.repeat != 1)
        for (int i = 0; i < count; i++) seen_[prompt[i]]++;
}

uint64_t Sampler::random() {  // xoroshiro128+. Source: Blackman, Vigna, arXiv:1805.01407
    uint64_t a = state_[0], b = state_[1], sum = a + b;
    b ^= a;
    state_[0] = (a << 24 | a >> 40) ^ b ^ (b << 16), state_[1] = b << 37 | b >> 27;
    return sum;
}

int Sampler::draw(float* logits, int vocab, float (*peak)(const float*, int), float* logprob) {
    if (s_.repeat != 1)
        for (const auto& [token, n] : seen_) logits[token] *= logits[token] > 0 ? 1 / s_.repeat : s_.repeat;
    if (s_.presence != 0 || s_.frequency != 0)
        for (const auto& [token, n] : written_) logits[token] -= s_.presence + s_.frequency * float(n);
    const float most = peak(logits, vocab);
    if (!(most > -INFINITY) || most == INFINITY) return -1;
    int chosen = 0;
    while (logits[chosen] != most) chosen++;
    if (s_.temperature > 0) {
        float by = 1 / s_.temperature;
        auto likelier = [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
        kept_.clear();
        double total = 0;
        const float least = most - 87 * s_.temperature;  // below it the share is less than e^-87
        for (int i = 0; i < vocab; i++) {
            if (logits[i] < least) continue;
            float p = std::exp((logits[i] - most) * by);
            total += p;
            kept_.push_back({p, i});
        }
        if (s_.top_k > 0 && size_t(s_.top_k) < kept_.size()) {
            std::nth_element(kept_.begin(), kept_.begin() + s_.top_k - 1, kept_.end(), likelier);
            kept_.resize(s_.top_k);
            total = 0;
            for (const auto& k : kept_) total += k.first;
        }
        if (s_.min_p > 0) {  // of the likeliest's probability. Source: arXiv:2407.01082
            std::erase_if(kept_, [&](const auto& k) { return k.first < s_.min_p; });
            total = 0;
            for (const auto& k : kept_) total += k.first;
        }
        if (s_.top_p < 1) {  // the fewest whose sum reaches top_p; sorted as far as is needed
            size_t sorted = 0;
            double sum = 0;
            for (size_t i = 0; i < kept_.size(); i++) {
                if (i == sorted) {
                    size_t more = std::min(kept_.size(), std::max<size_t>(64, sorted * 4));
                    std::partial_sort(kept_.begin() + sorted, kept_.begin() + more, kept_.end(), likelier);
                    sorted = more;
                }
                sum += kept_[i].first;
                if (sum >= s_.top_p * total) {
                    kept_.resize(i + 1);
                    break;
                }
            }
            total = 0;
            for (const auto& k : kept_) total += k.first;
        }
        double at = double(random() >> 11) * 0x1p-53 * total;
        chosen = kept_.back().second;
        for (const auto& k : kept_)
            if ((at -= k.first) < 0) {
                chosen = k.second;
                break;
            }
    }
    if (s_.logprobs) {
        double sum = 0;
        for (int i = 0; i < vocab; i++) sum += std::exp(logits[i] - most);
        *logprob = float(logits[chosen] - most - std::log(sum));
    }
    if (s_.repeat != 1) seen_[chosen]++;
    if (s_.presence != 0 || s_.frequency != 0) written_[chosen]++;
    return chosen;
}

}  // namespace wherry
