// Encoding into the dynamic codebooks by arithmetic, and decoding by permutes, for AVX-512 (QC-Q8-004, QC-OPT-021).
//
// Table look-ups are what an 8-bit step spends its time on: codebook.h's index takes a gather a vector, from tables
// that do not fit into L1 beside the data. The dynamic codebooks need no large table: their thresholds lie evenly
// spaced in each of a few segments (decades), so the number of thresholds below |y| is the integer part of
//     F(|y|) = min(|y|, cap[segment]) * slope[segment] + offset[segment]
// wherever F is more than kGuard away from every integer. Values that are not, one in 16 thousand, take the exact
// way; the constructor proves that the guard is wide enough at every threshold.
//
// With the code of 0 in the offset that is the code itself; negative y have lines of their own, with which it is that
// code less the number of thresholds beyond which -y lies. F is computed as kBase + kGuard + F in segments of codes
// below 128, and as twice (kGuard + F) in the others, one rounding: floats from 128 to 256 have 7 bits before the point
// and 16 behind it, those from 256 to 512 the same when halved, and the lowest bit of the exponent tells them apart. So
// the code is the third byte of the bits, and a value in doubt has zeros in the upper 14 bits below it. No segment may
// have codes on both sides of 128: in the unsigned codebook, whose decades begin at codes 1, 3, 7 ... 127, the byte is
// the code plus 1, modulo 256.
//
// The segment follows from the exponent, which has at most one threshold t where the segment changes: `entry` holds
// (s + 1 << 27) - (bits of t) - 1, so that adding the bits of y leaves in bits 27 to 30 the segment, s, or s + 1 beyond
// t, and in bit 31 the sign.
//
// quantize_blockwise encodes in the same way where its codebook is the signed dynamic one.
//
// Both signs have the same thresholds, ties included, because the code of 0 is odd (127); the positive side has one
// more, at the end.
#ifndef QCORE_CPU_STATE_CODES_H
#define QCORE_CPU_STATE_CODES_H

#include <cstdint>

#include "codebook.h"

namespace qcore::cpu {

struct StateLines {
    static constexpr int kExponents =
        32;  // the first for the value 0, then 2^-30 to 2^0; smaller values count as 2^-30
    static constexpr int kLowestExponent = 127 - (kExponents - 1);
    static constexpr int kSegments = 16;
    static constexpr float kGuard = 0x1p-15f;
    static constexpr float kBase = 0x1p7f;
    static constexpr int kFraction = 16;      // bits below the code
    static constexpr int32_t kSure = 0xFFFC;  // of these, those that are not all 0 outside the guard
    static constexpr float kSmallest = 0x1p-30f;

    // `table` is the codebook, `book` the same prepared. One of another structure has every value take the exact way.
    StateLines(const float *table, const Codebook &book);

    alignas(64) int32_t entry[kExponents];
    alignas(64) float cap[kSegments];
    alignas(64) float slope[2 * kSegments];  // of y >= 0, then of y < 0
    alignas(64) float offset[2 * kSegments];
    int32_t bias;            // four bytes, each what the byte is more than the code
    float smallest_counted;  // a value whose code is the one after that of 0 (QC-OPT-021)

    // For decoding: the bytes of the table's floats, lowest first. In half_plane those of codes 128 to 254 at 1 to 127,
    // and of code 255 at 0: all of the signed codebook, whose code 127 is 0 and whose code 127 - i is less that of 127
    // + i.
    alignas(64) uint8_t plane[4][256];
    alignas(64) uint8_t half_plane[4][128];

   private:
    bool fit(const Codebook &book);
    bool proven(const Codebook &book, const int32_t *limit, int n) const;
};

// A dynamic codebook (QC-Q8-006), ready for both directions.
struct DynamicCodebook {
    explicit DynamicCodebook(const float *codes_of)
        : table(codes_of), codes(codes_of, Codebook::kMinIndexedValues), lines(codes_of, codes) {}

    const float *table;
    Codebook codes;
    StateLines lines;
};

// Made at the first call.
const DynamicCodebook &signed_dynamic_codebook();
const DynamicCodebook &unsigned_dynamic_codebook();

}  // namespace qcore::cpu

#endif  // QCORE_CPU_STATE_CODES_H
