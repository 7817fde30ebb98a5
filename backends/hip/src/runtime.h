// The HIP runtime that this process has, or the machine.
#ifndef QCORE_HIP_RUNTIME_H
#define QCORE_HIP_RUNTIME_H

#include <string>

namespace qcore_hip {

// "" or why there is no runtime to call: a sentence that begins with "no device:" and ends with the fix.
std::string runtime_problem();

}  // namespace qcore_hip

#endif  // QCORE_HIP_RUNTIME_H
