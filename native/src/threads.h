// Threads that run one function together, in phases. They spin a while and then sleep, so that a core that others need
// is not burned; what a thread off its core has not begun is done by the others.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace wherry {

// Of `count` items those of the `part`-th of `parts`.
struct Share {
    int begin, end;
    Share(int count, int part, int parts)
        : begin(int(int64_t(count) * part / parts)), end(int(int64_t(count) * (part + 1) / parts)) {}
};

class Pool {
  public:
    // `count` threads including the one that calls run(). cores: pin thread i to cores[i]; empty: where the system likes.
    Pool(int count, std::vector<int> cores);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    int count() const { return count_; }
    void pin(int thread) const;                    // the calling thread, as thread `thread`
    void run(const std::function<void(int)>& f);   // f(0..count-1), then all have returned
    void barrier();                                // inside of f

    // Inside of f, a phase of `count` items: take(item) for those of the thread's own share, then for what is left of the
    // others'; returns when all are done. All threads go through the same phases. One that comes late touches nothing
    // of a phase that is over, for it gets no item of it: whatever take() reads must be read in take().
    template <class Take>
    void each(int tid, int count, const Take& take) {
        uint32_t phase = ++slots_[tid].phase;
        int done = 0;
        for (int i = 0; i < count_; i++) {
            int part = (tid + i) % count_;
            for (int item; (item = claim(part, phase, Share(count, part, count_))) >= 0; done++) take(item);
        }
        finish(phase, done, count);
    }

  private:
    struct alignas(64) Slot {
        std::atomic<uint64_t> next{0};  // phase << 32 | item of this thread's share that nobody has
        uint32_t phase = 0;             // in which the thread is
    };
    int claim(int part, uint32_t phase, Share share);
    void finish(uint32_t phase, int done, int count);
    void work(int i);
    int count_;
    std::vector<int> cores_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* f_ = nullptr;
    alignas(64) std::atomic<int> turn_{0};   // a new one: a function to run
    alignas(64) std::atomic<int> phase_{0};  // of the barrier
    alignas(64) std::atomic<int> arrived_{0};
    std::unique_ptr<Slot[]> slots_;
    alignas(64) std::atomic<uint32_t> over_{0};  // the last phase that is; they may wrap around
    alignas(64) std::atomic<int> done_{0};       // items of the next
    std::atomic<bool> stop_{false};
};

}  // namespace wherry
