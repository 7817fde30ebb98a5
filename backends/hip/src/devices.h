// The AMD GPUs of this machine, found once; the parts of the library share it (waves.cpp).
#ifndef QCORE_HIP_DEVICES_H
#define QCORE_HIP_DEVICES_H

#include <string>
#include <vector>

#include "qcore_backend.h"

namespace qcore_hip {

struct Device {
    std::string name;
    std::string arch;       // "gfx90a", without the features behind a colon
    int wave = 0;           // 32 or 64
    int threads = 0;        // that run at once
    bool pageable = false;  // reads the host's own memory
    bool pages = false;     // of managed memory move to it while it runs
    std::string refusal;    // why this build does not run there, or ""
};

struct Machine {
    qc_status status = QC_OK;
    std::string refusal;
    int driver = 0, runtime = 0;
    std::vector<Device> devices;
};

// What was found at the first call; a device does not come or go while a process runs.
const Machine &machine();

// 60241134 as "6.2".
std::string version_text(int version);

}  // namespace qcore_hip

#endif  // QCORE_HIP_DEVICES_H
