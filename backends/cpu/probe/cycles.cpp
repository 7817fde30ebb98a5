// What bounds the products of 4-bit weights with one row: cycles of the instructions that decode, alone and beside
// others, and cycles of the loops made of them.
//
//     cmake -S backends/cpu -B build/cycles -DQCORE_CPU_CYCLES=ON
//     cmake --build build/cycles
//     build/cycles/qcore_cpu_cycles_amx            on a processor with a tile unit
//     build/cycles/qcore_cpu_cycles_avx512_bf16    on one without
//
// Two instructions that take longer side by side than the slower of them share what executes them. Of 512 bits, a shift
// has port 0 on a processor of Intel and an unpack port 5; a Zen 4 has pipes 2 and 3 for the shift, 1 and 2 for the
// unpack, 0 and 1 for the multiplication. A cycle is a third of a dependent multiplication of integers. The least of
// many short runs counts.
#include "cycles.h"

#include <cstdio>
#include <cstdlib>

#include "dispatch.h"
#include "gemm_4bit_amx.h"
#include "gemm_4bit_short.h"

namespace qcore::cpu::QC_ISA {
namespace {

constexpr int kLoops = 2000;

// Of one of eight independent pairs of instructions.
#define QC_ONE(first, second, to) first " %[a], %[b], %%zmm" #to "\n" second
#define QC_TWO(first, second, i, j) QC_ONE(first, second, i) QC_ONE(first, second, j)
#define QC_FOUR(first, second, i, j, k, l) QC_TWO(first, second, i, j) QC_TWO(first, second, k, l)
#define QC_EIGHT(first, second) QC_FOUR(first, second, 0, 1, 2, 3) QC_FOUR(first, second, 4, 5, 6, 7)
#define QC_LOOP(first, second)                                                                  \
    for (int i = 0; i < kLoops; ++i) {                                                          \
        asm volatile(QC_EIGHT(first, second)                                                    \
                     :                                                                          \
                     : [a] "v"(zeros), [b] "v"(zeros)                                           \
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8"); \
    }
#define QC_CYCLES(first, second) cycles_of_pair([=] { QC_LOOP(first, second) })
#define QC_BESIDE(first)                                                                     \
    print_beside(first, QC_CYCLES(first, ""), QC_CYCLES(first, "vpsrlw $4, %[b], %%zmm8\n"), \
                 QC_CYCLES(first, "vpunpcklbw %[a], %[b], %%zmm8\n"), QC_CYCLES(first, "vmulps %[a], %[b], %%zmm8\n"))

template <class Function>
double cycles_of_pair(const Function &function) {
    return least_seconds(function) / kLoops / 8 / cycle_seconds();
}

void print_beside(const char *what, double alone, double shift, double unpack, double multiplication) {
    std::printf("%-16s %8.1f %12.1f %12.1f %20.1f\n", what, alone, shift, unpack, multiplication);
}

void print_instructions() {
    const __m512i zeros = _mm512_setzero_si512();
    std::printf("%-16s %8s %12s %12s %20s\n", "cycles", "alone", "and a shift", "an unpack", "a multiplication");
    QC_BESIDE("vpermw");
    QC_BESIDE("vpermb");
    QC_BESIDE("vpermd");
    QC_BESIDE("vpmulhuw");
    QC_BESIDE("vmulps");
    QC_BESIDE("vcvtne2ps2bf16");
    QC_BESIDE("vdpbf16ps");
}

template <class T>
T *zeroed(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
    void *at = std::aligned_alloc(4096, bytes);
    if (at == nullptr) {
        std::fprintf(stderr, "qcore_cpu_cycles_*: out of memory\n");
        std::exit(1);
    }
    __builtin_memset(at, 0, bytes);
    return static_cast<T *>(at);
}

// NF4's shape with any values: n rows of k, blocks of 64.
Gemm4 product(int64_t n, int64_t k) {
    static float table[16];
    for (int i = 0; i < 16; ++i) {
        table[i] = static_cast<float>(i - 8) / 8;
    }
    auto *packed = zeroed<uint8_t>(n * k / 2);
    auto *absmax = zeroed<float>(n * k / 64);
    for (int64_t i = 0; i < n * k / 2; ++i) {
        packed[i] = static_cast<uint8_t>(std::rand());
    }
    for (int64_t i = 0; i < n * k / 64; ++i) {
        absmax[i] = 1 + static_cast<float>(std::rand() % 100) / 100;
    }
    Gemm4 p = {};
    p.w.table = table;
    p.w.shift = 6;
    p.w.k = k;
    p.w.packed = packed;
    p.w.absmax = absmax;
    p.m = 1;
    p.n = n;
    p.k = k;
    p.x = zeroed<Bfloat>(k);
    p.out = zeroed<Bfloat>(n);
    return p;
}

void print_loops(int64_t n, int64_t k, const char *where) {
    const Gemm4 p = product(n, k);
    const Split<Gemm4Weight> decoder(p.w);
    const Split<Gemm4Weight>::Scales scales = {p.w.absmax};
    const auto groups = static_cast<double>(n * k / kGroup);
    const auto print = [&](const char *what, const auto &function) {
        const double took = least_seconds(function) / groups;
        std::printf("%-34s %-3s %6.1f cycles, %5.2f ns for 128 weights\n", what, where, took / cycle_seconds(),
                    1e9 * took);
    };
    auto *decoded = zeroed<uint8_t>(16 * kGroupBytes);
    print("decoding", [&] {
        for (int64_t g = 0; g < n * k / kGroup; ++g) {
            __m512i plane[4];
            decoder.decode(p.w.packed + 64 * g, scales, decoder.units(scales, g), plane);
            for (int j = 0; j < 4; ++j) {
                _mm512_store_si512(decoded + (g % 16 * 4 + j) * 64, plane[j]);
            }
        }
        asm volatile("" : : "r"(decoded) : "memory");
    });
    auto *x = zeroed<Bfloat>(split_length(k));
    print("one row by VDPBF16PS", [&] { multiply_short_rows(p, 0, 1, 0, n, x, [](int64_t, int64_t) {}); });
#if defined(__AMX_BF16__)
    auto *tiles = zeroed<uint8_t>(bf16_x_tile_bytes(p, 1));
    auto *scratch = zeroed<uint8_t>(bf16_tile_scratch_bytes(1, n));
    pack_bf16_x_tiles(p, static_cast<const Bfloat *>(p.x), 1, 0, few_rows_columns(p, 1), true, tiles);
    print("one row by tiles", [&] { multiply_few_rows<1>(p, 0, 1, 0, 0, n, tiles, scratch, [](int64_t, int64_t) {}); });
#endif
}

}  // namespace
}  // namespace qcore::cpu::QC_ISA

int main() {
    using namespace qcore::cpu;
    if (!machine_has(Isa::QC_ISA)) {
        std::fprintf(stderr, "qcore_cpu_cycles_*: this processor has no %s\n", isa_name(Isa::QC_ISA));
        return 1;
    }
    std::printf("%.2f GHz\n", 1e-9 / cycle_seconds());
    QC_ISA::print_instructions();
    QC_ISA::print_loops(16, 1024, "L1");
    QC_ISA::print_loops(256, 4096, "L2");
    return 0;
}
