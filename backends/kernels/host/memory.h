// Whether kernels of a device may use an address: a host pointer or one of another device would otherwise be a fault
// that the context never recovers from.
#ifndef QCORE_GPU_MEMORY_H
#define QCORE_GPU_MEMORY_H

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace qcore::gpu {

// What the runtime says of an address.
struct Memory {
    enum class Kind { unknown, pinned, device, managed };
    Kind kind;
    int32_t device;
};

// "" or what is wrong with the memory, for "expected memory of device 0, got ...". `pageable`: the device reads the
// host's own memory (Grace, heterogeneous memory management, AMD's with XNACK).
inline std::string memory_refusal(const Memory &memory, int32_t device, bool pageable) {
    switch (memory.kind) {
        case Memory::Kind::device:
            return memory.device == device ? "" : "memory of device " + std::to_string(memory.device);
        case Memory::Kind::unknown:
            return pageable ? "" : "memory of the host that is not pinned, or no memory";
        default:
            return "";
    }
}

// The pages in which an address of a device's own memory was found before: the runtime hands such memory out in pages
// of 2^PageShift bytes, so asking once for each is enough, and a call costs no more than a few reads. A page that is
// freed stays known: what this misses then is a use after free.
template <int PageShift>
class KnownPages {
   public:
    bool holds(uintptr_t address, int32_t device) const {
        return slot(address).load(std::memory_order_relaxed) == key(address, device);
    }
    void add(uintptr_t address, int32_t device) {
        slot(address).store(key(address, device), std::memory_order_relaxed);
    }

   private:
    static constexpr size_t kSlots = 2048;

    static uint64_t key(uintptr_t address, int32_t device) {
        return (static_cast<uint64_t>(address) >> PageShift) << 16 | (static_cast<uint64_t>(device) + 1);
    }
    static size_t place(uintptr_t address) { return (address >> PageShift) % kSlots; }
    const std::atomic<uint64_t> &slot(uintptr_t address) const { return slots_[place(address)]; }
    std::atomic<uint64_t> &slot(uintptr_t address) { return slots_[place(address)]; }

    std::array<std::atomic<uint64_t>, kSlots> slots_{};
};

// memory_refusal() of an address, which `look(address)` asks the runtime about where its page is not known.
template <int PageShift, class Look>
std::string address_refusal(KnownPages<PageShift> &known, uintptr_t address, int32_t device, bool pageable,
                            const Look &look) {
    if (known.holds(address, device)) {
        return "";
    }
    const Memory memory = look(address);
    std::string refusal = memory_refusal(memory, device, pageable);
    if (refusal.empty() && memory.kind == Memory::Kind::device) {
        known.add(address, device);
    }
    return refusal;
}

}  // namespace qcore::gpu

#endif  // QCORE_GPU_MEMORY_H
