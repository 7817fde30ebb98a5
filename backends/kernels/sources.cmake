# What a library of these kernels is made of, whatever its target: included by backends/cuda and by simt.
# Needs KERNELS, this folder.
set(QCORE_KERNEL_SOURCES
    ${KERNELS}/absmax.cu
    ${KERNELS}/blockwise.cu
    ${KERNELS}/fourbit.cu
    ${KERNELS}/gemm_4bit.cu
    ${KERNELS}/gemm_4bit_transposed.cu
    ${KERNELS}/gemm_int4.cu
    ${KERNELS}/int8_gemm.cu
    ${KERNELS}/int8_linear.cu
    ${KERNELS}/int8_quantize.cu
    ${KERNELS}/int8_scale.cu
    ${KERNELS}/int8_transposed.cu
    ${KERNELS}/optimizer.cu)
set(QCORE_HOST_SOURCES
    ${KERNELS}/host/api.cpp
    ${KERNELS}/host/arguments.cpp
    ${KERNELS}/host/optimizer_job.cpp
    ${KERNELS}/host/paged_memory.cpp)

# The ABI header: the repository's own, or the copy that an sdist carries.
find_path(QCORE_INCLUDE qcore_backend.h
    PATHS ${KERNELS}/../../qcore/include ${CMAKE_CURRENT_SOURCE_DIR}/include
    NO_DEFAULT_PATH REQUIRED)
# What all native libraries share; an sdist has it beside its copy of this folder, as the repository does.
set(QCORE_COMMON ${KERNELS}/../common)
