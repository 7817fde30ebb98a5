#include "codebook.h"

#include <algorithm>
#include <cstring>

namespace qcore::cpu {
namespace {

int32_t key(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFF);
    return (bits >> 31) != 0 ? -magnitude : magnitude;
}

}  // namespace

Codebook::Codebook(const float *code, int64_t n) {
    for (int j = 0; j < 255; ++j) {
        const float middle = (code[j] + code[j + 1]) * 0.5f;
        const bool tie_goes_up = j % 2 == 1 && code[j] < code[j + 1];
        threshold[j] = key(middle) - (tie_goes_up ? 1 : 0);
    }
    threshold[255] = INT32_MAX;
    // Ascending but for rounding and ties, so an insertion sort is one pass.
    for (int j = 1; j < 255; ++j) {
        const int32_t moved = threshold[j];
        int to = j;
        for (; to > 0 && threshold[to - 1] > moved; --to) {
            threshold[to] = threshold[to - 1];
        }
        threshold[to] = moved;
    }
    zero_code = static_cast<int32_t>(std::lower_bound(threshold, threshold + 255, 0) - threshold);
    indexed = n >= kMinIndexedValues && build_index();
}

// Both signs ask "is |y| beyond this limit": for y > 0, key > t is |y| > t; for y < 0 it is |y| < -t, that is, not
// |y| > -t - 1, and the code falls with |y|.
bool Codebook::build_index() {
    int32_t positive[255];
    int32_t negative[255];
    int n_positive = 0;
    int n_negative = 0;
    for (int j = 0; j < 255; ++j) {
        if (threshold[j] >= 1) {
            positive[n_positive++] = threshold[j];
        }
    }
    for (int j = 254; j >= 0; --j) {
        if (threshold[j] <= -2) {
            negative[n_negative++] = -threshold[j] - 1;
        }
    }
    if (!choose_shift(positive, n_positive, negative, n_negative)) {
        return false;
    }
    fill_half(entry, static_cast<uint32_t>(255 - n_positive), positive, n_positive);
    fill_half(entry + half, static_cast<uint32_t>(255 - n_negative), negative, n_negative);
    return true;
}

bool Codebook::choose_shift(const int32_t *positive, int n_positive, const int32_t *negative, int n_negative) {
    low = INT32_MAX;
    high = 0;
    int32_t gap = INT32_MAX;  // buckets no wider than the smallest distance of two limits hold at most one
    const auto measure = [&](const int32_t *limit, int n) {
        for (int i = 0; i < n; ++i) {
            low = std::min(low, limit[i]);
            high = std::max(high, limit[i] + 1);
            gap = i > 0 ? std::min(gap, limit[i] - limit[i - 1]) : gap;
        }
    };
    measure(positive, n_positive);
    measure(negative, n_negative);
    if (high == 0) {  // no limits at all: one code for each sign
        low = high = 1;
    }
    // 8 bits of code above 23 of position stay clear of the sign.
    for (shift = 23; shift > 0 && (int32_t{1} << shift) > gap; --shift) {
    }
    half = ((high - low) >> shift) + 1;
    return gap > 0 && half <= kMaxEntries / 2;
}

void Codebook::fill_half(uint32_t *half_entry, uint32_t code, const int32_t *limit, int n) {
    const uint32_t last = (uint32_t{1} << shift) - 1;
    int32_t bucket = 0;
    for (int i = 0; i < n; ++i, ++code) {
        const uint32_t position = static_cast<uint32_t>(limit[i] - low);
        const int32_t holder = static_cast<int32_t>(position >> shift);
        std::fill(half_entry + bucket, half_entry + holder, code << shift);
        half_entry[holder] = (code << shift) + last - (position & last);
        bucket = holder + 1;
    }
    std::fill(half_entry + bucket, half_entry + half, code << shift);
}

}  // namespace qcore::cpu
