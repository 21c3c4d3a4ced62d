// The state of a GPU that runs: grids, their blocks, and the blocks' warps.
#pragma once

#include <deque>
#include <unordered_map>

#include "program.h"
#include "settings.h"

namespace headroom::ptx {

struct Block;
struct Grid;

// Lanes of a warp that are at the same instruction.
struct Split {
    enum State : uint8_t { kRuns, kAtWarp, kAtBlock, kAtLaunch };
    uint32_t at;
    Lanes lanes;
    State state = kRuns;
    uint32_t ran = 0;  // instructions since it last gave way
};

struct AsyncCopy {
    uint32_t to;
    uint64_t from;
    uint32_t bytes;  // the rest of 16 becomes zeros
    bool arrived = false;
};

// A lane's cp.async groups: those issued since the last commit, and the committed ones, oldest first.
struct CopyGroups {
    std::vector<AsyncCopy> open;
    std::deque<std::vector<AsyncCopy>> committed;
};

struct Warp {
    Block* block;
    const Kernel* kernel;
    uint32_t id;
    Lanes live;
    uint32_t epoch = 1;       // goes up with every bar.warp.sync
    uint32_t since_poll = 0;  // instructions since it last polled in vain
    std::vector<uint8_t> registers;
    std::vector<Split> splits;
    CopyGroups copies[kWarp];
    std::map<std::pair<int, uint32_t>, uint32_t> phases_seen;  // by lane and mbarrier

    template <class T>
    T* at(uint32_t place) {
        return reinterpret_cast<T*>(registers.data() + place);
    }
    uint16_t thread(int lane) const { return static_cast<uint16_t>(id * kWarp + static_cast<uint32_t>(lane)); }
};

// Who touched two bytes of shared memory last. kMany: several threads, or warps.
struct Touched {
    static constexpr uint16_t kMany = 0xffff;
    uint16_t writer = kMany, reader = kMany, reader_warp = kMany;
    bool by_bulk_copy = false, by_atomic = false;
    uint32_t written_in_block = 0, written_in_warp = 0;  // epochs
    uint32_t read_in_block = 0, read_in_warp = 0;
    uint32_t mbarrier = 0, phase = 0;  // that the bulk copy completes
};

struct Mbarrier {
    uint32_t expected = 0, pending = 0, phase = 0;
    int64_t bytes = 0;    // expected ones that have not come
    bool fenced = false;  // the asynchronous proxy has seen its init
};

struct BulkCopy {
    uint32_t to;
    uint64_t from;
    uint32_t bytes, mbarrier;
};

// A store that other blocks do not see yet.
struct LateStore {
    uint64_t at;
    std::vector<uint8_t> bytes;
    uint16_t thread;
    bool behind_barrier = false;  // a barrier has shown it to the whole block
};

struct Block {
    Grid* grid;
    uint32_t index[3];
    uint32_t threads = 0, live_warps = 0;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<uint8_t> shared;
    std::vector<Touched> touched;        // of each two bytes
    uint32_t epoch = 1, at_barrier = 0;  // epoch: goes up with every barrier
    std::map<uint32_t, Mbarrier> mbarriers;
    std::vector<BulkCopy> bulk_copies;
    bool let_next_begin = false;
    std::unordered_map<uint64_t, std::vector<uint8_t>> stale_lines;  // L1, under weak memory
    std::deque<LateStore> late_stores;
};

struct Grid {
    const Kernel* kernel;
    uint32_t size[3], block_size[3], shared_bytes;
    bool cooperative = false, dependent = false;
    std::vector<uint8_t> parameters;
    std::vector<uint32_t> order;  // of its blocks
    std::vector<std::unique_ptr<Block>> resident;
    uint32_t blocks = 0, begun = 0, finished = 0;
    uint32_t let_next_begin = 0;  // blocks that did, or have ended
    const Grid* before = nullptr;
    uint64_t number = 0;  // of the launch
    bool done = false;
};

// What one executed memory instruction touched: the lanes that took part and each one's address.
struct Access {
    Space space;  // kGlobal or kShared
    bool is_write;
    Lanes lanes;
    uint32_t bytes;             // of each lane
    const uint64_t* addresses;  // [32]; shared ones count from the start of the block's memory
};
// Who counts what profilers count. Null: nobody listens.
struct Observer {
    virtual ~Observer() = default;
    virtual void executes(Warp&, const Instruction&, Lanes) = 0;          // each instruction, before it does anything
    virtual void accesses(Warp&, const Instruction&, const Access&) = 0;  // then what it touches
};
extern Observer* observer;

[[noreturn]] void fault(const Warp& warp, const Instruction& i, int lane, const std::string& what);
// "gemm_kernel ptx:812 (gemm.cu:81) block 0,0,0 warp 1: ldmatrix ..."
std::string where(const Warp& warp, const Instruction& i);

// Runs `queue` in order, but a dependent grid may begin once all blocks of the one before let it. Raises Fault.
void run(std::vector<std::unique_ptr<Grid>>& queue);
// Something happened that whoever polls may have waited for.
void note_progress();

// `run` of each lane among `lanes`; a full warp is a loop that the compiler can vectorise.
template <class F>
inline void for_lanes(Lanes lanes, F run) {
    if (lanes == ~0u) {
        for (int lane = 0; lane < kWarp; ++lane) run(lane);
    } else {
        for (; lanes != 0; lanes &= lanes - 1) run(__builtin_ctz(lanes));
    }
}

}  // namespace headroom::ptx
