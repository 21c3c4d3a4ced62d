// Grids, blocks, warps and threads as fibers, and the scheduler that chooses who goes on.
//
// One fiber runs at a time, until a scheduling point. The next is drawn from the ready lanes of the same
// warp, or, when there are none or the draw says so, from another warp. Without any ready fiber the launch
// is over, a bulk copy has to arrive, or the kernel has deadlocked.
#include "runtime.h"

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace headroom::host {
namespace {

constexpr int kRedzone = 256;  // bytes on both sides of shared memory, checked at the block's end
constexpr unsigned char kRedzoneByte = 0xA5, kPoison = 0xFF;
constexpr Device kLargeGpu = {.multiprocessors = 132, .shared_bytes = 227 * 1024};
constexpr uint64_t kPatience = 1 << 24;  // scheduling points without any meeting: somebody spins in vain

// ---- chance ----

uint64_t random_state = 0;

uint32_t draw() {  // splitmix64 (Steele et al. 2014)
    uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}
size_t draw_below(size_t count) {
    return static_cast<size_t>((uint64_t{draw()} * count) >> 32);
}
bool chance(unsigned in_1024) {
    return (draw() & 1023) < in_1024;
}

// The temper of a seed, in 1024ths: extremes find other faults than even odds do.
struct Temper {
    unsigned copy_at_once;  // an asynchronous copy arrives as it is issued
    unsigned copy_later;    // ... or at one of the next scheduling points; else when it is waited for
    unsigned leave_warp;    // another warp goes on though this one could; never 0, as this one may spin for it
};
Temper temper;

void set_temper(uint64_t seed) {
    constexpr unsigned kAtOnce[] = {512, 0, 1024}, kLater[] = {128, 0, 0}, kLeave[] = {16, 256, 1};
    temper = {kAtOnce[seed % 3], kLater[seed % 3], kLeave[seed / 3 % 3]};
}

// ---- who is who ----

struct Block;
struct Warp;

struct Copy {
    void* shared;
    const void* global;  // nullptr: zeros
    unsigned bytes;
    unsigned group;     // of a cp_async16
    uint64_t* barrier;  // of a bulk copy
};

struct Thread {
    Context context;
    uint3 index;
    Warp* warp;
    Block* block;
    int lane;
    const char* waits_in;  // nullptr: ready, running or done
    const uint64_t* barrier;
    std::vector<Copy> copies;
    unsigned group;
};
constexpr size_t kNowhere = ~size_t{0};

struct Warp {
    int lanes;
    Thread* threads;
    int done = 0;
    uint32_t ready = 0;
    size_t place = kNowhere;  // in Grid::ready
    const char* operation = "";
    int arrived = 0;
    unsigned generation = 0;
    Exchange exchange[2];  // by turns: a lane may bring its next value while another still reads
};

struct Block {
    uint3 index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Copy> bulk;
    size_t arrived = 0, done = 0;
    unsigned char* memory = nullptr;  // redzone, shared memory, redzone
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;

    ~Block() { std::free(memory); }
};

struct Grid {
    const Launch& how;
    const std::function<void()>& body;
    std::vector<std::unique_ptr<Block>> blocks;  // those alive
    std::vector<Warp*> ready;
    size_t threads = 0, arrived = 0, done = 0;
    uint64_t idle = 0;
};

// ---- devices ----

constexpr size_t kMostDevices = 8;
std::vector<Device> devices = {kLargeGpu};
int current_number = 0;
char streams[kMostDevices];  // their addresses alone are used

// ---- the launch that runs ----

std::mutex one_launch;
std::vector<Context> stacks;  // kept from launch to launch
Grid* grid = nullptr;
Thread* current = nullptr;
Context host_context;
std::string error;

std::string name(const Block& block) {
    char text[64];
    std::snprintf(text, sizeof(text), "block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
    return text;
}

// ---- scheduling ----

void make_ready(Thread& thread) {
    Warp& warp = *thread.warp;
    thread.waits_in = nullptr;
    warp.ready |= 1u << thread.lane;
    if (warp.place == kNowhere) {
        warp.place = grid->ready.size();
        grid->ready.push_back(&warp);
    }
}

Thread* take_ready(Warp& warp) {
    const int turn = static_cast<int>(draw() & 31);
    const int lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) & 31;
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) {
        Warp* last = grid->ready.back();
        grid->ready[warp.place] = last;
        last->place = warp.place;
        grid->ready.pop_back();
        warp.place = kNowhere;
    }
    return &warp.threads[lane];
}

// ---- what arrives by itself ----

// A barrier of bulk copies (PTX ISA, "mbarrier"), in the 64 bits that the kernel gives it.
struct Mbarrier {
    uint64_t mark : 8, phase : 1, arrivals : 13, pending : 13, bytes : 29;
};
constexpr unsigned kMark = 0x5A;
constexpr uint64_t kNoBytes = 1 << 28;  // bytes on their way, as they may be fewer than none for a while

Mbarrier load_barrier(const char* operation, const uint64_t* p) {
    const Mbarrier barrier = std::bit_cast<Mbarrier>(*p);
    if (barrier.mark != kMark) fail("%s: the barrier was not initialised", operation);
    return barrier;
}

void store_barrier(Block& block, uint64_t* p, Mbarrier barrier) {
    const bool complete = barrier.pending == 0 && barrier.bytes == kNoBytes;
    if (complete) {
        barrier.phase ^= 1;
        barrier.pending = barrier.arrivals;
    }
    *p = std::bit_cast<uint64_t>(barrier);
    if (!complete) return;
    for (Thread& thread : block.threads) {
        if (thread.waits_in != nullptr && thread.barrier == p) make_ready(thread);
    }
}

void arrive(const Copy& copy) {
    if (copy.global == nullptr) {
        std::memset(copy.shared, 0, copy.bytes);
    } else {
        std::memcpy(copy.shared, copy.global, copy.bytes);
    }
}

void arrive_bulk(Block& block, size_t which) {
    const Copy copy = block.bulk[which];
    block.bulk.erase(block.bulk.begin() + static_cast<ptrdiff_t>(which));
    arrive(copy);
    Mbarrier barrier = load_barrier("bulk_copy", copy.barrier);
    barrier.bytes -= copy.bytes;
    store_barrier(block, copy.barrier, barrier);
}

bool arrive_any_bulk() {
    std::vector<Block*> waiting;
    for (auto& block : grid->blocks) {
        if (!block->bulk.empty()) waiting.push_back(block.get());
    }
    if (waiting.empty()) return false;
    Block& block = *waiting[draw_below(waiting.size())];
    arrive_bulk(block, draw_below(block.bulk.size()));
    return true;
}

// Groups arrive in order, the copies of one group in any.
void arrive_oldest(Thread& thread) {
    std::vector<Copy>& copies = thread.copies;
    size_t same = 1;
    while (same < copies.size() && copies[same].group == copies[0].group) ++same;
    const size_t which = draw_below(same);
    arrive(copies[which]);
    copies.erase(copies.begin() + static_cast<ptrdiff_t>(which));
}

// ---- switching ----

std::string where_all_wait() {
    std::string text;
    for (const auto& block : grid->blocks) {
        std::map<std::string, std::pair<int, int>> waits;  // operation -> how many, the first of them
        int number = 0;
        for (const Thread& thread : block->threads) {
            if (thread.waits_in != nullptr) ++waits.try_emplace(thread.waits_in, 0, number).first->second.first;
            ++number;
        }
        text += (text.empty() ? "" : "; ") + name(*block) + ": ";
        for (const auto& [operation, who] : waits) {
            text += std::to_string(who.first) + " in " + operation + " (thread " + std::to_string(who.second) + "), ";
        }
        text += std::to_string(block->done) + " returned";
        if (text.size() > 400) break;
    }
    return text;
}

Thread* next() {
    do {
        if (!grid->ready.empty()) {
            Warp* here = current != nullptr ? current->warp : nullptr;
            if (here != nullptr && here->ready != 0 && !chance(temper.leave_warp)) return take_ready(*here);
            return take_ready(*grid->ready[draw_below(grid->ready.size())]);
        }
    } while (arrive_any_bulk());
    return nullptr;
}

// The running fiber goes to sleep (or, where `from` is the host, the first one wakes up).
void leave(Context& from) {
    Thread* to = next();
    if (to == nullptr && grid->done < grid->threads && error.empty()) {
        error = "deadlock: " + where_all_wait();
    }
    if (to != nullptr && &to->context == &from) return;
    current = to;
    if (to != nullptr) {
        threadIdx = to->index;
        blockIdx = to->block->index;
    }
    switch_to(from, to != nullptr ? to->context : host_context);
}

void reschedule() {
    Thread& thread = *current;
    Block& block = *thread.block;
    if (!thread.copies.empty() && chance(temper.copy_later)) arrive_oldest(thread);
    if (!block.bulk.empty() && chance(temper.copy_later)) arrive_bulk(block, draw_below(block.bulk.size()));
    leave(thread.context);
}

void end_block(Block& block) {
    if (!block.bulk.empty()) fail("the block ended with %zu bulk copies on their way", block.bulk.size());
#if !defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < kRedzone; ++i) {
        if (block.shared[-1 - i] != kRedzoneByte) fail("%d bytes before its shared memory were overwritten", i + 1);
        if (block.shared[block.shared_bytes + static_cast<size_t>(i)] != kRedzoneByte) {
            fail("the block wrote %d bytes past the end of its %zu bytes of shared memory", i, block.shared_bytes);
        }
    }
#endif
}

void thread_main() {
    arrived();
    grid->body();
    Thread& thread = *current;
    Block& block = *thread.block;
    for (const Copy& copy : thread.copies) arrive(copy);
    thread.copies.clear();
    ++thread.warp->done;
    ++block.done;
    ++grid->done;
    grid->idle = 0;
    if (block.arrived != 0) fail("returned while %zu threads of the block wait in sync_block", block.arrived);
    if (thread.warp->arrived != 0) {
        fail("returned while %d lanes of the warp wait in %s", thread.warp->arrived, thread.warp->operation);
    }
    if (block.done == block.threads.size()) end_block(block);
    leave(thread.context);
    __builtin_unreachable();
}

bool begin_block(uint3 index) {
    const dim3 shape = grid->how.block;
    const size_t threads = size_t{shape.x} * shape.y * shape.z;
    const size_t first = grid->threads;
    Block& block = *grid->blocks.emplace_back(std::make_unique<Block>());
    block.index = index;
    block.threads.resize(threads);
    block.warps.resize((threads + kLanes - 1) / kLanes);
    block.shared_bytes = grid->how.shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
    const size_t redzone = 0;  // AddressSanitizer's own stand at the exact ends
#else
    const size_t redzone = kRedzone;
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, block.shared_bytes + 2 * redzone + (redzone == 0)) != 0) return false;
    block.memory = static_cast<unsigned char*>(memory);
    block.shared = block.memory + redzone;
    std::memset(block.memory, kRedzoneByte, block.shared_bytes + 2 * redzone);
    std::memset(block.shared, kPoison, block.shared_bytes);

    if (stacks.size() < first + threads) stacks.resize(first + threads);
    for (size_t i = 0; i < threads; ++i) {
        const unsigned n = static_cast<unsigned>(i);
        Warp& warp = block.warps[i / kLanes];
        Thread& thread = block.threads[i];
        if (!prepare(stacks[first + i], thread_main)) return false;
        thread = {.context = stacks[first + i],
                  .index = {n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y},
                  .warp = &warp,
                  .block = &block,
                  .lane = static_cast<int>(i % kLanes),
                  .waits_in = nullptr,
                  .barrier = nullptr,
                  .copies = {},
                  .group = 0};
        if (thread.lane == 0) {
            warp.threads = &thread;
            warp.lanes = static_cast<int>(std::min(threads - i, size_t{kLanes}));
        }
    }
    grid->threads += threads;
    for (Thread& thread : block.threads) make_ready(thread);
    return true;
}

// Blocks of a cooperative launch are all alive at once; others by ones, twos or fours, in any order.
void run_blocks() {
    const dim3 shape = grid->how.grid;
    std::vector<uint3> order;
    for (unsigned z = 0; z < shape.z; ++z) {
        for (unsigned y = 0; y < shape.y; ++y) {
            for (unsigned x = 0; x < shape.x; ++x) order.push_back({x, y, z});
        }
    }
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw_below(i)]);
    const size_t together = grid->how.cooperative ? order.size() : size_t{1} << draw_below(3);
    for (size_t i = 0; i < order.size() && error.empty(); ++i) {
        if (!begin_block(order[i])) {
            error = "no memory for the stacks of so many threads";
            return;
        }
        if (grid->blocks.size() < together && i + 1 < order.size()) continue;
        leave(host_context);
        current = nullptr;
        grid->blocks.clear();
        grid->threads = grid->done = 0;
    }
}

void check_shared(const char* operation, const void* p, size_t bytes) {
    check_aligned(operation, p);
    const Block& block = *current->block;
    const auto* begin = static_cast<const unsigned char*>(p);
    if (begin < block.shared || begin + bytes > block.shared + block.shared_bytes) {
        fail("%s: %zu bytes at offset %td are not within the %zu bytes of shared memory", operation, bytes,
             begin - block.shared, block.shared_bytes);
    }
}

template <bool trans>
void gather(Exchange& lanes) {
    uint16_t matrix[4][8][8];
    for (int i = 0; i < kLanes; ++i) {
        const void* row;
        std::memcpy(&row, lanes.lane[i], sizeof(row));
        check_shared(current->warp->operation, row, 16);
        std::memcpy(matrix[i / 8][i % 8], row, 16);
    }
    for (int i = 0; i < kLanes; ++i) {  // PTX ISA, "ldmatrix": lane i holds row i / 4, columns i % 4 * 2 and + 1
        const int row = i / 4, column = i % 4 * 2;
        for (int m = 0; m < 4; ++m) {
            const uint16_t pair[2] = {trans ? matrix[m][column][row] : matrix[m][row][column],
                                      trans ? matrix[m][column + 1][row] : matrix[m][row][column + 1]};
            std::memcpy(lanes.lane[i] + 4 * m, pair, 4);
        }
    }
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    const uint3 who = current->index;
    if (error.empty()) {
        error = name(*current->block) + ", thread (" + std::to_string(who.x) + ", " + std::to_string(who.y) + ", " +
                std::to_string(who.z) + "): " + text;
    }
    switch_to(current->context, host_context);  // all fibers are abandoned where they stand
    __builtin_unreachable();
}

const Device& device() {
    return devices[static_cast<size_t>(current_number)];
}

unsigned char* shared_memory() {
    return current->block->shared;
}
int lane() {
    return current->lane;
}

void schedule() {
    if (++grid->idle > kPatience) fail("livelock: %ju steps since the last barrier", uintmax_t{kPatience});
    make_ready(*current);
    reschedule();
}

void meet_block() {
    Block& block = *current->block;
    if (block.done != 0) fail("waits in sync_block, but %zu threads of the block have returned", block.done);
    current->waits_in = "sync_block";
    if (++block.arrived == block.threads.size()) {
        block.arrived = grid->idle = 0;
        for (Thread& thread : block.threads) make_ready(thread);
    }
    reschedule();
}

void meet_grid(unsigned* counter, unsigned round) {
    const dim3 shape = grid->how.grid;
    if (!grid->how.cooperative) fail("grid_barrier in a launch that is not cooperative");
    if (shape.y != 1 || shape.z != 1) fail("grid_barrier wants a grid of one dimension");
    if (*counter != (round - 1) * shape.x) {
        fail("grid_barrier: the counter is %u as round %u of %u blocks begins", *counter, round, shape.x);
    }
    if (grid->done != 0) fail("waits in grid_barrier, but %zu threads of the grid have returned", grid->done);
    current->waits_in = "grid_barrier";
    if (++grid->arrived == grid->threads) {
        grid->arrived = grid->idle = 0;
        *counter += shape.x;
        for (auto& block : grid->blocks) {
            for (Thread& thread : block->threads) make_ready(thread);
        }
    }
    reschedule();
}

Exchange& meet_warp(const char* operation, const void* brought, size_t bytes, void (*all_here)(Exchange&)) {
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    if (warp.lanes != kLanes) fail("%s in a warp of %d threads", operation, warp.lanes);
    if (warp.done != 0) fail("waits in %s, but %d lanes of the warp have returned", operation, warp.done);
    if (warp.arrived != 0 && std::strcmp(warp.operation, operation) != 0) {
        fail("divergence: %s, while other lanes of the warp wait in %s", operation, warp.operation);
    }
    Exchange& exchange = warp.exchange[warp.generation % 2];
    if (bytes != 0) std::memcpy(exchange.lane[thread.lane], brought, bytes);
    warp.operation = operation;
    thread.waits_in = operation;
    if (++warp.arrived == kLanes) {
        if (all_here != nullptr) all_here(exchange);
        warp.arrived = 0;
        grid->idle = 0;
        ++warp.generation;
        for (int i = 0; i < kLanes; ++i) make_ready(warp.threads[i]);
    }
    reschedule();
    return exchange;
}

void multiply(Exchange& lanes) {
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16];
    Row b[16], d[16];
    const auto unpack = [](const unsigned char* from, float& low, float& high) {
        half both[2];
        std::memcpy(both, from, 4);
        low = to_float(both[0]);
        high = to_float(both[1]);
    };
    for (int i = 0; i < kLanes; ++i) {  // PTX ISA, "matrix fragments for mma.m16n8k16 with .f16"
        const unsigned char* brought = lanes.lane[i];
        const int row = i / 4, column = i % 4 * 2;
        float low, high;
        for (int part = 0; part < 4; ++part) {
            float* to = &a[row + part % 2 * 8][column + part / 2 * 8];
            unpack(brought + 4 * part, to[0], to[1]);
        }
        for (int part = 0; part < 2; ++part) {
            unpack(brought + 16 + 4 * part, low, high);
            b[column + 8 * part][row] = low;
            b[column + 8 * part + 1][row] = high;
        }
        float sums[4];
        std::memcpy(sums, brought + 24, 16);
        for (int part = 0; part < 4; ++part) d[row + part / 2 * 8][column + part % 2] = sums[part];
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
    }
    for (int i = 0; i < kLanes; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const float sums[4] = {d[row][column], d[row][column + 1], d[row + 8][column], d[row + 8][column + 1]};
        std::memcpy(lanes.lane[i], sums, 16);
    }
}

void gather_matrices(Exchange& lanes) {
    gather<false>(lanes);
}
void gather_matrices_trans(Exchange& lanes) {
    gather<true>(lanes);
}

void copy_async(void* shared, const void* global, bool valid) {
    check_shared("cp_async16", shared, 16);
    if (valid) check_aligned("cp_async16", global);
    const Copy copy = {shared, valid ? global : nullptr, 16, current->group, nullptr};
    // Copies issued before may still be on their way: this one may overtake those of its own group only.
    const std::vector<Copy>& before = current->copies;
    const bool first = before.empty() || before.front().group == copy.group;
    if (first && chance(temper.copy_at_once)) {
        arrive(copy);
    } else {
        current->copies.push_back(copy);
    }
}

void commit_copies() {
    ++current->group;
}

void wait_copies(int groups_left) {
    Thread& thread = *current;
    while (!thread.copies.empty() && thread.copies.front().group + static_cast<unsigned>(groups_left) < thread.group) {
        arrive_oldest(thread);
    }
    schedule();
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
    Block& block = *current->block;
    if (bytes == 0 || bytes % 16 != 0) fail("bulk_copy of %u bytes, which is no multiple of 16", bytes);
    check_shared("bulk_copy", shared, bytes);
    check_aligned("bulk_copy", global);
    load_barrier("bulk_copy", barrier);
    block.bulk.push_back({shared, global, bytes, 0, barrier});
    if (chance(temper.copy_at_once)) arrive_bulk(block, block.bulk.size() - 1);
    schedule();
}

void barrier_init(uint64_t* p, int arrivals) {
    check_aligned("mbarrier_init", p, 8);
    Mbarrier barrier{};
    barrier.mark = kMark;
    barrier.arrivals = barrier.pending = static_cast<unsigned>(arrivals) & 0x1fff;
    barrier.bytes = kNoBytes;
    *p = std::bit_cast<uint64_t>(barrier);
}

void barrier_arrive(uint64_t* p, unsigned bytes) {
    Mbarrier barrier = load_barrier("mbarrier_expect_and_arrive", p);
    if (barrier.pending == 0) fail("mbarrier_expect_and_arrive: all its arrivals have come already in this phase");
    barrier.pending -= 1;
    barrier.bytes += bytes;
    store_barrier(*current->block, p, barrier);
    schedule();
}

void barrier_wait(uint64_t* p, unsigned parity) {
    schedule();
    while (load_barrier("mbarrier_wait", p).phase == (parity & 1)) {
        current->waits_in = "mbarrier_wait";
        current->barrier = p;
        reschedule();
    }
    current->barrier = nullptr;
}

int run(const Launch& how, const std::function<void()>& thread) {
    const std::lock_guard lock(one_launch);
    if (!error.empty()) return kHostFault;
    const size_t threads = size_t{how.block.x} * how.block.y * how.block.z;
    const size_t blocks = size_t{how.grid.x} * how.grid.y * how.grid.z;
    if (threads == 0 || threads > 1024 || how.block.z > 64 || blocks == 0 || how.grid.y > 65535 || how.grid.z > 65535 ||
        how.shared_bytes > device().shared_bytes) {
        error = "launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
                std::to_string(how.shared_bytes) + " bytes of shared memory: no GPU takes that";
        return kHostBadConfiguration;
    }
    if (how.stream != nullptr && how.stream != hr_host_stream(current_number)) {
        error = "a launch on another device's stream while device " + std::to_string(current_number) + " is current";
        return kHostBadHandle;
    }
    Grid here{.how = how, .body = thread, .blocks = {}, .ready = {}};
    grid = &here;
    blockDim = how.block;
    gridDim = how.grid;
    run_blocks();
    grid = nullptr;
    current = nullptr;
    return error.empty() ? 0 : kHostFault;
}

}  // namespace headroom::host

int headroom::set_device(int device) {
    using namespace headroom::host;
    if (device < 0 || static_cast<size_t>(device) >= devices.size()) {
        error = "there is no device " + std::to_string(device);
        return kHostBadDevice;
    }
    current_number = device;
    return 0;
}

void hr_host_devices(int count, const int* multiprocessors, const int* shared_bytes) {
    using namespace headroom::host;
    devices.clear();
    for (int i = 0; i < count && devices.size() < kMostDevices; ++i) {
        devices.push_back({.multiprocessors = multiprocessors[i], .shared_bytes = static_cast<size_t>(shared_bytes[i])});
    }
    if (devices.empty()) devices.push_back(kLargeGpu);
    current_number = 0;
}

int hr_host_device() {
    return headroom::host::current_number;
}

void* hr_host_stream(int device) {
    return &headroom::host::streams[device];
}

void hr_host_seed(uint64_t seed) {
    using namespace headroom::host;
    const std::lock_guard lock(one_launch);
    random_state = seed;
    set_temper(seed);
    error.clear();
}

const char* hr_host_error() {
    return headroom::host::error.c_str();
}
