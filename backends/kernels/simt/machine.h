// A GPU in software: runs the blocks of a launch, each GPU thread as a fiber, and finds what a real one would hide.
//
// One operating-system thread runs one block at a time. The threads of a block are run until each waits: for its wave
// (shuffle, vote, matrix unit) or for its block (barrier). Nothing else is synchronised, so what a thread may rely on
// between two of those points is what the schedule happens to give, and there are three schedules:
//
//   QCORE_SIMT_SCHEDULE=forward        lane 0 first, wave 0 first, block 0 first (the default)
//   QCORE_SIMT_SCHEDULE=reversed       the last first
//   QCORE_SIMT_SCHEDULE=random:SEED    lanes, waves and blocks in an order that the seed decides
//
// A launch is an error, with a text that says which thread and where, if
//   - lanes of one wave wait at different operations, or some of them have left the kernel or wait for the block;
//   - some threads of a block wait at a barrier that others never reach, or wait at another barrier;
//   - a thread reads or writes several words at once at an address that is no multiple of their size;
//   - a block has no threads, too many, or no whole number of waves; a grid is empty or too large;
//   - a kernel asks for more shared memory than every GPU has, or a thread runs out of its stack.
// Shared memory starts as poison, and each kernel has exactly what it asked for.
#ifndef QCORE_SIMT_MACHINE_H
#define QCORE_SIMT_MACHINE_H

#include <cstddef>
#include <cstdint>
#include <string>

namespace qcore::simt {

struct Shape {
    int64_t blocks_x;
    int64_t blocks_y;
    int threads;  // of a block
    int wave;     // lanes of a wave: 32 or 64
};

inline constexpr size_t kSlotBytes = 64;          // what a lane can show its wave at once
inline constexpr size_t kSharedBytes = 48 << 10;  // of a block, without asking for more, on every target
inline constexpr int kMaxThreads = 1024;          // of a block
inline constexpr int64_t kMaxBlocksX = (1LL << 31) - 1;
inline constexpr int64_t kMaxBlocksY = 65535;

// Runs `body(context)` once for every thread of the grid on at most `workers` operating-system threads (0: as many as
// there are). Returns "" or what went wrong; then some threads never ran to their end.
std::string run(const Shape &shape, void (*body)(const void *), const void *context, int workers);

// What the running thread may ask. `site` is the line of the operation, for the checks above.
int thread_index();
int64_t block_index_x();
int64_t block_index_y();
int64_t block_count_x();
int64_t block_count_y();
void *shared_memory(size_t bytes);
void wait_for_block(int site);
// Ends the launch with an error if an access of `bytes` at `address` is one that a GPU faults on.
void check_access(const void *address, size_t bytes);

// Shows `bytes` (at most kSlotBytes) to the wave and waits for all of its lanes. Returns what lane 0 showed; lane i's
// is i * kSlotBytes further. Valid until the second exchange after this one.
const char *exchange(const void *value, size_t bytes, int site);

}  // namespace qcore::simt

#endif  // QCORE_SIMT_MACHINE_H
