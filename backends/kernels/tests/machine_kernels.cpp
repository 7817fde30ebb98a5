// Kernels that are wrong on purpose, or that show what a thread sees: test_machine.py launches them by name.
#include <cstring>
#include <string>

#include "../simt/device.h"

namespace {

using namespace qcore::gpu;

struct Words {
    int32_t value[256];
};

// Each thread writes its word and reads its mirror image's, with a barrier between or without.
template <bool Barrier>
void mirror(int32_t *out) {
    QC_SHARED(Words, shared);
    const int i = thread_index();
    shared.value[i] = i;
    if (Barrier) {
        block_barrier();
    }
    out[i] = shared.value[255 - i];
}

void one_lane_stays_away(int32_t *out) {
    if (thread_index() != 37) {
        out[thread_index()] = wave_xor<kWave>(thread_index(), 1);
    } else {
        block_barrier();
    }
    block_barrier();
}

void one_lane_leaves(int32_t *out) {
    if (thread_index() == 37) {
        return;
    }
    out[thread_index()] = wave_xor<kWave>(thread_index(), 1);
}

void lanes_part(int32_t *out) {
    if (thread_index() % 2 == 0) {
        out[thread_index()] = wave_xor<kWave>(1, 2);
    } else {
        out[thread_index()] = wave_xor<kWave>(2, 2);
    }
}

void one_thread_misses_the_barrier(int32_t *out) {
    out[thread_index()] = 0;
    if (thread_index() == 200) {
        return;
    }
    block_barrier();
}

void waves_wait_at_two_barriers(int32_t *out) {
    out[thread_index()] = 0;
    if (thread_index() < 128) {
        block_barrier();
    } else {
        block_barrier();
    }
}

void runs_out_of_stack(int32_t *out) {
    volatile int64_t large[20 << 7];
    for (int i = 0; i < 20 << 7; ++i) {
        large[i] = i;
    }
    out[thread_index()] = static_cast<int32_t>(large[64]);
}

void stores_across_a_boundary(int32_t *out) { store16(out + thread_index(), Vector16{}); }

void wave_neighbour(int32_t *out) { out[thread_index()] = wave_xor<kWave>(thread_index(), kWave / 2); }

void order_of_threads(int32_t *out) {
    static int32_t turn = 0;
    out[thread_index()] = turn++;
}

thread_local std::string text;

}  // namespace

// "" or the error of launching the kernel called `name` in blocks of `threads`.
extern "C" const char *launch(const char *name, int threads, int64_t blocks, int32_t *out) {
    const struct {
        const char *name;
        void (*kernel)(int32_t *);
    } kernels[] = {
        {"mirror", mirror<true>},
        {"mirror without a barrier", mirror<false>},
        {"one lane stays away", one_lane_stays_away},
        {"one lane leaves", one_lane_leaves},
        {"lanes part", lanes_part},
        {"one thread misses the barrier", one_thread_misses_the_barrier},
        {"waves wait at two barriers", waves_wait_at_two_barriers},
        {"runs out of stack", runs_out_of_stack},
        {"stores across a boundary", stores_across_a_boundary},
        {"wave neighbour", wave_neighbour},
        {"order of threads", order_of_threads},
    };
    for (const auto &entry : kernels) {
        if (std::strcmp(entry.name, name) == 0) {
            text = launch_simt(entry.kernel, blocks, 1, threads, 1, out);
            return text.c_str();
        }
    }
    return "no such kernel";
}

extern "C" unsigned to_half(float value) { return float_to_half_bits(value); }
extern "C" float from_half(unsigned bits) { return half_bits_to_float(static_cast<uint16_t>(bits)); }
