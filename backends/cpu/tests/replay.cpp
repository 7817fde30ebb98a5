// Replays recorded calls of the conformance suite on a library with the C ABI, where there is no Python:
//
//     qcore_cpu_replay ./libqcore_cpu.so calls.bin
//
// What each call has to give, and the form of the file, is decided by qcore_conformance/record.py; here bits are
// compared, any NaN with any NaN, or a value with its interval. Each call runs on one thread and on three.
#include <dlfcn.h>

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "qcore_backend.h"
#include "replay_file.h"
#include "replay_optimizer.h"

namespace {

using replay::Array;
using replay::as_double;
using replay::Buffer;
using replay::Call;
using replay::kSizes;
using replay::kU8;
using replay::Reader;

// The first element that is wrong, or -1.
int64_t first_wrong(const Array &want, const unsigned char *got) {
    const size_t size = kSizes[want.dtype];
    for (size_t i = 0; i < want.count(); ++i) {
        const unsigned char *p = got + i * size;
        if (!want.low.empty()) {
            const double y = as_double(want.dtype, p);
            if (std::isnan(want.low[i]) ? !std::isnan(y) : !(want.low[i] <= y && y <= want.high[i])) {
                return static_cast<int64_t>(i);
            }
        } else if (std::memcmp(p, want.bytes.data() + i * size, size) != 0) {
            const bool nans = want.dtype < kU8 && std::isnan(as_double(want.dtype, p)) &&
                              std::isnan(as_double(want.dtype, want.bytes.data() + i * size));
            if (!nans) {
                return static_cast<int64_t>(i);
            }
        }
    }
    return -1;
}

// One call on one number of threads.
class Replay {
   public:
    Replay(const qc_api *api, const Call &call, uintptr_t threads) : api_(api), call_(call), threads_(threads) {
        for (const auto &[name, array] : call.inputs) {
            Buffer &buffer = buffers_.emplace(name, array.bytes.size()).first->second;
            std::memcpy(buffer.data(), array.bytes.data(), array.bytes.size());
        }
        for (const auto &[name, array] : call.outputs) {
            Buffer &buffer = buffers_.emplace("out:" + name, array.count() * kSizes[array.dtype]).first->second;
            if (const auto before = call.inputs.find(name); before != call.inputs.end()) {  // changes in place
                std::memcpy(buffer.data(), before->second.bytes.data(), buffer.bytes());
            }
        }
    }

    // "" or what is wrong.
    std::string run() {
        const qc_status status = invoke();
        if (status != QC_OK) {
            return "status " + std::to_string(status) + ": " + api_->last_error();
        }
        for (const auto &[name, buffer] : buffers_) {
            if (!buffer.intact()) {
                return name + ": written outside";
            }
        }
        for (const auto &[name, want] : call_.outputs) {
            const unsigned char *got = buffers_.at("out:" + name).data();
            const int64_t at = first_wrong(want, got);
            if (at >= 0) {
                char text[160];
                const auto i = static_cast<size_t>(at);
                uint32_t bits = 0;
                std::memcpy(&bits, got + i * kSizes[want.dtype], kSizes[want.dtype]);
                if (!want.low.empty()) {
                    std::snprintf(text, sizeof text, "[%" PRId64 "] is %.9g, expected %.9g to %.9g", at,
                                  as_double(want.dtype, got + i * kSizes[want.dtype]), want.low[i], want.high[i]);
                } else {
                    uint32_t wanted = 0;
                    std::memcpy(&wanted, want.bytes.data() + i * kSizes[want.dtype], kSizes[want.dtype]);
                    std::snprintf(text, sizeof text, "[%" PRId64 "] is 0x%x, expected 0x%x", at, bits, wanted);
                }
                return name + text;
            }
        }
        return "";
    }

   private:
    uintptr_t in(const std::string &name) const {
        const auto found = buffers_.find(name);
        return found == buffers_.end() ? 0 : found->second.address();
    }
    uintptr_t out(const std::string &name) const { return in("out:" + name); }
    int dtype(const std::string &input) const { return call_.inputs.at(input).dtype; }
    int out_dtype() const { return call_.outputs.at("out").dtype; }
    int64_t size(const std::string &input, size_t axis) const { return call_.inputs.at(input).shape.at(axis); }
    int64_t numel(const std::string &input) const { return static_cast<int64_t>(call_.inputs.at(input).count()); }
    int64_t integer(const std::string &name) const {
        const auto found = call_.integers.find(name);
        return found == call_.integers.end() ? 0 : found->second;
    }
    int bias_dtype() const { return call_.inputs.count("bias") ? dtype("bias") : out_dtype(); }

    // `more` bytes than the library asks for.
    Buffer workspace(int32_t op, int32_t dtype, int64_t m, int64_t n, int64_t k, size_t more = 0) {
        int64_t bytes = 0;
        if (api_->workspace(op, 0, threads_, dtype, m, n, k, &bytes) != QC_OK) {
            throw std::runtime_error(std::string("workspace: ") + api_->last_error());
        }
        return Buffer(static_cast<size_t>(bytes) + more);
    }

    qc_weight_4bit weight() const {
        qc_weight_4bit w = {};
        w.packed = in("packed");
        w.absmax = in("absmax");
        w.nested_absmax = in("nested_absmax");
        w.nested_code = in("nested_code");
        w.nested_offset = in("nested_offset");
        w.numel = integer("numel");
        w.blocksize = integer("blocksize");
        w.nested_blocksize = integer("nested_blocksize");
        w.format = static_cast<int32_t>(integer("format"));
        return w;
    }

    qc_status invoke() {
        const std::string &op = call_.op;
        const int64_t blocksize = integer("blocksize");
        if (op == "quantize_blockwise") {
            return api_->quantize_blockwise(0, threads_, dtype("A"), in("A"), in("code"), numel("A"), blocksize,
                                            out("absmax"), out("out"));
        }
        if (op == "dequantize_blockwise") {
            return api_->dequantize_blockwise(0, threads_, out_dtype(), in("A"), in("absmax"), in("code"), numel("A"),
                                              blocksize, out("out"));
        }
        if (op == "quantize_4bit") {
            return api_->quantize_4bit(0, threads_, dtype("A"), static_cast<int32_t>(integer("format")), in("A"),
                                       numel("A"), blocksize, out("absmax"), out("out"));
        }
        if (op == "dequantize_4bit") {
            const qc_weight_4bit w = weight();
            return api_->dequantize_4bit(0, threads_, out_dtype(), &w, out("out"));
        }
        if (op == "quantize_absmax") {
            return api_->quantize_absmax(0, threads_, in("absmax"), in("code"), numel("absmax"), blocksize, out("out"),
                                         out("nested_absmax"), out("offset"));
        }
        if (op == "dequantize_absmax") {
            return api_->dequantize_absmax(0, threads_, in("A"), in("nested_absmax"), in("code"), in("offset"),
                                           numel("A"), blocksize, out("out"));
        }
        if (op == "int8_quantize_rows") {
            return api_->int8_quantize_rows(0, threads_, dtype("A"), in("A"), size("A", 0), size("A", 1), threshold(),
                                            out("out"), out("row_stats"), out("outlier_cols"));
        }
        if (op == "int8_quantize_cols") {
            return api_->int8_quantize_cols(0, threads_, dtype("A"), in("A"), size("A", 0), size("A", 1), threshold(),
                                            out("out"), out("col_stats"));
        }
        if (op == "int8_dequantize_gemm") {
            return api_->int8_dequantize_gemm(0, threads_, out_dtype(), size("C", 0), size("C", 1), in("C"),
                                              in("row_stats"), in("col_stats"), bias_dtype(), in("bias"), out("out"));
        }
        if (op == "int8_dequantize_rows") {
            return api_->int8_dequantize_rows(0, threads_, out_dtype(), size("A", 0), size("A", 1), in("A"),
                                              in("row_stats"), out("out"));
        }
        if (op == "optimizer_step") {
            return optimizer_step();
        }
        if (op == "int8_linear") {
            return int8_linear();
        }
        return product();
    }

    qc_status optimizer_step() {
        const auto address = [&](const std::string &name) { return call_.outputs.count(name) ? out(name) : in(name); };
        const replay::OptimizerCall step(call_, address);
        Buffer scratch =
            step.needs_scratch() ? workspace(QC_OP_OPTIMIZER_STEP, QC_F32, step.blocks(), step.count(), 0) : Buffer(0);
        return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
            return api_->optimizer_step(0, threads_, step.optimizer(), step.tensors(), at, bytes);
        });
    }

    qc_status int8_linear() {
        const int64_t m = size("A", 0), k = size("A", 1), n = size("codes", 0);
        Buffer scratch = workspace(QC_OP_INT8_LINEAR, out_dtype(), m, n, k);
        return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
            return api_->int8_linear(0, threads_, out_dtype(), m, n, k, in("A"), in("codes"), in("scales"), threshold(),
                                     bias_dtype(), in("bias"), out("out"), out("outliers"), at, bytes);
        });
    }

    // call(address, bytes) with scratch, which has to be intact afterwards.
    template <class Function>
    qc_status in_scratch(const Buffer &scratch, const Function &call) const {
        const qc_status status = call(scratch.bytes() ? scratch.address() : 0, static_cast<int64_t>(scratch.bytes()));
        if (!scratch.intact()) {
            throw std::runtime_error(call_.name + ": written outside the workspace");
        }
        return status;
    }

    float threshold() const { return static_cast<float>(call_.reals.at("threshold")); }

    qc_status gemm_int4(int64_t m, int64_t k) {
        qc_weight_int4 w = {};
        w.packed = in("packed");
        w.scales = in("scales");
        w.zeros = in("zeros");
        w.perm = in("perm");
        w.n = integer("shape0");
        w.k = integer("shape1");
        w.group_size = integer("group_size");
        w.scale_dtype = dtype("scales");
        const size_t x_bytes = call_.inputs.at("A").bytes.size();
        const size_t gathered = w.perm != 0 ? (x_bytes + 63) / 64 * 64 : 0;  // QC-INT4-003
        Buffer scratch = workspace(QC_OP_GEMM_INT4, out_dtype(), m, w.n, k, gathered);
        return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
            return api_->gemm_int4(0, threads_, out_dtype(), m, w.n, k, in("A"), &w, bias_dtype(), in("bias"),
                                   out("out"), at, bytes);
        });
    }

    qc_status product() {
        const std::string &op = call_.op;
        const int64_t m = size("A", 0), k = size("A", 1);
        if (op == "gemm_4bit") {
            const qc_weight_4bit w = weight();
            const int64_t n = integer("shape0");
            return in_scratch(workspace(QC_OP_GEMM_4BIT, out_dtype(), m, n, k), [&](uintptr_t at, int64_t bytes) {
                return api_->gemm_4bit(0, threads_, out_dtype(), m, n, k, in("A"), &w, bias_dtype(), in("bias"),
                                       out("out"), at, bytes);
            });
        }
        if (op == "gemm_int4") {
            return gemm_int4(m, k);
        }
        if (op == "gemm_4bit_transposed") {
            const qc_weight_4bit w = weight();
            const int64_t columns = integer("shape1");
            Buffer scratch = workspace(QC_OP_GEMM_4BIT_TRANSPOSED, out_dtype(), m, k, columns);
            return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
                return api_->gemm_4bit_transposed(0, threads_, out_dtype(), m, k, columns, in("A"), &w, out("out"), at,
                                                  bytes);
            });
        }
        if (op == "int8_linear_transposed") {
            const int64_t columns = size("codes", 1);
            Buffer scratch = workspace(QC_OP_INT8_LINEAR_TRANSPOSED, out_dtype(), m, k, columns);
            return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
                return api_->int8_linear_transposed(0, threads_, out_dtype(), m, k, columns, in("A"), in("codes"),
                                                    in("scales"), out("out"), at, bytes);
            });
        }
        if (op == "int8_gemm") {
            const int64_t n = size("B", 0);
            return in_scratch(workspace(QC_OP_INT8_GEMM, QC_F32, m, n, k), [&](uintptr_t at, int64_t bytes) {
                return api_->int8_gemm(0, threads_, m, n, k, in("A"), in("B"), out("out"), at, bytes);
            });
        }
        if (op == "int8_scaled_gemm") {
            const int64_t n = size("B", 0);
            Buffer scratch = workspace(QC_OP_INT8_SCALED_GEMM, out_dtype(), m, n, k);
            return in_scratch(scratch, [&](uintptr_t at, int64_t bytes) {
                return api_->int8_scaled_gemm(0, threads_, out_dtype(), m, n, k, in("A"), in("B"), in("row_stats"),
                                              in("col_stats"), bias_dtype(), in("bias"), out("out"), at, bytes);
            });
        }
        throw std::runtime_error(op + ": no such op; bring replay.cpp up to date");
    }

    const qc_api *api_;
    const Call &call_;
    uintptr_t threads_;
    std::map<std::string, Buffer> buffers_;
};

// The recorded intervals hold for a library that declares what they were made from.
void check_declarations(const qc_api *api, Reader *reader) {
    const char *json = nullptr;
    if (api->describe(0, &json) != QC_OK) {
        throw std::runtime_error(std::string("describe: ") + api->last_error());
    }
    const std::string said = json;
    for (auto left = reader->value<uint32_t>(); left > 0; --left) {
        const std::string op = reader->text();
        const auto lanes = reader->value<int64_t>(), extra = reader->value<int64_t>();
        const std::string part = "\"" + op + "\": {\"depth\": {\"lanes\": " + std::to_string(lanes) +
                                 ", \"extra\": " + std::to_string(extra) + "}, \"weight_rounding\": \"" +
                                 reader->text() + "\"}";
        if (said.find(part) == std::string::npos) {
            throw std::runtime_error("the calls were recorded for a library that declares " + part +
                                     ", this one: " + said);
        }
    }
    std::printf("%s\n", json);
}

int replay_calls(const char *library, const char *path) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        throw std::runtime_error(dlerror());
    }
    const auto open = reinterpret_cast<decltype(&qcore_backend_open)>(dlsym(handle, "qcore_backend_open"));
    const qc_api *api = open != nullptr ? open(QC_ABI_MAJOR) : nullptr;
    if (api == nullptr) {
        throw std::runtime_error(std::string(library) + ": no qcore backend of this ABI");
    }
    Reader reader(path);
    char magic[8];
    reader.bytes(magic, sizeof magic);
    if (std::memcmp(magic, "QCCALLS2", sizeof magic) != 0) {
        throw std::runtime_error(std::string(path) + ": no recorded calls of this version");
    }
    check_declarations(api, &reader);
    std::map<std::string, int> passed;
    int failed = 0;
    while (!reader.at_end()) {
        const Call call = reader.call();
        for (const uintptr_t threads : {1, 3}) {
            const std::string wrong = Replay(api, call, threads).run();
            if (wrong.empty()) {
                ++passed[call.op];
            } else {
                ++failed;
                std::printf("FAILED %s, %s on %d threads: %s\n", call.name.c_str(), call.op.c_str(),
                            static_cast<int>(threads), wrong.c_str());
            }
        }
    }
    int total = 0;
    for (const auto &[op, count] : passed) {
        std::printf("%-22s %6d passed\n", op.c_str(), count);
        total += count;
    }
    std::printf("%d calls passed, %d failed\n", total, failed);
    return failed != 0 || total == 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s LIBRARY CALLS\n", argv[0]);
        return 2;
    }
    try {
        return replay_calls(argv[1], argv[2]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
