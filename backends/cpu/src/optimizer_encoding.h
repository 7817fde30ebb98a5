// The encoding of a block's new states (QC-OPT-021, QC-OPT-023). For kernel files.
//
// It needs the block's absmax, so it can only start when the first loop is through with the block. It is done a group
// at a time beside the second one: dividing leaves the other ports free.
#ifndef QCORE_CPU_OPTIMIZER_ENCODING_H
#define QCORE_CPU_OPTIMIZER_ENCODING_H

#include "block_quantizer.h"
#include "optimizer_block.h"

namespace qcore::cpu::QC_ISA {

struct StateEncoder {
    static constexpr int kVectors = QC_ISA::kVectors;
    static constexpr int kBytes = kGroup;

    void encode(const Float (&y)[kVectors], uint8_t *out) const {
        Int codes[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            codes[v] = search(y[v]);
        }
        pack_bytes(codes, out);
    }
    float bounded(float y) const { return y; }  // integer keys order infinities too

    CodebookCodes search;
};

// What move() takes along where nothing is to be encoded.
struct NoEncoding {
    void group(int64_t) {}
};

template <class Rule>
class Encoding {
   public:
    explicit Encoding(const OptimizerJob &job) : job_(job), as_bnb_((job.rule->flags & QC_OPT_BNB_CODES) != 0) {}

    // Takes a block on, whose values have to stay until finish(); `largest` are their magnitudes, as bits.
    void begin(const OptimizerTensor &t, int64_t index, const Block &b, const int32_t (&largest)[Rule::kStates]) {
        size_ = b.size;
        n_ = b.n;
        unusual_ = as_bnb_ || n_ != size_;
        std::memset(sure_, 0xFF, sizeof sure_);
        for (int s = 0; s < Rule::kStates; ++s) {
            const float absmax = float_of(static_cast<uint32_t>(largest[s]));
            t.absmax[s][index] = absmax;
            values_[s] = b.state[s];
            codes_[s] = b.codes[s];
            target_[s] = static_cast<uint8_t *>(t.state[s]) + b.start;
            scale_[s] = largest[s] == 0 ? 0.0f : 1.0f / absmax;
            careful_[s] = bits_of(scale_[s]) >= kInfinity || (Rule::kSquares[s] && b.odd);
            unusual_ |= careful_[s];
        }
    }

    __attribute__((always_inline)) void group(int64_t at) { encode_group<0>(at); }

    void finish() {
        if (__builtin_expect(!all_sure(), 0)) {
            encode_doubtful();
        }
        if (__builtin_expect(unusual_, 0)) {
            finish_unusual();
        }
    }

   private:
    static constexpr int64_t kGroups = kOptimizerBlock / kGroup;

    __attribute__((noinline)) void finish_unusual() {
        for (int s = 0; s < Rule::kStates; ++s) {
            if (careful_[s]) {
                encode_with_care(s);
            }
            if (as_bnb_ && !Rule::kSquares[s]) {
                lower_negative(s);
            }
            if (n_ != size_) {
                std::memcpy(target_[s], codes_[s], static_cast<size_t>(n_));
            }
        }
    }

    template <int s>
    __attribute__((always_inline)) void encode_group(int64_t at) {
        if (!careful_[s]) {
            const StateCodes<Rule::kSquares[s]> find(*job_.book[s].codes, *job_.book[s].lines);
            const Float scale = broadcast(scale_[s]);
            if (Rule::kSquares[s] && !as_bnb_) {
                sure_[s][at / kGroup] = find.template encode<true>(values_[s] + at, scale, codes_[s] + at);
            } else {
                sure_[s][at / kGroup] = find.template encode<false>(values_[s] + at, scale, codes_[s] + at);
            }
        }
        if constexpr (s + 1 < Rule::kStates) {
            encode_group<s + 1>(at);
        }
    }

    __attribute__((always_inline)) bool all_sure() const {
        bool sure = true;
        for (int s = 0; s < Rule::kStates; ++s) {
            for (const uint16_t lanes : sure_[s]) {
                sure &= lanes == kAllSure;
            }
        }
        return sure;
    }

    // The groups with a value whose estimate is too close to a threshold.
    __attribute__((noinline, cold)) void encode_doubtful() {
        for (int s = 0; s < Rule::kStates; ++s) {
            for (int64_t group = 0; group < kGroups; ++group) {
                const int64_t at = group * kGroup;
                if (sure_[s][group] == kAllSure) {
                    continue;
                }
                if (Rule::kSquares[s] && !as_bnb_) {
                    encode_exactly<true>(*job_.book[s].codes, values_[s] + at, broadcast(scale_[s]), codes_[s] + at);
                } else {
                    encode_exactly<false>(*job_.book[s].codes, values_[s] + at, broadcast(scale_[s]), codes_[s] + at);
                }
            }
        }
    }

    // A block so small that the reciprocal of its absmax overflows (QC-Q8-003), or with a square below 0.
    __attribute__((noinline)) void encode_with_care(int s) {
        const Codebook &book = *job_.book[s].codes;
        const StateEncoder encoder{CodebookCodes(book)};
        BlockQuantizer<StateEncoder>(encoder).quantize(values_[s], size_, codes_[s]);
        for (int64_t i = 0; Rule::kSquares[s] && !as_bnb_ && i < size_; ++i) {
            const bool raised = codes_[s][i] == book.zero_code && values_[s][i] > 0.0f;
            codes_[s][i] = static_cast<uint8_t>(codes_[s][i] + (raised ? 1 : 0));
        }
    }

    void lower_negative(int s) {
        const int32_t zero_code = job_.book[s].codes->zero_code;
        for (int64_t i = 0; i < size_; ++i) {
            const bool lowered = codes_[s][i] == zero_code && bits_of(values_[s][i]) >> 31 != 0;
            codes_[s][i] = static_cast<uint8_t>(codes_[s][i] - (lowered ? 1 : 0));
        }
    }

    const OptimizerJob &job_;
    bool as_bnb_;
    int64_t size_;
    int64_t n_;
    const float *values_[Rule::kStates];
    uint8_t *codes_[Rule::kStates];
    uint8_t *target_[Rule::kStates];
    float scale_[Rule::kStates];
    bool careful_[Rule::kStates];
    bool unusual_;                           // whether the block ends with more than group() has done
    uint16_t sure_[Rule::kStates][kGroups];  // what StateCodes::encode said
};

}  // namespace qcore::cpu::QC_ISA

#endif  // QCORE_CPU_OPTIMIZER_ENCODING_H
