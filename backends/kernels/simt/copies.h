// Copies into shared memory that pass no register: under emulation what they are for is poison until the thread that
// asked for them has waited.
#ifndef QCORE_SIMT_COPIES_H
#define QCORE_SIMT_COPIES_H

#include <array>
#include <cstring>
#include <deque>

#include "machine.h"

namespace qcore::simt {

struct Copy {
    void *to;
    const void *from;  // null: zeros
};

class Copies {
   public:
    void add(void *to, const void *from) {
        std::memset(to, 0xFB, 16);
        open_.push_back({to, from});
    }
    void close() {
        closed_.push_back(open_);
        open_.clear();
    }
    void wait(size_t but) {
        for (; closed_.size() > but; closed_.pop_front()) {
            for (const Copy &copy : closed_.front()) {
                if (copy.from != nullptr) {
                    std::memcpy(copy.to, copy.from, 16);
                } else {
                    std::memset(copy.to, 0, 16);
                }
            }
        }
    }

   private:
    std::deque<Copy> open_;
    std::deque<std::deque<Copy>> closed_;
};

// Those of the running thread. A kernel waits for all of them before it ends.
inline Copies &copies() {
    static thread_local std::array<Copies, kMaxThreads> all;
    return all[static_cast<size_t>(thread_index())];
}

}  // namespace qcore::simt

#endif  // QCORE_SIMT_COPIES_H
