// gemm_4bit: the kernels of one instruction set. gemm_4bit_product.h chooses among them.
#include "gemm_4bit_product.h"

namespace qcore::cpu::QC_ISA {

const Gemm4Kernels gemm_4bit_kernels = {packed_bytes<Gemm4>, scratch_bytes<Gemm4Weight>, pack<Gemm4>, multiply<Gemm4>};

}  // namespace qcore::cpu::QC_ISA
