// The codebook that a call of an 8-bit op brings.
#ifndef QCORE_CPU_CALL_CODEBOOK_H
#define QCORE_CPU_CALL_CODEBOOK_H

#include <cstdint>
#include <optional>

#include "state_codes.h"

namespace qcore::cpu {

// The codebook of one call, which quantizes n values: the signed dynamic one is ready, any other is prepared for it.
class CallCodebook {
   public:
    CallCodebook(const float *code, int64_t n);

    const Codebook &codes() const { return dynamic_ != nullptr ? dynamic_->codes : *own_; }
    // How to do without look-ups in memory, or null.
    const StateLines *lines() const { return dynamic_ != nullptr ? &dynamic_->lines : nullptr; }

   private:
    const DynamicCodebook *dynamic_;
    std::optional<Codebook> own_;
};

// The lines of `code`, or null: it is not the signed dynamic one.
const StateLines *lines_of(const float *code);

}  // namespace qcore::cpu

#endif  // QCORE_CPU_CALL_CODEBOOK_H
