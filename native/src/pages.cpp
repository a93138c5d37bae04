#include "pages.h"

#include <algorithm>

namespace wherry {
namespace {

uint64_t chained(uint64_t before, const int* tokens) {
    uint64_t h = before ^ 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < PAGE; i++) {
        h = (h ^ uint64_t(uint32_t(tokens[i]))) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    return h ? h : 1;
}

}  // namespace

Pages::Pages(int count) : pages_(count) {
    for (int i = 0; i < count; i++) idle_.insert({0, i});
}

void Pages::own(int page) {
    Page& p = pages_[page];
    if (p.owners++ == 0) idle_.erase({p.used, page});
}

void Pages::forget(int page) {
    Page& p = pages_[page];
    auto it = known_.find(p.hash);
    if (it != known_.end() && it->second == page) known_.erase(it);
    p.hash = 0;
    p.tokens.clear();
}

std::vector<int> Pages::find(const int* tokens, int count) {
    std::vector<int> found;
    uint64_t before = 0;
    for (int i = 0; (i + 1) * PAGE < count; i++) {
        uint64_t hash = chained(before, tokens + i * PAGE);
        auto it = known_.find(hash);
        if (it == known_.end()) break;
        const Page& p = pages_[it->second];
        if (p.before != before || !std::equal(p.tokens.begin(), p.tokens.end(), tokens + i * PAGE)) break;
        own(it->second);
        found.push_back(it->second);
        before = hash;
    }
    return found;
}

bool Pages::take(int count, std::vector<int>& to) {
    if (count > idle()) return false;
    for (int i = 0; i < count; i++) {
        int page = idle_.begin()->second;
        forget(page);
        own(page);
        to.push_back(page);
    }
    return true;
}

void Pages::give_back(const std::vector<int>& pages) {
    clock_++;
    for (int page : pages) {
        Page& p = pages_[page];
        if (--p.owners) continue;
        p.used = p.hash ? clock_ : 0;
        idle_.insert({p.used, page});
    }
}

void Pages::remember(const std::vector<int>& pages, const int* tokens, int full) {
    uint64_t before = 0;
    for (int i = 0; i < full; i++) {
        Page& p = pages_[pages[i]];
        uint64_t hash = p.hash ? p.hash : chained(before, tokens + i * PAGE);
        if (!p.hash && !known_.count(hash)) {
            p.hash = hash, p.before = before;
            p.tokens.assign(tokens + i * PAGE, tokens + (i + 1) * PAGE);
            known_[hash] = pages[i];
        }
        before = hash;
    }
}

}  // namespace wherry
