#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "fiber.h"

namespace qcore::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 96 << 10;
#else
constexpr size_t kStackBytes = 16 << 10;
#endif
// Stacks start at different cache sets: at a power of two apart, every thread's frame would compete for the same ones.
constexpr size_t kStackStride = kStackBytes + 576;
constexpr uint64_t kStackEnd = 0x51acc5e27c0ffee5;  // below every stack; gone if a thread ran past it
constexpr int kPoison = 0xFB;                       // of shared memory: a large negative float, -1 and a bit as int

enum class State : uint8_t { ready, in_wave, in_block, misaligned, done };

enum class Order { forward, reversed, random };

struct Schedule {
    Order order = Order::forward;
    uint64_t seed = 0;
};

Schedule schedule_from_environment() {
    const char *text = std::getenv("QCORE_SIMT_SCHEDULE");
    if (text == nullptr || std::strcmp(text, "forward") == 0) {
        return {};
    }
    if (std::strcmp(text, "reversed") == 0) {
        return {Order::reversed, 0};
    }
    if (std::strncmp(text, "random:", 7) == 0) {
        return {Order::random, std::strtoull(text + 7, nullptr, 10)};
    }
    throw std::string("QCORE_SIMT_SCHEDULE: expected forward, reversed or random:SEED, got ") + text;
}

// A permutation of a few numbers that differs at each draw (splitmix64).
class Shuffler {
   public:
    explicit Shuffler(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9E3779B97F4A7C15;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    void shuffle(int *values, int count) {
        for (int i = count - 1; i > 0; --i) {
            std::swap(values[i], values[next() % static_cast<uint64_t>(i + 1)]);
        }
    }

   private:
    uint64_t state_;
};

struct Thread {
    Fiber fiber;
    int site = 0;
    uint32_t exchanges = 0;
    State state = State::ready;
};

// Stacks of one operating-system thread's fibers; pages are only backed where a kernel has touched them.
class Stacks {
   public:
    Stacks() {
        void *memory =
            mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            throw std::bad_alloc();
        }
        base_ = static_cast<char *>(memory);
    }
    ~Stacks() { munmap(base_, kBytes); }
    Stacks(const Stacks &) = delete;
    Stacks &operator=(const Stacks &) = delete;
    char *of(int thread) const { return base_ + kRoom + static_cast<size_t>(thread) * kStackStride; }

   private:
    static constexpr size_t kRoom = 64 << 10;  // below the first: a thread past its end is found, not a fault
    static constexpr size_t kBytes = kRoom + kStackStride * kMaxThreads;
    char *base_;
};

class Worker {
   public:
    Worker() : slots_(2 * kMaxThreads * kSlotBytes), threads_(kMaxThreads) {
        for (int i = 0; i < kMaxThreads; ++i) {
            std::memcpy(stacks_.of(i), &kStackEnd, sizeof kStackEnd);
        }
    }

    // Runs one block; false with error() if it went wrong.
    bool run_block(const Shape &shape, void (*body)(const void *), const void *context, int64_t block,
                   const Schedule &schedule);
    const std::string &error() const { return error_; }

    const Shape *shape = nullptr;
    int64_t block_x = 0;
    int64_t block_y = 0;
    int current = 0;
    void (*body)(const void *) = nullptr;
    const void *context = nullptr;

    void suspend(State state, int site) {
        Thread &thread = threads_[static_cast<size_t>(current)];
        thread.state = state;
        thread.site = site;
        Fiber::switch_between(thread.fiber, scheduler_);
    }

    const char *exchange(const void *value, size_t bytes, int site) {
        Thread &thread = threads_[static_cast<size_t>(current)];
        char *slots = slots_.data() + (thread.exchanges++ & 1) * kMaxThreads * kSlotBytes;
        std::memcpy(slots + static_cast<size_t>(current) * kSlotBytes, value, bytes);
        const int first = current / shape->wave * shape->wave;
        suspend(State::in_wave, site);
        return slots + static_cast<size_t>(first) * kSlotBytes;
    }

    void *shared_memory(size_t bytes) {
        if (!shared_claimed_) {
            if (shared_bytes_ != bytes) {
                shared_.reset(new char[bytes]);
                shared_bytes_ = bytes;
            }
            std::memset(shared_.get(), kPoison, bytes);
            shared_claimed_ = true;
        }
        return shared_.get();
    }

   private:
    bool step(int wave, int first, int last);
    bool fail(int thread, const std::string &what);

    Stacks stacks_;
    Fiber scheduler_;
    std::vector<char> slots_;
    std::vector<Thread> threads_;
    std::unique_ptr<char[]> shared_;
    size_t shared_bytes_ = 0;
    bool shared_claimed_ = false;  // by a thread of the running block
    Shuffler shuffler_{0};
    Order order_ = Order::forward;
    int lanes_[64] = {};
    std::string error_;
};

thread_local Worker *worker = nullptr;

// Workers between launches: their stacks are worth keeping.
class Pool {
   public:
    std::unique_ptr<Worker> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) {
            return std::make_unique<Worker>();
        }
        std::unique_ptr<Worker> last = std::move(idle_.back());
        idle_.pop_back();
        return last;
    }
    void put(std::unique_ptr<Worker> idle) {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(idle));
    }

   private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Worker>> idle_;
};

void thread_main() {
    for (;;) {
        worker->body(worker->context);
        worker->suspend(State::done, 0);
    }
}

bool Worker::fail(int thread, const std::string &what) {
    error_ = "simt: block (" + std::to_string(block_x) + ", " + std::to_string(block_y) + "), thread " +
             std::to_string(thread) + ": " + what;
    return false;
}

// Runs every lane of a wave that can run, once. If they all meet at one operation of the wave, lets them go on.
bool Worker::step(int wave, int first, int last) {
    const int count = last - first;
    for (int i = 0; i < count; ++i) {
        lanes_[i] = order_ == Order::reversed ? count - 1 - i : i;
    }
    if (order_ == Order::random) {
        shuffler_.shuffle(lanes_, count);
    }
    for (int i = 0; i < count; ++i) {
        current = first + lanes_[i];
        Thread &thread = threads_[static_cast<size_t>(current)];
        if (thread.state == State::ready) {
            Fiber::switch_between(scheduler_, thread.fiber);
        }
        if (thread.state == State::misaligned) {
            const std::string bytes = std::to_string(thread.site);
            return fail(current, "an access of " + bytes + " bytes at an address that is no multiple of " + bytes);
        }
    }
    int waiting = 0;
    for (int i = first; i < last; ++i) {
        waiting += threads_[static_cast<size_t>(i)].state == State::in_wave;
    }
    if (waiting == 0) {
        return true;
    }
    const Thread *meeting = nullptr;
    for (int i = first; i < last; ++i) {
        Thread &thread = threads_[static_cast<size_t>(i)];
        if (thread.state != State::in_wave) {
            return fail(i, std::string(thread.state == State::done ? "has left the kernel" : "waits at a barrier") +
                               " while other lanes of wave " + std::to_string(wave) + " exchange values");
        }
        if (meeting != nullptr && (meeting->site != thread.site || meeting->exchanges != thread.exchanges)) {
            return fail(i, "exchanges values at line " + std::to_string(thread.site) + ", other lanes of wave " +
                               std::to_string(wave) + " at line " + std::to_string(meeting->site));
        }
        meeting = &thread;
    }
    for (int i = first; i < last; ++i) {
        threads_[static_cast<size_t>(i)].state = State::ready;
    }
    return true;
}

bool Worker::run_block(const Shape &launch, void (*kernel)(const void *), const void *arguments, int64_t block,
                       const Schedule &schedule) {
    shape = &launch;
    body = kernel;
    context = arguments;
    block_x = block % launch.blocks_x;
    block_y = block / launch.blocks_x;
    order_ = schedule.order;
    shuffler_ = Shuffler(schedule.seed ^ static_cast<uint64_t>(block) * 0xD1342543DE82EF95);
    shared_claimed_ = false;
    for (int i = 0; i < launch.threads; ++i) {
        Thread &thread = threads_[static_cast<size_t>(i)];
        thread.fiber.prepare(stacks_.of(i), kStackBytes, thread_main);
        thread.exchanges = 0;
        thread.state = State::ready;
    }
    const int waves = launch.threads / launch.wave;
    std::vector<int> running(static_cast<size_t>(waves));
    for (;;) {
        for (int i = 0; i < waves; ++i) {
            running[static_cast<size_t>(i)] = order_ == Order::reversed ? i : waves - 1 - i;
        }
        // The wave at the end of the list runs until it waits for the block, unless the schedule picks another.
        while (!running.empty()) {
            if (order_ == Order::random) {
                std::swap(running.back(), running[shuffler_.next() % running.size()]);
            }
            const int wave = running.back(), first = wave * launch.wave, last = first + launch.wave;
            if (!step(wave, first, last)) {
                return false;
            }
            const bool can_run = std::any_of(threads_.begin() + first, threads_.begin() + last,
                                             [](const Thread &thread) { return thread.state == State::ready; });
            if (!can_run) {
                running.pop_back();
            }
        }
        int done = 0;
        for (int i = 0; i < launch.threads; ++i) {
            done += threads_[static_cast<size_t>(i)].state == State::done;
            uint64_t end = 0;
            std::memcpy(&end, stacks_.of(i), sizeof end);
            if (end != kStackEnd) {
                return fail(i, "ran out of its stack of " + std::to_string(kStackBytes) + " bytes");
            }
        }
        if (done == launch.threads) {
            return true;
        }
        for (int i = 0; i < launch.threads; ++i) {
            Thread &thread = threads_[static_cast<size_t>(i)];
            if (thread.state == State::done) {
                return fail(i, "has left the kernel while others of its block wait at a barrier");
            }
            if (thread.site != threads_[0].site) {
                return fail(i, "waits at the barrier of line " + std::to_string(thread.site) +
                                   ", thread 0 at that of " + std::to_string(threads_[0].site));
            }
            thread.state = State::ready;
        }
        running.resize(static_cast<size_t>(waves));
    }
}

std::string check(const Shape &shape) {
    if (shape.threads < 1 || shape.threads > kMaxThreads || shape.threads % shape.wave != 0) {
        return "simt: a block of " + std::to_string(shape.threads) + " threads: expected a multiple of " +
               std::to_string(shape.wave) + " up to " + std::to_string(kMaxThreads);
    }
    if (shape.blocks_x < 1 || shape.blocks_x > kMaxBlocksX || shape.blocks_y < 1 || shape.blocks_y > kMaxBlocksY) {
        return "simt: a grid of " + std::to_string(shape.blocks_x) + " x " + std::to_string(shape.blocks_y) + " blocks";
    }
    return "";
}

int64_t nth_block(const Schedule &schedule, int64_t i, int64_t blocks) {
    switch (schedule.order) {
        case Order::reversed:
            return blocks - 1 - i;
        case Order::random:
            return (i + static_cast<int64_t>(schedule.seed % static_cast<uint64_t>(blocks))) % blocks;
        default:
            return i;
    }
}

}  // namespace

std::string run(const Shape &shape, void (*body)(const void *), const void *context, int workers) {
    std::string error = check(shape);
    if (!error.empty()) {
        return error;
    }
    Schedule schedule;
    try {
        schedule = schedule_from_environment();
    } catch (const std::string &text) {
        return text;
    }
    const int64_t blocks = shape.blocks_x * shape.blocks_y;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    static Pool pool;
    const auto work = [&] {
        std::unique_ptr<Worker> own = pool.take();
        worker = own.get();
        bool sound = true;
        for (int64_t i; sound && (i = next.fetch_add(1)) < blocks;) {
            sound = own->run_block(shape, body, context, nth_block(schedule, i, blocks), schedule);
            if (!sound) {
                const std::lock_guard<std::mutex> lock(mutex);
                error = own->error();
                next = blocks;
            }
        }
        worker = nullptr;
        if (sound) {  // else its threads may have written anywhere on their stacks
            pool.put(std::move(own));
        }
    };
    // Starting a thread costs what some ten thousand GPU threads cost.
    constexpr int64_t kThreadsWorthAWorker = 1 << 15;
    const int available = workers > 0 ? workers : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
    const int64_t wanted = std::min<int64_t>({available, blocks, blocks * shape.threads / kThreadsWorthAWorker});
    std::vector<std::thread> others;
    for (int64_t i = 1; i < wanted; ++i) {
        others.emplace_back(work);
    }
    work();
    for (std::thread &other : others) {
        other.join();
    }
    return error;
}

int thread_index() { return worker->current; }
int64_t block_index_x() { return worker->block_x; }
int64_t block_index_y() { return worker->block_y; }
int64_t block_count_x() { return worker->shape->blocks_x; }
int64_t block_count_y() { return worker->shape->blocks_y; }
void *shared_memory(size_t bytes) { return worker->shared_memory(bytes); }
void check_access(const void *address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        worker->suspend(State::misaligned, static_cast<int>(bytes));
    }
}
void wait_for_block(int site) { worker->suspend(State::in_block, site); }
const char *exchange(const void *value, size_t bytes, int site) { return worker->exchange(value, bytes, site); }

}  // namespace qcore::simt
