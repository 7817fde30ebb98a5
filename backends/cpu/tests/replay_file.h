// Recorded calls (qcore_conformance/record.py has the form of the file), and memory with canaries to run them on.
#ifndef QCORE_CPU_TESTS_REPLAY_FILE_H
#define QCORE_CPU_TESTS_REPLAY_FILE_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "qcore_backend.h"

namespace replay {

inline constexpr size_t kGuard = 64;
inline constexpr unsigned char kCanary = 0xA7;
inline constexpr size_t kSizes[] = {4, 2, 2, 1, 1, 4};  // f32, f16, bf16, u8, i8, i32
inline constexpr int kU8 = 3;

// Memory of exactly so many bytes, aligned to 64, with canaries around it.
class Buffer {
   public:
    explicit Buffer(size_t bytes) : bytes_(bytes), raw_(bytes + 3 * kGuard, kCanary) {
        const auto at = reinterpret_cast<uintptr_t>(raw_.data()) + kGuard;
        start_ = raw_.data() + kGuard + (kGuard - at % kGuard) % kGuard;
    }
    unsigned char *data() { return start_; }
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(start_); }
    size_t bytes() const { return bytes_; }
    bool intact() const {
        const unsigned char *end = raw_.data() + raw_.size();
        for (const unsigned char *p = raw_.data(); p < end; ++p) {
            if ((p < start_ || p >= start_ + bytes_) && *p != kCanary) {
                return false;
            }
        }
        return true;
    }

   private:
    size_t bytes_;
    std::vector<unsigned char> raw_;
    unsigned char *start_;
};

struct Array {
    int dtype = 0;
    std::vector<int64_t> shape;
    std::vector<unsigned char> bytes;  // or, of an interval:
    std::vector<double> low, high;

    size_t count() const {
        size_t n = 1;
        for (const int64_t size : shape) {
            n *= static_cast<size_t>(size);
        }
        return n;
    }
};

struct Call {
    std::string name, op;
    std::map<std::string, int64_t> integers;
    std::map<std::string, double> reals;
    std::map<std::string, Array> inputs, outputs;
};

class Reader {
   public:
    explicit Reader(const char *path) : file_(path, std::ios::binary) {
        if (!file_) {
            throw std::runtime_error(std::string(path) + ": cannot be opened");
        }
    }
    bool at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }
    void bytes(void *to, size_t count) {
        file_.read(static_cast<char *>(to), static_cast<std::streamsize>(count));
        if (static_cast<size_t>(file_.gcount()) != count) {
            throw std::runtime_error("the file ends in the middle of a call");
        }
    }
    template <class T>
    T value() {
        T v;
        bytes(&v, sizeof v);
        return v;
    }
    std::string text() {
        std::string s(value<uint32_t>(), '\0');
        bytes(&s[0], s.size());
        return s;
    }
    template <class T>
    void group(std::map<std::string, T> *values) {
        for (auto left = value<uint32_t>(); left > 0; --left) {
            const std::string name = text();
            (*values)[name] = value<T>();
        }
    }
    void arrays(std::map<std::string, Array> *values, bool expected) {
        for (auto left = value<uint32_t>(); left > 0; --left) {
            Array &array = (*values)[text()];
            array.dtype = value<uint8_t>();
            for (int n = value<uint8_t>(); n > 0; --n) {
                array.shape.push_back(value<int64_t>());
            }
            if (expected && value<uint8_t>() == 1) {
                array.low.resize(array.count());
                array.high.resize(array.count());
                bytes(array.low.data(), 8 * array.low.size());
                bytes(array.high.data(), 8 * array.high.size());
            } else {
                array.bytes.resize(array.count() * kSizes[array.dtype]);
                bytes(array.bytes.data(), array.bytes.size());
            }
        }
    }
    Call call() {
        Call c;
        c.name = text();
        c.op = text();
        group(&c.integers);
        group(&c.reals);
        arrays(&c.inputs, false);
        arrays(&c.outputs, true);
        return c;
    }

   private:
    std::ifstream file_;
};

double as_double(int dtype, const unsigned char *p) {
    uint32_t bits = 0;
    std::memcpy(&bits, p, kSizes[dtype]);
    if (dtype == QC_F16) {
        const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double sign = bits >> 15 ? -1.0 : 1.0;
        if (exponent == 31) {
            return fraction ? NAN : sign * INFINITY;
        }
        return sign * (exponent ? std::ldexp(1024.0 + fraction, static_cast<int>(exponent) - 25)
                                : std::ldexp(static_cast<double>(fraction), -24));
    }
    bits = dtype == QC_BF16 ? bits << 16 : bits;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace replay

#endif  // QCORE_CPU_TESTS_REPLAY_FILE_H
