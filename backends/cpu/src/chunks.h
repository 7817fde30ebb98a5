// Cutting the rows or columns of a matrix into ranges for parallel_for.
#ifndef QCORE_CPU_CHUNKS_H
#define QCORE_CPU_CHUNKS_H

#include <cstdint>

#include "abi.h"
#include "parallel.h"

namespace qcore::cpu {

// The length, a multiple of `unit`, of the ranges into which `count` items of about `nanoseconds` each are cut. None is
// less than kMinChunkNanoseconds of work, and each thread gets a few, so that a late one holds up a part of its share.
inline int64_t range_length(int64_t count, int64_t unit, double nanoseconds, int64_t threads) {
    constexpr int64_t kRangesPerThread = 4;
    const int64_t most = threads > 1 ? threads * kRangesPerThread : 1;
    const double wanted = static_cast<double>(count) * nanoseconds / static_cast<double>(kMinChunkNanoseconds);
    const int64_t cuts = wanted < 1 ? 1 : wanted < static_cast<double>(most) ? static_cast<int64_t>(wanted) : most;
    return ceil_div(ceil_div(count, cuts), unit) * unit;
}

// Calls function(first, end) for ranges of 0 ... count - 1.
template <class Function>
void parallel_ranges(int64_t count, int64_t unit, double nanoseconds, int64_t threads, const Function &function) {
    if (count <= 0) {
        return;
    }
    const int64_t length = range_length(count, unit, nanoseconds, threads);
    parallel_for(ceil_div(count, length), threads, [&](int64_t range) {
        const int64_t first = range * length;
        function(first, first + length < count ? first + length : count);
    });
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_CHUNKS_H
