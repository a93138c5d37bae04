// Requests in, tokens out: one thread that puts all sequences' next tokens, and parts of new prompts, into one step.
#pragma once
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "model.h"
#include "pages.h"
#include "sample.h"

namespace wherry {

enum class End : int { running = 0, stop = 1, length = 2, cancelled = 3, diverged = 4, closed = 5 };

struct Stats {
    int64_t steps, tokens, prompt_tokens, shared_tokens, waiting, running, idle_pages, pages;
};

class Engine {
  public:
    Engine(std::unique_ptr<Model> m, const Kernels& k, int threads, std::vector<int> cores, int pages, int sequences,
           int bits, bool bytes);
    ~Engine();
    // Number of the request, or the reason why it is refused. logits: [count - 1][vocab] of a text to score, else null.
    std::string submit(const int* tokens, int count, const Sampling& s, const int* stop, int stops, float* logits, int& id);
    // Waits at most `seconds` for `least` tokens; how many, and whether it ended. -1: no such request (any more).
    int read(int id, int* tokens, float* logprob, int least, int most, double seconds, End& end);
    void cancel(int id);   // at its next step; it is read to its end no more
    Stats stats();
    const Model& model() const { return *model_; }
    size_t cache_bytes() const { return cache_.size; }

  private:
    struct Request {
        int id = 0;
        std::vector<int> tokens;  // prompt, then what was written
        int prompt = 0, done = 0, shared = 0, order = 0;  // done: tokens whose keys are in the cache
        int limit = 0;                         // tokens that may be written
        std::vector<int> pages, stop;
        float* logits = nullptr;
        std::unique_ptr<Sampler> sampler;
        std::deque<std::pair<int, float>> out;
        End end = End::running;
        bool cancelled = false;
        size_t wanted = 1;  // tokens that the reader waits for
        int next = 0;  // what was drawn in this step
        float logprob = 0;
        std::condition_variable ready;
    };
    using Held = std::shared_ptr<Request>;
    void loop();
    void admit();
    void gather();
    void settle();
    void finish(Request& r, End end);

    std::unique_ptr<Model> model_;
    Cache cache_;
    Pages pages_;
    Pool pool_;
    Runner runner_;
    int sequences_;
    float (*peak_)(const float*, int);
    std::mutex mutex_;
    std::condition_variable work_;
    std::map<int, Held> requests_;  // until they are read to the end
    std::deque<Held> waiting_;
    std::vector<Held> running_;
    Batch batch_;
    struct Part { Request* request; int first, count, token; };  // of a request in this step; token: its first in the batch
    std::vector<Part> parts_;
    std::vector<std::pair<Request*, int>> takers_;  // of each wanted row: request, row of its logits or -1
    Stats stats_{};
    int last_ = 0;
    bool stop_ = false;
    std::thread thread_;
};

}  // namespace wherry
