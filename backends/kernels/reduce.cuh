// The largest value of a team: neighbouring threads of a block, a power of two of them.
#ifndef QCORE_KERNELS_REDUCE_CUH
#define QCORE_KERNELS_REDUCE_CUH

#include "numbers.cuh"

namespace qcore::gpu {

// Of eight magnitudes, NaN left out (QC-Q8-002); 0 if nothing is left.
QC_DEVICE float largest_magnitude(const Eight &x) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float size = magnitude(x.value[i]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

// Every thread of a block of Threads comes here with the same `team` and a value that is no NaN; each gets the largest
// of its team. Shuffles inside a wave, then one value a wave through `partial`, which belongs to this function from its
// first barrier to the next barrier after its return.
template <int W, int Threads>
QC_DEVICE float team_max(float value, int team, float (&partial)[Threads / W]) {
    const int inside = team < W ? team : W;
    for (int mask = 1; mask < inside; mask *= 2) {
        const float other = wave_xor<W>(value, mask);
        value = other > value ? other : value;
    }
    if (team > W) {
        const int wave = thread_index() / W, waves = team / W, first = wave & ~(waves - 1);
        if (thread_index() % W == 0) {
            partial[wave] = value;
        }
        block_barrier();
        value = 0.0f;
        for (int i = 0; i < waves; ++i) {
            value = partial[first + i] > value ? partial[first + i] : value;
        }
        block_barrier();
    }
    return value;
}

}  // namespace qcore::gpu

#endif  // QCORE_KERNELS_REDUCE_CUH
