#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace wherry {
namespace {

constexpr int CHUNK = 128;  // tokens of prompts in a step that others wait for

}  // namespace

Engine::Engine(std::unique_ptr<Model> m, const Kernels& k, int threads, std::vector<int> cores, int pages, int sequences,
               int bits, bool bytes)
    : model_(std::move(m)), cache_(model_->c, pages, bytes), pages_(pages), pool_(threads, std::move(cores)),
      runner_(*model_, cache_, k, pool_, bits), sequences_(sequences), peak_(k.peak) {
    thread_ = std::thread([this] { loop(); });
}

Engine::~Engine() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
        work_.notify_all();
    }
    thread_.join();
}

std::string Engine::submit(const int* tokens, int count, const Sampling& s, const int* stop, int stops, float* logits,
                           int& id) {
    const Config& c = model_->c;
    if (count < 1 || count > c.context) return std::to_string(count) + " tokens do not fit a context of " + std::to_string(c.context);
    for (int i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= c.vocab) return "token " + std::to_string(tokens[i]) + " is not in the vocabulary";
    auto r = std::make_shared<Request>();
    r->tokens.assign(tokens, tokens + count);
    r->prompt = count, r->stop.assign(stop, stop + stops), r->logits = logits;
    r->limit = logits ? 0 : std::min(s.max_tokens, c.context - count);
    if ((count + r->limit + PAGE - 1) / PAGE > pages_.count())
        return "the request needs more than the whole cache of " + std::to_string(pages_.count() * PAGE) + " tokens";
    r->sampler = std::make_unique<Sampler>(s, tokens, count);
    std::lock_guard lock(mutex_);
    if (stop_) return "closed";
    id = r->id = ++last_;
    requests_[id] = r;
    if (!logits && r->limit < 1) r->end = End::length;
    else waiting_.push_back(r);
    work_.notify_one();
    return "";
}

int Engine::read(int id, int* tokens, float* logprob, int least, int most, double seconds, End& end) {
    std::unique_lock lock(mutex_);
    auto it = requests_.find(id);
    if (it == requests_.end()) return -1;
    Held r = it->second;
    r->wanted = size_t(std::max(least, 1));
    r->ready.wait_for(lock, std::chrono::duration<double>(seconds),
                      [&] { return r->out.size() >= r->wanted || r->end != End::running; });
    int n = 0;
    for (; n < most && !r->out.empty(); n++, r->out.pop_front()) {
        tokens[n] = r->out.front().first;
        if (logprob) logprob[n] = r->out.front().second;
    }
    end = r->out.empty() ? r->end : End::running;
    if (end != End::running) requests_.erase(id);
    return n;
}

void Engine::cancel(int id) {
    std::unique_lock lock(mutex_);
    auto it = requests_.find(id);
    if (it == requests_.end()) return;
    Held r = it->second;
    r->cancelled = true;
    work_.notify_one();
    // a text that is scored has memory of the caller's: not before the last step has left it
    if (r->logits) r->ready.wait(lock, [&] { return r->end != End::running; });
    requests_.erase(id);
}

Stats Engine::stats() {
    std::lock_guard lock(mutex_);
    Stats s = stats_;
    s.waiting = int64_t(waiting_.size()), s.running = int64_t(running_.size());
    s.idle_pages = pages_.idle(), s.pages = pages_.count();
    return s;
}

void Engine::loop() {
    pool_.pin(0);
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [&] { return stop_ || !waiting_.empty() || !running_.empty(); });
        if (stop_) break;
        admit();
        gather();
        if (batch_.ids.empty()) continue;
        lock.unlock();
        runner_.step(batch_, [this](int row, float* logits) {
            auto [r, at] = takers_[row];
            const int vocab = model_->c.vocab;
            if (r->logits) std::memcpy(r->logits + size_t(at) * vocab, logits, size_t(vocab) * 4);
            else r->next = r->sampler->draw(logits, vocab, peak_, &r->logprob);
        });
        lock.lock();
        settle();
    }
    for (auto& [id, r] : requests_)
        if (r->end == End::running) r->end = End::closed, r->ready.notify_all();
    requests_.clear(), running_.clear(), waiting_.clear();
}

// Requests come in in their order; each gets all pages that it can need, so that what runs always ends.
void Engine::admit() {
    for (auto it = waiting_.begin(); it != waiting_.end();)
        if ((*it)->cancelled) (*it)->end = End::cancelled, (*it)->ready.notify_all(), it = waiting_.erase(it);
        else ++it;
    while (!waiting_.empty() && int(running_.size()) < sequences_) {
        Request& r = *waiting_.front();
        std::vector<int> pages;
        if (!r.logits) pages = pages_.find(r.tokens.data(), r.prompt);
        int shared = int(pages.size());
        if (!pages_.take((r.prompt + r.limit + PAGE - 1) / PAGE - shared, pages)) {
            pages_.give_back(pages);
            return;
        }
        r.pages = std::move(pages);
        r.done = r.shared = shared * PAGE;
        stats_.shared_tokens += r.done;
        running_.push_back(waiting_.front());
        waiting_.pop_front();
    }
}

// The next step: one token of every sequence that is written, and parts of prompts in the room that is left.
void Engine::gather() {
    batch_.clear(), parts_.clear(), takers_.clear();
    for (size_t i = 0; i < running_.size();)
        if (running_[i]->cancelled) {
            finish(*running_[i], End::cancelled);
            running_.erase(running_.begin() + i);
        } else i++;
    auto part = [&](Request& r, int count) {
        int token = int(batch_.ids.size());
        batch_.runs.push_back({token, count, r.done, r.pages.data()});
        batch_.ids.insert(batch_.ids.end(), r.tokens.begin() + r.done, r.tokens.begin() + r.done + count);
        parts_.push_back({&r, r.done, count, token});
        int total = int(r.tokens.size());
        for (int i = 0; i < count; i++) {
            int at = r.done + i;
            if (r.logits ? at + 1 < total : at + 1 == total) {
                batch_.wanted.push_back(token + i);
                takers_.push_back({&r, r.logits ? at : -1});
            }
        }
    };
    for (const Held& r : running_)
        if (r->done + 1 == int(r->tokens.size()) && r->done >= r->prompt) part(*r, 1);
    int room = TOKENS - int(batch_.ids.size());
    if (!batch_.ids.empty()) room = std::min(room, CHUNK);
    for (const Held& r : running_) {
        int left = int(r->tokens.size()) - r->done;
        if (r->done >= r->prompt || room < 1) continue;
        int count = std::min(left, room);
        part(*r, count);
        room -= count;
    }
}

void Engine::settle() {
    stats_.steps++;
    for (const Part& p : parts_) {
        Request& r = *p.request;
        bool prompt = p.first < r.prompt;
        r.done += p.count;
        stats_.prompt_tokens += prompt ? p.count : 0;
        if (!r.logits) pages_.remember(r.pages, r.tokens.data(), r.done / PAGE);
        if (r.done < int(r.tokens.size())) continue;
        if (r.logits) {
            finish(r, End::stop);
            continue;
        }
        if (r.next < 0) {
            finish(r, End::diverged);
            continue;
        }
        if (std::find(r.stop.begin(), r.stop.end(), r.next) != r.stop.end()) {
            finish(r, End::stop);
            continue;
        }
        r.tokens.push_back(r.next);
        r.out.push_back({r.next, r.logprob});
        stats_.tokens++;
        if (int(r.tokens.size()) - r.prompt >= r.limit) finish(r, End::length);
        if (r.out.size() >= r.wanted) r.ready.notify_one();
    }
    std::erase_if(running_, [](const Held& r) { return r->end != End::running; });
}

void Engine::finish(Request& r, End end) {
    r.end = end;
    pages_.give_back(r.pages);
    r.pages.clear();
    r.ready.notify_all();
}

}  // namespace wherry
