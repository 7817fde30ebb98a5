// What this machine can do at most: loops that only read, write, copy or multiply, on the threads that the ops use.
//
// `qcore bench cpu` measures an op against them (the floor of a roofline). They are no part of the backend: a library
// of its own, found beside libqcore_cpu.so. Each function does its work and returns; the caller looks at the clock.
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace qcore::cpu {
namespace {

enum Dtype : int32_t { kF32 = 0, kF16 = 1, kBf16 = 2, kInt8 = 3 };

constexpr int64_t kLine = 64;
constexpr int64_t kLeast = 64 << 10;  // bytes of a chunk
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kAheadBytes = 4096;  // what is fetched ahead by itself ends at the next page

template <class Function>
void for_bytes(int64_t threads, int64_t bytes, const Function &function) {
    int64_t length = bytes / (threads * kChunksPerThread) / kLine * kLine;
    length = length < kLeast ? kLeast : length;
    parallel_for((bytes + length - 1) / length, threads, [&](int64_t chunk) {
        const int64_t first = chunk * length;
        function(first, bytes - first < length ? bytes - first : length);
    });
}

#ifdef __x86_64__
#define QC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QC_CLONES
#endif

using Bytes64 = uint64_t __attribute__((vector_size(64), aligned(8), may_alias));

// Eight streams of one cache line: enough loads in flight, and no work but an exclusive or.
QC_CLONES uint64_t read_lines(const char *data, int64_t bytes) {
    Bytes64 sums[8] = {};
    int64_t at = 0;
    for (; at + 8 * kLine <= bytes; at += 8 * kLine) {
        for (int i = 0; i < 8; ++i) {
            sums[i] ^= *reinterpret_cast<const Bytes64 *>(data + at + i * kLine);
        }
    }
    uint64_t sum = 0;
    for (const Bytes64 &part : sums) {
        for (int i = 0; i < 8; ++i) {
            sum ^= part[i];
        }
    }
    for (; at + 8 <= bytes; at += 8) {
        uint64_t word;
        std::memcpy(&word, data + at, sizeof word);
        sum ^= word;
    }
    return sum;
}

// Each line is read, changed and written back where it was: what a step of an optimizer does to its parameter and its
// states. kUpdated streams of `bytes` bytes in `distance`, so that as many pages of memory are open as in a step.
constexpr int kUpdated = 3;
QC_CLONES void update_lines(char *data, int64_t distance, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLine) {
        for (int stream = 0; stream < kUpdated; ++stream) {
            char *to = data + stream * distance + at;
            __builtin_prefetch(to + kAheadBytes, 1, 2);
            Bytes64 *line = reinterpret_cast<Bytes64 *>(to);
            *line = ~*line;
        }
    }
}

#ifdef __x86_64__
// Past the caches: for more data than they hold, half the traffic of a write that first reads what it replaces.
void write_past_caches(char *to, int64_t bytes) {
    const __m128i ones = _mm_set1_epi8(1);
    for (int64_t at = 0; at + 16 <= bytes; at += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i *>(to + at), ones);
    }
    _mm_sfence();
}

void copy_past_caches(char *to, const char *from, int64_t bytes) {
    for (int64_t at = 0; at + 16 <= bytes; at += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i *>(to + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + at)));
    }
    _mm_sfence();
}
#endif

// Plain C++, for processors without a path of their own: the compiler takes vectors of 16 bytes.
int64_t multiply_portable(int64_t steps) {
    using Vector = float __attribute__((vector_size(16)));
    constexpr int kSums = 8;
    Vector sums[kSums] = {}, a = {1, 1, 1, 1}, b = {};
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 8
        for (Vector &sum : sums) {
            sum = a * b + sum;
#ifdef __x86_64__
            asm volatile("" : "+x"(sum), "+x"(a));
#elif defined(__aarch64__)
            asm volatile("" : "+w"(sum), "+w"(a));
#else
            asm volatile("" : "+m"(sum), "+m"(a));
#endif
        }
    }
    return steps * kSums * 4;
}

#ifdef __x86_64__

// Ten sums in registers hide the latency of any of these instructions; written as assembly, because a compiler that may
// choose keeps some of them in memory.
#define QC_TEN(op)                                                                                 \
    op " %10, %10, %0\n\t" op " %10, %10, %1\n\t" op " %10, %10, %2\n\t" op " %10, %10, %3\n\t" op \
       " %10, %10, %4\n\t" op " %10, %10, %5\n\t" op " %10, %10, %6\n\t" op " %10, %10, %7\n\t" op \
       " %10, %10, %8\n\t" op " %10, %10, %9"
#define QC_MULTIPLY(name, isa, Vector, op, products)                                                                 \
    __attribute__((target(isa))) int64_t name(int64_t steps) {                                                       \
        Vector a = {}, s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a;               \
        for (int64_t i = 0; i < steps; ++i) {                                                                        \
            asm volatile(QC_TEN(op)                                                                                  \
                         : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), \
                           "+v"(s9)                                                                                  \
                         : "v"(a));                                                                                  \
        }                                                                                                            \
        return steps * 10 * (products);                                                                              \
    }

QC_MULTIPLY(multiply_avx2, "avx2,fma", __m256, "vfmadd231ps", 8)
QC_MULTIPLY(multiply_avx512, "avx512f", __m512, "vfmadd231ps", 16)
QC_MULTIPLY(multiply_avx512_bf16, "avx512f,avx512bf16", __m512, "vdpbf16ps", 32)
QC_MULTIPLY(multiply_avx512_vnni, "avx512f,avx512vnni", __m512i, "vpdpbusd", 64)
QC_MULTIPLY(multiply_avx_vnni, "avx2,avxvnni", __m256i, "%{vex%} vpdpbusd", 32)

struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four tiles of sums, two of each factor: what a product holds in registers.
__attribute__((target("amx-tile,amx-bf16,amx-int8"))) int64_t multiply_amx(bool bf16, int64_t steps) {
    // In memory for good: the intrinsic tells the compiler of its first eight bytes only.
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    if (bf16) {
        for (int64_t i = 0; i < steps; ++i) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    } else {
        for (int64_t i = 0; i < steps; ++i) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_release();
    return steps * 4 * 16 * 16 * (bf16 ? 32 : 64);
}

#endif

struct Unit {
    const char *name;
    int64_t (*multiply)(int64_t steps);
};

// The best that this processor has for factors of a dtype and sums in 32 bits.
Unit best_unit([[maybe_unused]] int32_t dtype) {
#ifdef __x86_64__
    if (dtype == kBf16 && machine_has(Isa::amx)) {
        return {"amx bf16", [](int64_t steps) { return multiply_amx(true, steps); }};
    }
    if (dtype == kInt8 && machine_has(Isa::amx)) {
        return {"amx int8", [](int64_t steps) { return multiply_amx(false, steps); }};
    }
    if (dtype == kBf16 && machine_has(Isa::avx512_bf16)) {
        return {"avx512 bf16", multiply_avx512_bf16};
    }
    if (dtype == kInt8 && machine_has(Isa::avx512_vnni)) {
        return {"avx512 vnni", multiply_avx512_vnni};
    }
    if (dtype == kInt8 && machine_has(Isa::avx_vnni)) {
        return {"avx vnni", multiply_avx_vnni};
    }
    if (machine_has(Isa::avx512)) {
        return {"avx512 fp32", multiply_avx512};
    }
    if (machine_has(Isa::avx2)) {
        return {"avx2 fp32", multiply_avx2};
    }
#endif
    return {"portable fp32", multiply_portable};
}

}  // namespace
}  // namespace qcore::cpu

#define QC_PROBE extern "C" __attribute__((visibility("default")))

QC_PROBE uint64_t qcp_read(int64_t threads, const void *data, int64_t bytes) {
    using namespace qcore::cpu;
    uint64_t sum = 0;
    for_bytes(threads, bytes, [&](int64_t first, int64_t length) {
        __atomic_fetch_xor(&sum, read_lines(static_cast<const char *>(data) + first, length), __ATOMIC_RELAXED);
    });
    return sum;
}

QC_PROBE void qcp_write(int64_t threads, void *to, int64_t bytes, [[maybe_unused]] int32_t past_caches) {
    using namespace qcore::cpu;
    for_bytes(threads, bytes, [&](int64_t first, int64_t length) {
        char *part = static_cast<char *>(to) + first;
#ifdef __x86_64__
        if (past_caches != 0) {
            return write_past_caches(part, length);
        }
#endif
        std::memset(part, 1, static_cast<size_t>(length));
    });
}

// In one go over `data` and `updated`: one stream is only read while the lines of others are changed in place.
QC_PROBE uint64_t qcp_update(int64_t threads, const void *data, int64_t bytes, void *updated, int64_t updated_bytes) {
    using namespace qcore::cpu;
    constexpr int64_t kPart = 1 << 10;
    const int64_t distance = updated_bytes / kUpdated / kPart * kPart;
    const int64_t parts = distance / kPart;
    uint64_t sum = 0;
    parallel_for(threads, threads, [&](int64_t thread) {
        uint64_t own = 0;
        for (int64_t part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part) {
            update_lines(static_cast<char *>(updated) + part * kPart, distance, kPart);
            const int64_t from = bytes * part / parts / kLine * kLine;
            const int64_t to = bytes * (part + 1) / parts / kLine * kLine;
            for (int64_t at = from; at < to; at += kLine) {
                __builtin_prefetch(static_cast<const char *>(data) + at + kAheadBytes, 0, 2);
            }
            own ^= read_lines(static_cast<const char *>(data) + from, to - from);
        }
        __atomic_fetch_xor(&sum, own, __ATOMIC_RELAXED);
    });
    return sum;
}

QC_PROBE void qcp_copy(int64_t threads, void *to, const void *from, int64_t bytes,
                       [[maybe_unused]] int32_t past_caches) {
    using namespace qcore::cpu;
    for_bytes(threads, bytes, [&](int64_t first, int64_t length) {
        char *part = static_cast<char *>(to) + first;
        const char *source = static_cast<const char *>(from) + first;
#ifdef __x86_64__
        if (past_caches != 0) {
            return copy_past_caches(part, source, length);
        }
#endif
        std::memcpy(part, source, static_cast<size_t>(length));
    });
}

QC_PROBE int64_t qcp_multiply(int64_t threads, int32_t dtype, int64_t steps) {
    using namespace qcore::cpu;
    const Unit unit = best_unit(dtype);
    int64_t done = 0;
    parallel_for(threads, threads, [&](int64_t) { __atomic_fetch_add(&done, unit.multiply(steps), __ATOMIC_RELAXED); });
    return done;
}

QC_PROBE const char *qcp_unit(int32_t dtype) { return qcore::cpu::best_unit(dtype).name; }
