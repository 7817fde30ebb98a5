#include "state_codes.h"

#include <cmath>
#include <cstring>

namespace qcore::cpu {
namespace {

float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
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

StateLines::StateLines(const float *table, const Codebook &book) {
    for (int i = 0; i < 256; ++i) {
        uint32_t bits;
        std::memcpy(&bits, table + i, sizeof bits);
        for (int byte = 0; byte < 4; ++byte) {
            plane[byte][i] = static_cast<uint8_t>(bits >> (8 * byte));
        }
    }
    for (int s = 0; s < kSegments; ++s) {
        slope[s] = offset[s] = cap[s] = 0.0f;  // F = 0: in doubt
    }
    for (int32_t &e : entry) {
        e = 0;
    }
    if (!fit(book)) {
        for (int s = 0; s < kSegments; ++s) {
            slope[s] = offset[s] = 0.0f;
        }
    }
}

bool StateLines::fit(const Codebook &book) {
    const Thresholds t(book);
    if (!t.mirrored(book)) {
        return false;
    }
    int32_t boundary[kExponents];
    int segment[kExponents];
    for (int e = 0; e < kExponents; ++e) {
        boundary[e] = ((kLowestExponent + e + 1) << 23) - 1;  // nothing of this exponent is beyond
        segment[e] = -1;
    }
    int s = 0;
    cap[0] = offset[0] = 0.5f;
    for (int first = 0, last = 0; first < t.count; first = last) {
        // Segment s ends at threshold `first`. The next one has the thresholds first + 1 to last - 1 inside.
        const int exponent = (t.limit[first] >> 23) - kLowestExponent;
        if (exponent < 0 || exponent >= kExponents || segment[exponent] != -1 || s + 1 == kSegments) {
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
            const double rise = (last - first - 2) / (t.at(last - 1) - t.at(first + 1));
            slope[s] = static_cast<float>(rise);
            offset[s] = static_cast<float>(first + 2 - rise * t.at(first + 1));
        } else {
            offset[s] = static_cast<float>(last) + 0.5f;
        }
        cap[s] = static_cast<float>(last) + 0.5f;
    }
    for (int e = 0, below = 0; e < kExponents; ++e) {
        const bool changes = segment[e] >= 0;
        segment[e] = changes ? segment[e] : below;
        below = segment[e] + (changes ? 1 : 0);
        entry[e] = ((segment[e] + 1) << 23) - 1 - boundary[e];
    }
    // The proof: F rises with y inside a segment, so outside the guard it is right if it is within it at each
    // threshold inside, and at the ends of the segment either right or within it.
    for (int j = 0; j < t.count; ++j) {
        const int e = (t.limit[j] >> 23) - kLowestExponent;
        const auto line = [&](int32_t bits) {
            const int of = (entry[e] + bits) >> 23;
            return std::fmin(std::fma(float_of(bits), slope[of], offset[of]), cap[of]);
        };
        const float before = line(t.limit[j]);
        const float after = line(t.limit[j] + 1);
        const float count = static_cast<float>(j + 1);
        if (t.limit[j] == boundary[e]) {
            if (std::floor(before + kGuard) != count - 1 || std::floor(after + kGuard) != count) {
                return false;
            }
        } else if (!(std::fabs(before - count) < kGuard && std::fabs(after - count) < kGuard)) {
            return false;
        }
    }
    return true;
}

}  // namespace qcore::cpu
