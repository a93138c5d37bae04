#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace wherry {
namespace {

constexpr size_t LARGE = size_t(2) << 20;   // a large page
constexpr size_t PIECE = size_t(64) << 20;  // asked of the system at once; what is never written takes no memory
constexpr size_t LINE = 64, SLACK = 4096;   // prefetches run ahead of the last weight

}  // namespace

uint8_t* Memory::take(size_t size) {
    if (!size) return nullptr;
    size = (size + SLACK + LINE - 1) / LINE * LINE;
#ifdef __SANITIZE_ADDRESS__  // each by itself, so that the sanitizer sees where it ends
    void* p = std::aligned_alloc(LINE, size);
    if (!p) throw std::bad_alloc();
    pieces_.push_back({p, 0});
    return static_cast<uint8_t*>(std::memset(p, 0, size));
#else
    if (size > left_) {
        size_t piece = (std::max(size, PIECE) + LARGE - 1) / LARGE * LARGE;
        void* p = mmap(nullptr, piece + LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        pieces_.push_back({p, piece + LARGE});
        next_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + LARGE - 1) / LARGE * LARGE), left_ = piece;
#ifdef MADV_HUGEPAGE
        madvise(next_, piece, MADV_HUGEPAGE);  // a wish: small pages do, only slower
#endif
    }
    uint8_t* at = next_;
    next_ += size, left_ -= size;
    return at;
#endif
}

Memory::~Memory() {
    for (const Piece& p : pieces_) {
        if (p.size) munmap(p.at, p.size);
        else std::free(p.at);
    }
}

}  // namespace wherry
