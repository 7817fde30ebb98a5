#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <sstream>
#include <system_error>
#include <thread>
#include <vector>

#include "ieee.h"

namespace qcore::cpu {
namespace {

// A team of any size works through the chunks, which are dealt out like cards: each thread takes the next one of its
// own hand, then of the others', until there is none.
struct Work {
    static constexpr int64_t kMostHands = 16;
    struct alignas(64) Hand {
        std::atomic<int64_t> next{0};
    };

    ChunkFunction function;
    const void *context;
    int64_t n_chunks;
    int64_t most;  // members
    int64_t hands;
    pthread_t caller = pthread_self();
    std::atomic<int64_t> members{1};  // the caller is number 0 in every call
    Hand hand[kMostHands];

    Work(ChunkFunction f, const void *c, int64_t n, int64_t max_threads)
        : function(f), context(c), n_chunks(n), most(std::min(max_threads, n)), hands(std::min(most, kMostHands)) {}

    void run() {
        const IeeeArithmetic ieee;
        const bool first = pthread_equal(pthread_self(), caller) != 0;
        const int64_t member = first ? 0 : members.fetch_add(1, std::memory_order_relaxed);
        if (member >= most) {  // more than can do something, or than the caller has scratch for
            return;
        }
        for (int64_t turn = 0; turn < hands; ++turn) {
            const int64_t mine = (member + turn) % hands;
            std::atomic<int64_t> &next = hand[mine].next;
            for (int64_t chunk = mine + hands * next.fetch_add(1, std::memory_order_relaxed); chunk < n_chunks;
                 chunk = mine + hands * next.fetch_add(1, std::memory_order_relaxed)) {
                function(context, chunk, member);
            }
        }
    }
    static void run_member(void *work) { static_cast<Work *>(work)->run(); }
};

using GompParallel = void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

struct OpenMp {
    GompParallel parallel = nullptr;
    std::string path;
};

// dlsym on torch's own handle searches torch's dependencies, so it finds the runtime that torch is bound to whatever
// its file is called, and no other that happens to be loaded.
OpenMp find_openmp() {
    std::string torch;
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *found) {
            const char *slash = std::strrchr(info->dlpi_name, '/');
            const char *file = slash == nullptr ? info->dlpi_name : slash + 1;
            if (std::strncmp(file, "libtorch_cpu.so", 15) == 0) {
                *static_cast<std::string *>(found) = info->dlpi_name;
                return 1;
            }
            return 0;
        },
        &torch);
    OpenMp openmp;
    if (torch.empty()) {
        return openmp;
    }
    void *handle = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) {
        return openmp;
    }
    void *symbol = dlsym(handle, "GOMP_parallel");
    Dl_info info;
    if (symbol != nullptr && dladdr(symbol, &info) != 0) {
        openmp.parallel = reinterpret_cast<GompParallel>(symbol);
        openmp.path = info.dli_fname;
    }
    dlclose(handle);  // torch is never unloaded; the count goes back to what it was
    return openmp;
}

// Whether this process was forked and has not called exec() since: the kernel's own note of it (PF_FORKNOEXEC).
bool came_from_fork() {
    constexpr unsigned long kForkNoExec = 0x40;
    std::ifstream file("/proc/self/stat");
    std::string text;
    std::getline(file, text);
    // "pid (name) state ppid pgrp session tty tpgid flags ...": the name may hold spaces and brackets.
    std::istringstream fields(text.substr(text.rfind(')') == std::string::npos ? text.size() : text.rfind(')') + 1));
    std::string skipped;
    for (int i = 0; i < 6; ++i) {
        fields >> skipped;
    }
    unsigned long flags = 0;
    fields >> flags;
    return (flags & kForkNoExec) != 0;
}

// True in a child of fork(), whose OpenMP team stayed with the parent: a region would wait for it for ever. Known from
// the moment that the library is loaded, because the team may be torch's doing, long before a first region of ours. A
// library that is loaded in a child cannot know whether its parent had a team, and takes it for granted.
struct Fork {
    std::atomic<bool> happened{came_from_fork()};
    Fork();
};

Fork fork_state;

Fork::Fork() {
    pthread_atfork(nullptr, nullptr, [] { fork_state.happened.store(true, std::memory_order_relaxed); });
}

const OpenMp &openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

void run_on_new_threads(Work &work, int64_t threads) {
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(static_cast<size_t>(threads - 1));
        for (int64_t i = 1; i < threads; ++i) {
            helpers.emplace_back([&work] { work.run(); });
        }
    } catch (const std::exception &) {
        // Fewer threads than asked for do the same work (QC-NUM-007).
    }
    work.run();
    for (std::thread &helper : helpers) {
        helper.join();
    }
}

}  // namespace

int64_t thread_limit(uintptr_t stream) {
    constexpr uintptr_t kMax = 1024;
    if (stream != 0) {
        return static_cast<int64_t>(stream < kMax ? stream : kMax);
    }
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        return CPU_COUNT(&allowed);
    }
    return 1;
}

void run_chunks(int64_t n_chunks, int64_t max_threads, ChunkFunction function, const void *context) {
    if (n_chunks <= 1 || max_threads <= 1) {
        const IeeeArithmetic ieee;
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
            function(context, chunk, 0);
        }
        return;
    }
    Work work(function, context, n_chunks, max_threads);
    const OpenMp &omp = openmp();
    if (omp.parallel != nullptr && !fork_state.happened.load(std::memory_order_relaxed)) {
        // Always the full team, even for two chunks: libgomp ends the threads that a smaller region leaves out, and
        // starts new ones for torch's next.
        omp.parallel(&Work::run_member, &work, static_cast<unsigned>(max_threads), 0);
        return;
    }
    run_on_new_threads(work, n_chunks < max_threads ? n_chunks : max_threads);
}

std::string threading_description() {
    const OpenMp &omp = openmp();
    return omp.parallel != nullptr ? "OpenMP team of torch (" + omp.path + ")"
                                   : "own threads per call (torch's OpenMP not found)";
}

}  // namespace qcore::cpu
