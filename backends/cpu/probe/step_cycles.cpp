// What bounds a step of AdamW8bit and of AdEMAMix8bit: cycles of its two loops and of their parts, everything in the
// first cache.
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

template <int kStates>
struct Arrays {
    alignas(64) float param[kOptimizerBlock];
    alignas(64) float grad[kOptimizerBlock];
    alignas(64) uint8_t codes[kStates][kOptimizerBlock];
    alignas(64) uint8_t encoded[kStates][kOptimizerBlock];
    float absmax[kStates];
    float encoded_absmax[kStates];
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

template <class Rule>
void print_parts(const char *name, int32_t algorithm) {
    constexpr int kStates = Rule::kStates;
    static Arrays<kStates> a;
    for (int64_t i = 0; i < kOptimizerBlock; ++i) {
        a.param[i] = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX);
        a.grad[i] = 0.01f * (static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f);
        for (int s = 0; s < kStates; ++s) {
            a.codes[s][i] = static_cast<uint8_t>(std::rand());
        }
    }
    qc_optimizer o = {};
    o.algorithm = algorithm;
    o.state_bits = 8;
    o.step_size = -1e-8f;
    o.decay = 1.0f;
    o.eps = 1e-8f;
    o.beta1 = 0.9f;
    o.gain1 = 0.1f;
    o.beta2 = 0.999f;
    o.gain2 = 0.001f;
    o.beta3 = 0.9999f;
    o.gain3 = 0.0001f;
    o.alpha = 5.0f;
    o.correction1 = 1.1f;
    o.correction2 = 1.2f;
    OptimizerJob job = {};
    job.rule = &o;
    OptimizerTensor t = {};
    t.n = kOptimizerBlock;
    t.param = a.param;
    t.grad = a.grad;
    t.grad_scale = 1.0f;
    t.step_size = o.step_size;
    OptimizerTensor target = t;  // new codes go to other arrays, so that every run is the same step
    for (int s = 0; s < kStates; ++s) {
        const DynamicCodebook &book = Rule::kSquares[s] ? unsigned_dynamic_codebook() : signed_dynamic_codebook();
        job.book[s] = {book.table, &book.codes, &book.lines};
        a.absmax[s] = Rule::kSquares[s] ? 1e-4f : 1e-2f;
        t.state[s] = a.codes[s];
        t.absmax[s] = &a.absmax[s];
        target.state[s] = a.encoded[s];
        target.absmax[s] = &a.encoded_absmax[s];
    }
    const Rule rule(o);
    static Scratch scratch;
    Block b;
    open_block(job, t, kStates, 0, true, scratch, b);
    Block to = b;
    for (int s = 0; s < kStates; ++s) {
        to.codes[s] = a.encoded[s];
    }
    int32_t largest[kStates];
    Encoding<Rule> encoding(job);
    NoEncoding nothing;
    NoSums none;
    const auto first_loop = [&] { apply<Rule, true, true>(rule, job, t, 0, b, scratch, largest, none); };
    const auto begin = [&] { encoding.begin(target, 0, to, largest); };

    std::printf("%s, %.2f GHz\n%-44s %6s %8s\n", name, 1e-9 / cycle_seconds(), "cycles for 64 elements", "least",
                "median");
    print("decode the states", [&] {
        for (int64_t i = 0; i < kOptimizerBlock; i += kGroup) {
            Float old[kStates][kVectors];
            decode<Rule, 0>(job, b, i, old);
            for (int v = 0; v < kStates * kVectors; ++v) {
                store(scratch.before[v / kVectors] + i + v % kVectors * kLanes, old[v / kVectors][v % kVectors]);
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
    print("encode the states", [&] {
        for (int64_t i = 0; i < kOptimizerBlock; i += kGroup) {
            encoding.group(i);
        }
    });
    print("quotient, new parameter", [&] { move<Rule, true>(rule, job, o.step_size, b, scratch, nothing); });
    print("second loop: both", [&] { move<Rule, true>(rule, job, o.step_size, b, scratch, encoding); });
    print("a block: both loops, and what is beside them", [&] {
        first_loop();
        begin();
        move<Rule, true>(rule, job, o.step_size, b, scratch, encoding);
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
    QC_ISA::print_parts<QC_ISA::Adam>("AdamW8bit", QC_ADAM);
    QC_ISA::print_parts<QC_ISA::Ademamix>("AdEMAMix8bit", QC_ADEMAMIX);
    return 0;
}
