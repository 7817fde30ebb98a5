#include "state_codes.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "ieee.h"
#include "qcore_codebooks.h"

namespace qcore::cpu {
namespace {

float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The thresholds above 0: y is beyond one if its bits, as an integer, are above `limit`.
struct Thresholds {
    explicit Thresholds(const Codebook &book) {
        for (int j = 0; j < 255; ++j) {
            if (book.threshold[j] >= 1) {
                limit[count++] = book.threshold[j];
            }
        }
    }
    double at(int j) const { return static_cast<double>(float_of(limit[j])); }

    // Whether -y is beyond as many, but for the last one.
    bool mirrored(const Codebook &book) const {
        const int below = 255 - count;
        for (int j = 0; j < below; ++j) {
            if (j >= count || -book.threshold[below - 1 - j] - 1 != limit[j]) {
                return false;
            }
        }
        return below == 0 || below == count - 1;
    }

    int32_t limit[255];
    int count = 0;
};

}  // namespace

const DynamicCodebook &signed_dynamic_codebook() {
    const IeeeArithmetic ieee;
    static const DynamicCodebook book(QC_DYNAMIC_TABLE);
    return book;
}

const DynamicCodebook &unsigned_dynamic_codebook() {
    const IeeeArithmetic ieee;
    static const DynamicCodebook book(QC_DYNAMIC_UNSIGNED_TABLE);
    return book;
}

StateLines::StateLines(const float *table, const Codebook &book) {
    for (int i = 0; i < 256; ++i) {
        uint32_t bits;
        std::memcpy(&bits, table + i, sizeof bits);
        for (int byte = 0; byte < 4; ++byte) {
            plane[byte][i] = static_cast<uint8_t>(bits >> (8 * byte));
        }
    }
    for (int byte = 0; byte < 4; ++byte) {
        std::memcpy(half_plane[byte] + 1, plane[byte] + 128, 127);
        half_plane[byte][0] = plane[byte][255];
    }
    if (!fit(book)) {
        for (int s = 0; s < kSegments; ++s) {  // an integer: in doubt
            cap[s] = slope[s] = slope[kSegments + s] = 0.0f;
            offset[s] = offset[kSegments + s] = kBase;
        }
        std::memset(entry, 0, sizeof entry);
        smallest_counted = kSmallest;
        bias = 0;
    }
}

bool StateLines::fit(const Codebook &book) {
    const Thresholds t(book);
    if (!t.mirrored(book) || t.count < 2) {
        return false;
    }
    int32_t boundary[kExponents];
    int segment[kExponents];
    for (int e = 0; e < kExponents; ++e) {
        boundary[e] = ((kLowestExponent + e + 1) << 23) - 1;  // nothing of this exponent is beyond
        segment[e] = -1;
    }
    const int zero = book.zero_code == 0 ? 1 : book.zero_code;
    bias = zero == book.zero_code ? 0 : 0x01010101;
    float rise[kSegments];  // F = rise * |y| + shift
    double shift[kSegments];
    bool upper[kSegments] = {};  // whether the codes are 128 and more
    for (int s = 0; s < kSegments; ++s) {
        cap[s] = 1.0f;
        rise[s] = 0.0f;
        shift[s] = 0.5;
    }
    int s = 0;
    for (int first = 0, last = 0; first < t.count; first = last) {
        // Segment s ends at threshold `first`. The next one has the thresholds first + 1 to last - 1 inside.
        const int exponent = (t.limit[first] >> 23) - kLowestExponent;
        if (exponent < 1 || exponent >= kExponents || segment[exponent] != -1 || s + 1 == kSegments) {
            return false;
        }
        boundary[exponent] = t.limit[first];
        segment[exponent] = s++;
        last = first + 1;
        const double spacing = first + 2 < t.count ? t.at(first + 2) - t.at(first + 1) : 0.0;
        if (first + 2 < t.count && t.at(first + 1) - t.at(first) < spacing * (1 + 1e-5)) {
            for (last = first + 3; last < t.count && std::fabs(t.at(last) - t.at(last - 1) - spacing) < 1e-3 * spacing;
                 ++last) {
            }
            const double steep = (last - first - 2) / (t.at(last - 1) - t.at(first + 1));
            rise[s] = static_cast<float>(steep);
            shift[s] = first + 2 - static_cast<double>(rise[s]) * t.at(first + 1);
            cap[s] = static_cast<float>((last + 0.5 - shift[s]) / steep);
        } else {
            shift[s] = last + 0.5;
        }
        upper[s] = zero + first + 1 >= 128;
        if (upper[s] != (zero + last >= 128)) {
            return false;
        }
    }
    // The negative side has no threshold for the last segment, which ends in the same code as the one before.
    const double last_shift = book.zero_code == 0 ? 0.0 : shift[s] - (t.count > 255 - t.count ? 1.0 : 0.0);
    if (rise[s] != 0.0f || zero > 127) {
        return false;
    }
    for (int i = 0; i < kSegments; ++i) {
        const double above = kGuard + zero + shift[i];
        const double below = kGuard + zero + 1 - (i == s ? last_shift : shift[i]);
        slope[i] = upper[i] ? 2 * rise[i] : rise[i];
        offset[i] = static_cast<float>(upper[i] ? 2 * above : kBase + above);
        slope[kSegments + i] = rise[i];
        offset[kSegments + i] = static_cast<float>(kBase + below);
    }
    entry[0] = 0;  // no value but 0
    for (int e = 1, below = 0; e < kExponents; ++e) {
        const bool changes = segment[e] >= 0;
        segment[e] = changes ? segment[e] : below;
        below = segment[e] + (changes ? 1 : 0);
        entry[e] = static_cast<int32_t>((static_cast<uint32_t>(segment[e] + 1) << 27) - 1 -
                                        static_cast<uint32_t>(boundary[e]));
    }
    smallest_counted = float_of(t.limit[0] + (t.limit[1] - t.limit[0]) / 2);
    return proven(book, t.limit, t.count);
}

// F rises with |y| inside a segment, and outside the guard it is right everywhere if at each threshold the last value
// below it and the first one beyond are right, or in doubt on the threshold's own integer.
bool StateLines::proven(const Codebook &book, const int32_t *limit, int n) const {
    const auto field = [&](int32_t bits, int sign) {
        const int e = bits == 0 ? 0 : (bits >> 23) - kLowestExponent;
        const int of = static_cast<int>((static_cast<uint32_t>(entry[e]) + static_cast<uint32_t>(bits)) >> 27);
        const int line = sign > 0 ? of : kSegments + of;
        const float size = std::fmin(float_of(bits), cap[of]);
        return bits_of(std::fma(sign > 0 ? size : -size, slope[line], offset[line]));
    };
    const auto code = [&](int32_t fixed) { return ((fixed >> kFraction) - bias) & 0xFF; };
    const auto sure = [](int32_t fixed) { return (fixed & kSure) != 0; };
    const int zero = book.zero_code;
    for (int j = 0; j < n; ++j) {
        const int32_t below = field(limit[j], 1), beyond = field(limit[j] + 1, 1);
        const bool below_right = code(below) == zero + j || (code(below) == zero + j + 1 && !sure(below));
        if (!below_right || code(beyond) != zero + j + 1) {
            return false;
        }
        if (zero != 0) {
            const int32_t high = field(limit[j], -1), low = field(limit[j] + 1, -1);
            const int code_beyond = zero - j - 1 < 0 ? 0 : zero - j - 1;
            const bool low_right = code(low) == code_beyond || (code(low) == code_beyond + 1 && !sure(low));
            if (code(high) != (zero - j < 0 ? 0 : zero - j) || !low_right) {
                return false;
            }
        }
    }
    return code(field(0, 1)) == zero && code(field(bits_of(kSmallest), 1)) == zero &&
           code(field(bits_of(1.0f), 1)) == zero + n && code(field(bits_of(smallest_counted), 1)) == zero + 1;
}

}  // namespace qcore::cpu
