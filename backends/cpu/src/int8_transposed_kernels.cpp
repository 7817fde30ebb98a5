// int8_linear_transposed: the kernels of one instruction set. transposed_product.h chooses among them.
#include "int8_pairs.h"
#include "transposed_product.h"

namespace qcore::cpu::QC_ISA {

const Int8TransposedKernels int8_transposed_kernels = transposed_kernels<Int8Weight>();

}  // namespace qcore::cpu::QC_ISA
