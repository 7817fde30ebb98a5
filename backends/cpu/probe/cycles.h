// Times of short loops, in cycles of the core. For programs that nothing else runs beside.
#ifndef QCORE_CPU_CYCLES_H
#define QCORE_CPU_CYCLES_H

#include <algorithm>
#include <ctime>
#include <vector>

namespace qcore::cpu {

struct Times {
    double least;
    double median;
};

inline double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Of many short runs.
template <class Function>
Times times_of(const Function &function) {
    constexpr int kRuns = 1000;
    std::vector<double> took(kRuns);
    for (double &run : took) {
        const double start = seconds();
        function();
        run = seconds() - start;
    }
    std::sort(took.begin(), took.end());
    return {took[0], took[kRuns / 2]};
}

template <class Function>
double least_seconds(const Function &function) {
    return times_of(function).least;
}

// A third of a dependent multiplication of integers.
inline double cycle_seconds() {
    constexpr int kLoops = 2000;
    long a = 1;
    const long b = 3;
    const double took = least_seconds([&] {
        for (int i = 0; i < kLoops; ++i) {
            asm volatile("imul %1, %0\nimul %1, %0\nimul %1, %0\nimul %1, %0" : "+r"(a) : "r"(b));
        }
    });
    return took / kLoops / (4 * 3);
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_CYCLES_H
