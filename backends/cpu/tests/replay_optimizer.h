// The structs of optimizer_step, from a recorded call: entry i of a list is called "name[i]".
#ifndef QCORE_CPU_TESTS_REPLAY_OPTIMIZER_H
#define QCORE_CPU_TESTS_REPLAY_OPTIMIZER_H

#include <map>
#include <string>
#include <vector>

#include "replay_file.h"

namespace replay {

class OptimizerCall {
   public:
    // `address` gives where a tensor lies, by its name.
    template <class Address>
    OptimizerCall(const Call &call, const Address &address) : count_(call.integers.at("count")) {
        const auto integer = [&](const char *name) { return static_cast<int32_t>(call.integers.at(name)); };
        const auto real = [&](const char *name) { return static_cast<float>(call.reals.at(name)); };
        optimizer_.algorithm = integer("algorithm");
        optimizer_.state_bits = integer("state_bits");
        optimizer_.param_dtype = integer("param_dtype");
        optimizer_.grad_dtype = integer("grad_dtype");
        optimizer_.flags = integer("flags");
        optimizer_.step_size = real("step_size");
        optimizer_.decay = real("decay");
        optimizer_.l2 = real("l2");
        optimizer_.eps = real("eps");
        optimizer_.beta1 = real("beta1");
        optimizer_.gain1 = real("gain1");
        optimizer_.beta2 = real("beta2");
        optimizer_.gain2 = real("gain2");
        optimizer_.beta3 = real("beta3");
        optimizer_.gain3 = real("gain3");
        optimizer_.correction1 = real("correction1");
        optimizer_.correction2 = real("correction2");
        optimizer_.alpha = real("alpha");
        optimizer_.max_unorm = call.reals.at("max_unorm");
        optimizer_.unorm_factor = call.reals.at("unorm_factor");
        optimizer_.seed = static_cast<uint64_t>(call.integers.at("seed"));
        for (int64_t i = 0; i < count_; ++i) {
            const std::string entry = "[" + std::to_string(i) + "]";
            numel_.push_back(static_cast<int64_t>(call.inputs.at("params" + entry).count()));
            for (auto &[name, list] : lists_) {
                if (call.inputs.count(name + entry)) {
                    list.push_back(address(name + entry));
                }
            }
            if (const auto scale = call.reals.find("grad_scales" + entry); scale != call.reals.end()) {
                scales_.push_back(static_cast<float>(scale->second));
            }
            if (const auto stream = call.integers.find("streams" + entry); stream != call.integers.end()) {
                streams_.push_back(static_cast<uint64_t>(stream->second));
            }
        }
        const auto list = [&](const char *name) -> const uintptr_t * {
            const std::vector<uintptr_t> &addresses = lists_.at(name);
            return addresses.empty() ? nullptr : addresses.data();
        };
        tensors_ = {count_,
                    numel_.data(),
                    list("params"),
                    list("grads"),
                    list("state1"),
                    list("state2"),
                    list("absmax1"),
                    list("absmax2"),
                    list("compensation"),
                    scales_.empty() ? nullptr : scales_.data(),
                    streams_.empty() ? nullptr : streams_.data()};
    }
    OptimizerCall(const OptimizerCall &) = delete;

    const qc_optimizer *optimizer() const { return &optimizer_; }
    const qc_optimizer_tensors *tensors() const { return &tensors_; }
    bool needs_scratch() const { return optimizer_.max_unorm != 0; }
    int64_t count() const { return count_; }
    int64_t blocks() const {
        int64_t sum = 0;
        for (const int64_t n : numel_) {
            sum += (n + 255) / 256;
        }
        return sum;
    }

   private:
    int64_t count_;
    qc_optimizer optimizer_ = {};
    qc_optimizer_tensors tensors_ = {};
    std::vector<int64_t> numel_;
    std::map<std::string, std::vector<uintptr_t>> lists_ = {{"params", {}},      {"grads", {}},   {"state1", {}},
                                                            {"state2", {}},      {"absmax1", {}}, {"absmax2", {}},
                                                            {"compensation", {}}};
    std::vector<float> scales_;
    std::vector<uint64_t> streams_;
};

}  // namespace replay

#endif  // QCORE_CPU_TESTS_REPLAY_OPTIMIZER_H
