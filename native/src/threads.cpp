#include "threads.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace wherry {
namespace {

constexpr int SPINS = 2000;  // some 20 to 100 us

void wait(std::atomic<int>& a, int old) {
    for (int i = 0; i < SPINS; i++) {
        if (a.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }
    while (a.load(std::memory_order_acquire) == old) a.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int count, std::vector<int> cores) : count_(count), cores_(std::move(cores)) {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    stop_.store(true);
    turn_.fetch_add(1);
    turn_.notify_all();
    for (std::thread& t : threads_) t.join();
}

void Pool::pin(int thread) const {
#ifdef __linux__
    if (cores_.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cores_[size_t(thread) % cores_.size()], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)thread;
#endif
}

void Pool::run(const std::function<void(int)>& f) {
    f_ = &f;
    turn_.fetch_add(1, std::memory_order_release);
    turn_.notify_all();
    f(0);
    barrier();
}

void Pool::barrier() {
    if (count_ == 1) return;
    int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait(phase_, phase);
    }
}

void Pool::work(int i) {
    pin(i);
    for (int seen = 0;;) {
        wait(turn_, seen);
        seen++;
        if (stop_.load()) return;
        (*f_)(i);
        barrier();
    }
}

}  // namespace wherry
