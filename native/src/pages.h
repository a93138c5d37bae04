// Who has which page of the cache; full pages are found again by the tokens that lead to them.
#pragma once
#include <cstdint>
#include <set>
#include <unordered_map>
#include <vector>

#include "weight.h"

namespace wherry {

class Pages {
  public:
    explicit Pages(int count);
    int count() const { return int(pages_.size()); }
    int idle() const { return int(idle_.size()); }  // without an owner, perhaps with content that is remembered
    // Owned pages that already hold the beginning of `tokens`, at most (count - 1) / PAGE.
    std::vector<int> find(const int* tokens, int count);
    bool take(int count, std::vector<int>& to);  // false, and nothing taken, where there are too few
    void give_back(const std::vector<int>& pages);
    void remember(const std::vector<int>& pages, const int* tokens, int full);  // the first `full` ones are computed

  private:
    struct Page {
        int owners = 0;
        uint64_t hash = 0, before = 0, used = 0;  // hash 0: nothing remembered
        std::vector<int> tokens;
    };
    void own(int page);
    void forget(int page);
    std::vector<Page> pages_;
    std::set<std::pair<uint64_t, int>> idle_;  // by last use
    std::unordered_map<uint64_t, int> known_;
    uint64_t clock_ = 0;
};

}  // namespace wherry
