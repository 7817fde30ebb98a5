// Memory pages of large outputs.
//
// A fresh tensor of tens of megabytes has no pages yet: torch takes it from malloc, which maps it anew, and gives it
// back at once. The kernel then brings one page of 4 KiB at a time, zeroed, when it is first written: 0.75 ms a
// megabyte on the machine of docs/results, five times what writing it takes. With pages of 2 MiB it is a third of that.
#ifndef QCORE_CPU_PAGES_H
#define QCORE_CPU_PAGES_H

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qcore::cpu {

// Asks for huge pages where `bytes` bytes from `address` on are about to be written. Only a hint, which changes nothing
// but time: what the kernel does not grant, or has mapped already, stays as it is.
inline void prefer_huge_pages(uintptr_t address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    constexpr int64_t kLarge = 4 << 20;
    if (bytes < kLarge) {
        return;
    }
    const uintptr_t first = (address + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
    if (first < end) {
        (void)madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
    }
#else
    (void)address;
    (void)bytes;
#endif
}

inline constexpr int64_t kPastCachesAlign = 64;

// Whether `bytes` bytes from `address` on are better written past the caches: more than a share of the last cache
// holds, so that they are read before they are written and written back soon after, twice the traffic; and with pages
// already, since new ones have just been zeroed in the caches.
inline bool writes_past_caches(uintptr_t address, int64_t bytes) {
#ifdef __linux__
    constexpr int64_t kLarge = 16 << 20;
    if (bytes < kLarge || address % kPastCachesAlign != 0) {
        return false;
    }
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    unsigned char resident = 0;
    const uintptr_t middle = (address + static_cast<uintptr_t>(bytes) / 2) / page * page;
    return mincore(reinterpret_cast<void *>(middle), page, &resident) == 0 && (resident & 1) != 0;
#else
    (void)address;
    (void)bytes;
    return false;
#endif
}

}  // namespace qcore::cpu

#endif  // QCORE_CPU_PAGES_H
