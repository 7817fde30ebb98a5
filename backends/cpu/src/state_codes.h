// Encoding into the dynamic codebooks by arithmetic, for AVX-512 (QC-Q8-004, QC-OPT-021).
//
// Table look-ups are what an 8-bit step spends its time on: codebook.h's index takes a gather a vector, from tables
// that do not fit into L1 beside the data. The dynamic codebooks need no large table: their thresholds lie evenly
// spaced in each of a few segments (decades), so the number of thresholds below |y| is the integer part of
//     F(|y|) = min(|y| * slope[segment] + offset[segment], cap[segment])
// wherever F is more than kGuard away from every integer. Values that are not, one in four thousand, take the exact
// way; the constructor proves that the guard is wide enough at every threshold.
//
// The segment follows from the exponent, which has at most one threshold t where the segment changes: `entry` holds
// (s << 23) - (bits of t) - 1 + 2^23, less the exponent, so that adding the bits of |y| carries into s beyond t.
// Both signs have the same thresholds, ties included, because the code of 0 is odd (127); the positive side has one
// more, at the end, whose code on the negative side is one too low and saturates to 0.
#ifndef QCORE_CPU_STATE_CODES_H
#define QCORE_CPU_STATE_CODES_H

#include <cstdint>

#include "codebook.h"

namespace qcore::cpu {

struct StateLines {
    static constexpr int kExponents = 32;  // of 2^-31 to 2^0; smaller values count as 2^-31
    static constexpr int kLowestExponent = 127 - (kExponents - 1);
    static constexpr int kSegments = 16;
    static constexpr float kGuard = 0x1p-13f;
    static constexpr float kSmallest = 0x1p-31f;

    // `table` is the codebook, `book` the same prepared. One of another structure has every value take the exact way.
    StateLines(const float *table, const Codebook &book);

    alignas(64) int32_t entry[kExponents];
    alignas(64) float slope[kSegments];
    alignas(64) float offset[kSegments];
    alignas(64) float cap[kSegments];
    alignas(64) uint8_t plane[4][256];  // the bytes of the table's floats, lowest first: for decoding by permutes

   private:
    bool fit(const Codebook &book);
};

}  // namespace qcore::cpu

#endif  // QCORE_CPU_STATE_CODES_H
