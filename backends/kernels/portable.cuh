// The language that the kernels are written in: one source for every GPU, and for the emulation that tests it.
//
//   QC_DEVICE f()                 a function of kernels
//   QC_CONSTANT T table[]         a constant array that kernels may index
//   QC_KERNEL(threads) k()        a kernel, run by blocks of at most `threads` threads
//   QC_KERNEL_RESIDENT(threads, blocks) k()
//                                 the same, of which a multiprocessor of NVIDIA's has to hold `blocks`: the compiler
//                                 may use all registers that so many leave, instead of spilling for more of them
//   QC_SHARED(Struct, name)       the block's shared memory: one plain struct a kernel, at most 48 KiB
//   thread_index()                of the block; waves are `W` neighbours (32 or 64)
//   block_index_x(), block_count_x(), ..._y()
//   block_barrier()               every thread of the block comes here
//   wave_xor<W>(value, mask)      the value of lane `lane ^ mask`; every lane of the wave comes here
//   atomic_max(address, value)
//   load16, load16_once, load8_once, load4_once, store16, store8, store4
//                                 one operation of device memory at an aligned address; "once" is not worth a place
//                                 in a cache
//   copy16_async(to, from, there) 16 bytes (zeros if not there) to shared memory, from the next wait on
//   close_copies(), wait_for_copies<N>()
//                                 copies since the last close form a group; waits until all but N groups have landed,
//                                 of this thread: a barrier follows
//   magnitude, round_to_even, multiply_add, bits_to_float, float_to_bits
//   square_root(float), square_root(double)   IEEE's: rounded to nearest
//   QC_PARAMETER(T) name          a large struct as a kernel's only parameter (host/parameters.h)
//   only_parameter(name)          the same, of which a kernel may index the arrays
//
// Everything else is C++. Contraction is off: a product and a sum are fused only by multiply_add, where
// a clause leaves that open (QC-NUM-001). A
// division is IEEE's. `kWave` is the wave size that the host launches for. No lane mask: an operation of a wave is one
// of all its lanes, which holds on every vendor's hardware and lets the emulation find a lane that is missing.
//
// Launch with Queue::launch (host/queue.h). A kernel never assumes how many blocks run at once.
#ifndef QCORE_KERNELS_PORTABLE_CUH
#define QCORE_KERNELS_PORTABLE_CUH

#include <cstdint>

#if defined(QC_TARGET_SIMT)
#include "simt/device.h"
#elif defined(__CUDACC__)
#include "device_cuda.cuh"
#elif defined(__HIP__)
#include "device_hip.cuh"
#else
#error "portable.cuh: define QC_TARGET_SIMT, or compile with nvcc or as HIP"
#endif

#endif  // QCORE_KERNELS_PORTABLE_CUH
