// What bounds a step of AdamW8bit: cycles of its two loops and of their parts, everything in the first cache.
//
//     cmake -S backends/cpu -B build/cycles -DQCORE_CPU_CYCLES=ON
//     cmake --build build/cycles
//     build/cycles/qcore_cpu_step_cycles_avx512_vnni, or ..._avx512_bf16, which is what runs on a Zen 4
//
// benchmarks/port_counts.py says what the ports allow. A loop that takes as long as its parts one after the other has
// them wait for each other: the divider's turn against all else.
#include <cstdio>
#include <cstdlib>

#include "cycles.h"
#include "dispatch.h"
#include "optimizer_kernels.cpp"  // the kernels themselves, which have no other door

namespace qcore::cpu::QC_ISA {
namespace {

struct Arrays {
    alignas(64) float param[kOptimizerBlock];
    alignas(64) float grad[kOptimizerBlock];
    alignas(64) uint8_t codes[2][kOptimizerBlock];
    alignas(64) uint8_t encoded[2][kOptimizerBlock];
    float absmax[2];
    float encoded_absmax[2];
};

template <class Function>
void print(const char *what, const Function &function) {
    constexpr int kRepeats = 200;
    const Times took = times_of([&] {
        for (int i = 0; i < kRepeats; ++i) {
            function();
            asm volatile("" : : : "memory");
        }
    });
    const double unit = cycle_seconds() * kRepeats * (kOptimizerBlock / kGroup);
    std::printf("%-44s %6.1f %8.1f\n", what, took.least / unit, took.median / unit);
}

void print_parts() {
    static Arrays a;
    for (int64_t i = 0; i < kOptimizerBlock; ++i) {
        a.param[i] = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX);
        a.grad[i] = 0.01f * (static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f);
        a.codes[0][i] = static_cast<uint8_t>(std::rand());
        a.codes[1][i] = static_cast<uint8_t>(std::rand());
    }
    a.absmax[0] = 1e-2f;
    a.absmax[1] = 1e-4f;
    qc_optimizer o = {};
    o.algorithm = QC_ADAM;
    o.state_bits = 8;
    o.step_size = -1e-8f;
    o.decay = 1.0f;
    o.eps = 1e-8f;
    o.beta1 = 0.9f;
    o.gain1 = 0.1f;
    o.beta2 = 0.999f;
    o.gain2 = 0.001f;
    const DynamicCodebook &first = signed_dynamic_codebook();
    const DynamicCodebook &second = unsigned_dynamic_codebook();
    const OptimizerJob job = {
        &o, {{first.table, &first.codes, &first.lines}, {second.table, &second.codes, &second.lines}, {}}};
    OptimizerTensor t = {};
    t.n = kOptimizerBlock;
    t.param = a.param;
    t.grad = a.grad;
    t.grad_scale = 1.0f;
    t.step_size = o.step_size;
    OptimizerTensor target = t;  // new codes go to other arrays, so that every run is the same step
    for (int s = 0; s < 2; ++s) {
        t.state[s] = a.codes[s];
        t.absmax[s] = &a.absmax[s];
        target.state[s] = a.encoded[s];
        target.absmax[s] = &a.encoded_absmax[s];
    }
    const Adam rule(o);
    static Scratch scratch;
    Block b;
    open_block(job, t, 2, 0, true, scratch, b);
    Block to = b;
    to.codes[0] = a.encoded[0];
    to.codes[1] = a.encoded[1];
    int32_t largest[2];
    Encoding<Adam> encoding(job);
    NoEncoding nothing;
    NoSums none;
    const auto first_loop = [&] { apply<Adam, true, true>(rule, job, t, 0, b, scratch, largest, none); };
    const auto begin = [&] { encoding.begin(target, 0, to, largest); };

    std::printf("%.2f GHz\n%-44s %6s %8s\n", 1e-9 / cycle_seconds(), "cycles for 64 elements", "least", "median");
    print("decode both states", [&] {
        for (int64_t i = 0; i < kOptimizerBlock; i += kGroup) {
            Float old[2][kVectors];
            decode<Adam, 0>(job, b, i, old);
            for (int v = 0; v < kVectors; ++v) {
                store(scratch.before[0] + i + v * kLanes, old[0][v]);
                store(scratch.before[1] + i + v * kLanes, old[1][v]);
            }
        }
    });
    print("square root", [&] {
        for (int64_t i = 0; i < kOptimizerBlock; i += kLanes) {
            store(scratch.root + i, square_root(load(b.param + i)));
        }
    });
    print("first loop: both, new states", first_loop);
    begin();
    print("encode both states", [&] {
        for (int64_t i = 0; i < kOptimizerBlock; i += kGroup) {
            encoding.group(i);
        }
    });
    print("quotient, new parameter", [&] { move<Adam, true>(rule, job, o.step_size, b, scratch, nothing); });
    print("second loop: both", [&] { move<Adam, true>(rule, job, o.step_size, b, scratch, encoding); });
    print("a block: both loops, and what is beside them", [&] {
        first_loop();
        begin();
        move<Adam, true>(rule, job, o.step_size, b, scratch, encoding);
        encoding.finish();
    });
}

}  // namespace
}  // namespace qcore::cpu::QC_ISA

int main() {
    using namespace qcore::cpu;
    if (!machine_has(Isa::QC_ISA)) {
        std::fprintf(stderr, "qcore_cpu_step_cycles: this processor has no %s\n", isa_name(Isa::QC_ISA));
        return 1;
    }
    QC_ISA::print_parts();
    return 0;
}
