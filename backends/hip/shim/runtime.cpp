// NVIDIA's runtime is linked in: there is nothing to look for.
#include "../src/runtime.h"

namespace qcore_hip {

std::string runtime_problem() { return ""; }

}  // namespace qcore_hip
