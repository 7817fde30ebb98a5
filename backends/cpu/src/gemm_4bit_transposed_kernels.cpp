// gemm_4bit_transposed: the kernels of one instruction set. transposed_product.h chooses among them.
#include "gemm_4bit_pairs.h"
#include "transposed_product.h"

namespace qcore::cpu::QC_ISA {

const Gemm4TransposedKernels gemm_4bit_transposed_kernels = transposed_kernels<Gemm4Weight>();

}  // namespace qcore::cpu::QC_ISA
