// gemm_int4: the kernels of one instruction set. gemm_4bit_product.h chooses among them.
#include "gemm_4bit_product.h"

namespace qcore::cpu::QC_ISA {

const GemmInt4Kernels gemm_int4_kernels = {packed_bytes<GemmInt4>, scratch_bytes<Int4Weight>, pack<GemmInt4>,
                                           multiply<GemmInt4>};

}  // namespace qcore::cpu::QC_ISA
