// Threads: a loop over independent chunks on the OpenMP team that torch already has.
//
// torch's CPU kernels run on the OpenMP runtime that its wheel brings (a private copy of libgomp, or Intel's). Its
// threads spin for a while after each parallel region. A second pool beside it, our own or a second libgomp, would make
// twice as many threads as cores take turns: on two cores that costs a factor of two and more on both sides. So this
// library links no OpenMP. It asks the dynamic linker for the GOMP_parallel that libtorch_cpu.so itself is bound to and
// runs on the very same team; where torch is not loaded, or in a forked child (a team does not survive fork), it starts
// plain threads for the one call, which costs more per call but holds no state.
#ifndef QCORE_CPU_PARALLEL_H
#define QCORE_CPU_PARALLEL_H

#include <cstdint>
#include <string>

namespace qcore::cpu {

// Work below about this much single-thread time is done faster inline than by waking a team, so cut chunks at least
// this big.
inline constexpr int64_t kMinChunkNanoseconds = 10000;

// `member`: which thread of the call this is, less than max_threads and n_chunks; no two have the same.
using ChunkFunction = void (*)(const void *context, int64_t chunk, int64_t member);

// The number of threads that a call may use: `stream` as qcore_backend.h defines it for a host.
int64_t thread_limit(uintptr_t stream);

// Calls function(context, chunk, member) once for each chunk from 0 to n_chunks - 1, in any order, on at most
// max_threads threads, and returns when all are done. A thread prefers the chunks whose number is its own modulo the
// threads, so that it finds what it read in the last such call in its own cache, then takes what others left. Each runs
// under IEEE arithmetic: nearest even, denormals kept, whatever the caller's control register says
// (torch.set_flush_denormal; QC-NUM-001). The function must not throw.
void run_chunks(int64_t n_chunks, int64_t max_threads, ChunkFunction function, const void *context);

template <class Function>
void parallel_for(int64_t n_chunks, int64_t max_threads, const Function &function) {
    run_chunks(
        n_chunks, max_threads,
        [](const void *context, int64_t chunk, int64_t) { (*static_cast<const Function *>(context))(chunk); },
        &function);
}

// The same with function(chunk, member).
template <class Function>
void parallel_for_members(int64_t n_chunks, int64_t max_threads, const Function &function) {
    run_chunks(
        n_chunks, max_threads,
        [](const void *context, int64_t chunk, int64_t member) {
            (*static_cast<const Function *>(context))(chunk, member);
        },
        &function);
}

// A blockwise op over n elements: function(first, last) for runs of whole blocks, about kChunkElements each. Threads
// take runs from as many regions in turn: were they neighbours, they would meet in each new huge page of a fresh output
// (pages.h), and the kernel would zero it for both.
inline constexpr int64_t kChunkElements = 65536;

template <class Function>
void for_blocks(int64_t n, int64_t blocksize, uintptr_t stream, const Function &function) {
    const int64_t blocks = n / blocksize + (n % blocksize != 0);
    const int64_t run = blocksize < kChunkElements ? kChunkElements / blocksize : 1;
    const int64_t chunks = blocks / run + (blocks % run != 0);
    const int64_t threads = chunks > 1 ? thread_limit(stream) : 1;
    const int64_t region = chunks / threads + (chunks % threads != 0);
    parallel_for(region * threads, threads, [&](int64_t turn) {
        const int64_t first = (turn % threads * region + turn / threads) * run;
        if (first < blocks) {
            function(first, blocks - first < run ? blocks : first + run);
        }
    });
}

// "libgomp.so.1 of torch (/path)" or "threads per call (torch's OpenMP not found)"; for describe().
std::string threading_description();

}  // namespace qcore::cpu

#endif  // QCORE_CPU_PARALLEL_H
