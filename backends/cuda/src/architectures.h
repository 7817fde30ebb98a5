// Which devices a build serves, from the list that CMake was given: no context is made to find out.
#ifndef QCORE_CUDA_ARCHITECTURES_H
#define QCORE_CUDA_ARCHITECTURES_H

#include <cctype>
#include <sstream>
#include <string>

namespace qcore::gpu {

// `built` is CMAKE_CUDA_ARCHITECTURES with spaces, such as "75-real 90a-real 120"; `capability` 90 for 9.0. Machine
// code
// (-real) runs on its own major version from its own minor on, PTX (-virtual) on everything from there on, an entry
// without either is both, and one with the letter a runs on exactly its own.
inline bool runs_on(const std::string &built, int capability) {
    std::istringstream entries(built);
    for (std::string entry; entries >> entry;) {
        size_t digits = 0;
        while (digits < entry.size() && std::isdigit(static_cast<unsigned char>(entry[digits])) != 0) {
            ++digits;
        }
        if (digits == 0) {
            continue;
        }
        const int number = std::stoi(entry.substr(0, digits));
        const std::string rest = entry.substr(digits);
        const bool code = rest.find("-virtual") == std::string::npos, ptx = rest.find("-real") == std::string::npos;
        if (rest.compare(0, 1, "a") == 0) {
            if (number == capability) {
                return true;
            }
        } else if ((code && number / 10 == capability / 10 && number <= capability) || (ptx && number <= capability)) {
            return true;
        }
    }
    return false;
}

}  // namespace qcore::gpu

#endif  // QCORE_CUDA_ARCHITECTURES_H
