// One token from logits.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace wherry {

struct Sampling {
    int max_tokens = 128;
    float temperature = 0;  // 0: the likeliest
    float top_p = 1, min_p = 0;
    int top_k = 0;
    float repeat = 1;     // divides positive logits of tokens that were there, multiplies negative ones
    float presence = 0;   // subtracted once for a token that was written
    float frequency = 0;  // subtracted as often as it was written
    uint64_t seed = 0;
    int logprobs = 0;  // whether log-probabilities are wanted: a pass over the vocabulary for each token
};

class Sampler {
  public:
    Sampler(const Sampling& s, const int* prompt, int count);
    // peak: finds the largest of n. logits are changed where there are penalties. -1: NaN, or nothing but -infinity.
    int draw(float* logits, int vocab, float (*peak)(const float*, int), float* logprob);

  private:
    uint64_t random();
    Sampling s_;
    uint64_t state_[2];
    std::unordered_map<int, int> written_, seen_;
    std::vector<std::pair<float, int>> kept_;
};

}  // namespace wherry
