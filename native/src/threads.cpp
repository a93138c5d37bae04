#include "threads.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace wherry {
namespace {

constexpr int SPINS = 2000;  // some 20 to 100 us

template <class T>
void wait(std::atomic<T>& a, T old) {
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

int after(uint32_t a, uint32_t b) { return int32_t(a - b); }  // phases wrap around

}  // namespace

Pool::Pool(int count, std::vector<int> cores) : count_(count), cores_(std::move(cores)), slots_(new Slot[size_t(count)]) {
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

// An item of the `part`-th share that nobody has, or -1.
int Pool::claim(int part, uint32_t phase, Share share) {
    std::atomic<uint64_t>& next = slots_[part].next;
    for (uint64_t seen = next.load(std::memory_order_relaxed);;) {
        int ahead = after(uint32_t(seen >> 32), phase);
        int item = ahead ? share.begin : int(uint32_t(seen));
        if (ahead > 0 || item >= share.end) return -1;
        uint64_t taken = uint64_t(phase) << 32 | uint32_t(item + 1);
        if (next.compare_exchange_weak(seen, taken, std::memory_order_relaxed)) return item;
    }
}

// The phase is over when all its items are done, wherever the threads are that had none.
void Pool::finish(uint32_t phase, int done, int count) {
    if (done && done_.fetch_add(done, std::memory_order_acq_rel) + done == count) {
        done_.store(0, std::memory_order_relaxed);
        over_.store(phase, std::memory_order_release);
        over_.notify_all();
    }
    if (!count) return;
    for (uint32_t over; after(over = over_.load(std::memory_order_acquire), phase) < 0;) wait(over_, over);
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
