// What the GPUs of each target can do: the one place that says so.
//
// A target that is not here can still be built for (its matrix units are then left alone); what a build serves is the
// list that CMake was given.
#ifndef QCORE_GPU_CAPABILITIES_H
#define QCORE_GPU_CAPABILITIES_H

#include <cstdint>
#include <cstring>

#include "qcore_backend.h"

namespace qcore::gpu {

struct Capability {
    const char *arch;
    int wave;
    bool f16, bf16, int8;  // matrix units for these, with which products run (backends/kernels/matrix.cuh)
    const char *unit;
    const char *devices;
};

inline constexpr Capability kCapabilities[] = {
    {"sm_75", 32, true, false, true, "mma.sync m16n8k8, m8n8k16", "Turing: T4, RTX 20"},
    {"sm_80", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Ampere: A100, A30"},
    {"sm_86", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Ampere: RTX 30, A10, A40"},
    {"sm_87", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Ampere: Orin"},
    {"sm_89", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Ada: RTX 40, L4, L40"},
    {"sm_90", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Hopper: H100, H200"},
    {"sm_100", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Blackwell: B200"},
    {"sm_103", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Blackwell: B300"},
    {"sm_110", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Blackwell: Thor"},
    {"sm_120", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Blackwell: RTX 50"},
    {"sm_121", 32, true, true, true, "mma.sync m16n8k16, m16n8k32", "Blackwell: GB10"},
    {"gfx90a", 64, true, true, true, "MFMA 16x16x16; float16 as float32 16x16x4", "CDNA2: MI210, MI250"},
    {"gfx942", 64, true, true, true, "MFMA 16x16x16, 16x16x32", "CDNA3: MI300, MI325"},
    {"gfx1030", 32, false, false, true, "dot products of four int8", "RDNA2: RX 6800, RX 6900"},
    {"gfx1031", 32, false, false, true, "dot products of four int8", "RDNA2: RX 6700"},
    {"gfx1032", 32, false, false, true, "dot products of four int8", "RDNA2: RX 6600"},
    {"gfx1100", 32, true, true, true, "WMMA 16x16x16", "RDNA3: RX 7900"},
    {"gfx1101", 32, true, true, true, "WMMA 16x16x16", "RDNA3: RX 7700, RX 7800"},
    {"gfx1102", 32, true, true, true, "WMMA 16x16x16", "RDNA3: RX 7600"},
    {"gfx1103", 32, true, true, true, "WMMA 16x16x16", "RDNA3: Radeon 780M"},
    {"gfx1150", 32, true, true, true, "WMMA 16x16x16", "RDNA3.5: Radeon 890M"},
    {"gfx1151", 32, true, true, true, "WMMA 16x16x16", "RDNA3.5: Radeon 8060S"},
    {"gfx1200", 32, true, true, true, "WMMA 16x16x16", "RDNA4: RX 9060"},
    {"gfx1201", 32, true, true, true, "WMMA 16x16x16", "RDNA4: RX 9070"},
};

// Null for a target that is not in the table.
inline const Capability *capability_of(const char *arch) {
    for (const Capability &row : kCapabilities) {
        if (std::strcmp(row.arch, arch) == 0) {
            return &row;
        }
    }
    return nullptr;
}

// Newer NVIDIA GPUs keep the instructions of older ones: their capability is that of the newest row before them.
inline const Capability *nvidia_capability(int major_minor) {
    const Capability *found = nullptr;
    int best = 0;
    for (const Capability &row : kCapabilities) {
        int number = 0;
        for (const char *digit = row.arch + 3; row.arch[0] == 's' && *digit != '\0'; ++digit) {
            number = 10 * number + (*digit - '0');
        }
        if (number > best && number <= major_minor) {
            best = number;
            found = &row;
        }
    }
    return found;
}

// Whether the units of a device take factors of a dtype.
inline bool takes(const Capability *capability, int32_t dtype) {
    return capability != nullptr && (dtype == QC_F16 ? capability->f16 : dtype == QC_BF16 && capability->bf16);
}

}  // namespace qcore::gpu

#endif  // QCORE_GPU_CAPABILITIES_H
