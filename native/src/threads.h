// Threads that run one function together, with a barrier. They spin a while and then sleep, so that a core that
// others need is not burned.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace wherry {

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

  private:
    void work(int i);
    int count_;
    std::vector<int> cores_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* f_ = nullptr;
    alignas(64) std::atomic<int> turn_{0};   // a new one: a function to run
    alignas(64) std::atomic<int> phase_{0};  // of the barrier
    alignas(64) std::atomic<int> arrived_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace wherry
