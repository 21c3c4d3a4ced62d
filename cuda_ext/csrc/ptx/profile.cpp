// Counts what a profiler would, for each launch: instructions by kind, sectors, bank conflicts, bytes, and the longest
// chain of waits.
//
// The chain is that of an idle multiprocessor and a compiler that orders as well as it may within a basic block: there
// an instruction issues when its operands are ready, and the next basic block begins when all of this one have issued.
// So a load behind a branch waits for what was used before the branch, whether or not it needs it. Barriers join the
// warps of a block, acquire and release those of a grid. ptxas may do worse (it sinks loads to save registers), and
// warps that share a scheduler do not slow each other here: both are for a GPU to tell.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <fstream>

#include "api.h"
#include "costs.h"
#include "machine.h"

namespace headroom::ptx {

namespace {

constexpr uint32_t kSector = 32, kBank = 4, kBanks = 32;
constexpr uint32_t kBarrierCycles = 20;
constexpr size_t kMostPredicated = 10;  // instructions
constexpr size_t kMostSpin = 8;         // instructions of a loop that does nothing but poll

// ---- one instruction's addresses ----

// Distinct sectors of all lanes, and as many as would do if the bytes lay side by side.
struct Sectors {
    uint32_t asked = 0, needed = 0;
    std::vector<uint64_t> numbers;
};

Sectors sectors_of(const Access& access) {
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for_lanes(access.lanes,
              [&](int lane) { ranges.emplace_back(access.addresses[lane], access.addresses[lane] + access.bytes); });
    std::sort(ranges.begin(), ranges.end());
    Sectors found;
    uint64_t bytes = 0, covered = 0;
    for (const auto& [begin, end] : ranges) {
        bytes += end > covered ? end - std::max(begin, covered) : 0;
        covered = std::max(covered, end);
        for (uint64_t sector = begin / kSector; sector <= (end - 1) / kSector; ++sector) {
            if (found.numbers.empty() || found.numbers.back() < sector) found.numbers.push_back(sector);
        }
    }
    found.asked = static_cast<uint32_t>(found.numbers.size());
    found.needed = static_cast<uint32_t>((bytes + kSector - 1) / kSector);
    return found;
}

// Shared memory serves a warp at once up to 4 bytes a lane, half of it at 8, a quarter at 16; and of each bank one
// word.
struct Wavefronts {
    uint32_t needed = 0, taken = 0;
};

Wavefronts wavefronts_of(const Access& access) {
    Wavefronts found;
    const int together = access.bytes <= 4 ? kWarp : access.bytes == 8 ? kWarp / 2 : kWarp / 4;
    for (int first = 0; first < kWarp; first += together) {
        std::array<std::vector<uint64_t>, kBanks> words;
        bool any = false;
        for (int lane = first; lane < first + together; ++lane) {
            if ((access.lanes >> lane & 1) == 0) continue;
            any = true;
            for (uint64_t at = access.addresses[lane] / kBank;
                 at <= (access.addresses[lane] + access.bytes - 1) / kBank; ++at) {
                std::vector<uint64_t>& of_bank = words[at % kBanks];
                if (std::find(of_bank.begin(), of_bank.end(), at) == of_bank.end()) of_bank.push_back(at);
            }
        }
        if (!any) continue;
        size_t most = 0;
        for (const auto& of_bank : words) most = std::max(most, of_bank.size());
        found.needed += 1, found.taken += static_cast<uint32_t>(most);
    }
    return found;
}

// ---- sectors that were touched ----

class SectorSet {
  public:
    // Whether it is new.
    bool add(uint64_t sector) {
        uint64_t& word = words_[sector / 64];
        const uint64_t bit = uint64_t{1} << sector % 64;
        const bool fresh = (word & bit) == 0;
        word |= bit;
        count_ += fresh;
        return fresh;
    }
    void clear() { words_.clear(), count_ = 0; }
    uint64_t bytes() const { return count_ * kSector; }

  private:
    std::unordered_map<uint64_t, uint64_t> words_;
    uint64_t count_ = 0;
};

// ---- the chain of waits ----

enum class Memory { kDram, kL2, kL1 };
struct Latencies {
    uint32_t of[3];
};

struct Path {
    uint32_t cycles = 0;
    uint16_t waits[3] = {};  // by Memory: loads, one behind the other
    uint16_t barriers = 0;

    Path behind(const Latencies& latencies, Memory memory) const {
        Path next = *this;
        next.cycles += latencies.of[static_cast<size_t>(memory)];
        ++next.waits[static_cast<size_t>(memory)];
        return next;
    }
    Path after(uint32_t more) const {
        Path next = *this;
        next.cycles += more;
        return next;
    }
    Path since(const Path& begin) const {
        Path rest = *this;
        rest.cycles -= begin.cycles, rest.barriers -= begin.barriers;
        for (size_t n = 0; n < 3; ++n) rest.waits[n] -= std::min(begin.waits[n], rest.waits[n]);
        return rest;
    }
};

const Path& later(const Path& a, const Path& b) {
    return a.cycles < b.cycles ? b : a;
}

// An instruction's registers, by number in its kernel.
struct Operands {
    Cost cost;
    std::vector<uint32_t> read, written;
    bool begins_block = false;  // a basic block
};

// ptxas turns a branch over few instructions into predicates of these: no basic block ends.
bool becomes_predicates(const Instruction& branch, size_t at) {
    const auto target = static_cast<size_t>(branch.target);
    return branch.target >= 0 && target > at && target - at <= kMostPredicated;
}

std::vector<Operands> operands_of(const Kernel& kernel, uint32_t& registers) {
    std::unordered_map<uint32_t, uint32_t> numbers;
    std::vector<Operands> all;
    for (const Instruction& i : kernel.code) {
        Operands o{cost_of(i), {}, {}, false};
        const auto add = [&](std::vector<uint32_t>& to, uint32_t place) {
            if (place != kNone)
                to.push_back(numbers.try_emplace(place, static_cast<uint32_t>(numbers.size())).first->second);
        };
        for (const uint32_t place : {i.guard, i.a, i.b, i.c, i.lanes_named}) add(o.read, place);
        for (const uint32_t place : {i.to, i.to_predicate}) add(o.written, place);
        const bool is_mma = o.cost.kind == Kind::kTensor, loads = i.opcode.compare(0, 2, "ld") == 0;
        const bool stores = i.opcode.compare(0, 2, "st") == 0,
                   unpacks = i.opcode.compare(0, 3, "mov") == 0 && i.to == kNone;
        const int count = is_mma ? 4 + i.number / 4 + i.number / 8 : unpacks ? 2 : loads || stores ? i.elements : 0;
        for (int n = 0; n < count; ++n) {
            if (stores || is_mma) add(o.read, i.vector[n]);
            if (loads || unpacks || (is_mma && n < 4)) add(o.written, i.vector[n]);
        }
        all.push_back(std::move(o));
    }
    for (size_t n = 0; n < all.size(); ++n) {
        const Instruction& i = kernel.code[n];
        const bool branches = i.role == Role::kBranch && !becomes_predicates(i, n);
        if (branches) all[static_cast<size_t>(i.target)].begins_block = true;
        const bool orders = branches || i.role == Role::kBlockBarrier || all[n].cost.kind == Kind::kWait;
        if (orders && n + 1 < all.size()) all[n + 1].begins_block = true;
    }
    registers = static_cast<uint32_t>(numbers.size());
    return all;
}

// ---- what is kept of warps, blocks and launches while they run ----

struct WarpState {
    Path begun;                                   // when its basic block began
    Path last;                                    // when the last of its instructions has issued
    const Instruction* waited_longest = nullptr;  // what `last` waited for
    uint32_t slots = 0;                           // issued since the block began
    std::vector<Path> ready;                      // when registers can be read
    std::vector<const Instruction*> producer;
    std::deque<Path> groups;  // of cp.async: when they arrive
    Path open_group;
    const Instruction* barrier = nullptr;  // of the block, that it has come to
    uint32_t barrier_epoch = 0;
    Path wait;  // griddepcontrol.wait
    const Instruction* poll = nullptr;
    std::vector<const Instruction*> since_poll;  // counted; a poll again takes them back
    Path before_poll;
};

struct BlockState {
    uint32_t warps_left = 0;
    std::map<uint32_t, Path> barriers;   // by epoch: when the last warp came
    std::map<uint64_t, Path> mbarriers;  // when the bulk copy that completes it arrives
    SectorSet l1;
    Path end, end_after_wait;
};

struct Memories {
    uint64_t executions = 0, lanes = 0, asked = 0, needed = 0;
    bool shared = false, is_write = false;
};

struct Launch {
    const Kernel* kernel;
    uint32_t size[3], block_size[3], shared_bytes, blocks;
    bool cooperative, dependent;
    const std::vector<Operands>* operands;
    uint32_t registers;
    std::vector<uint64_t> executions, stalls;  // by instruction; stalls in cycles
    std::map<std::pair<const Instruction*, bool>, Memories>
        memories;  // by instruction, and whether it was shared memory
    SectorSet read, written, cold;
    uint64_t l2_sectors = 0;                         // that L1 does not have, each as often as it is asked for
    std::map<uint64_t, std::vector<Path>> arrivals;  // by address, of red.release
    Path end, end_after_wait;
    std::unordered_map<const Block*, BlockState> running;
};

class Profile : public Observer {
  public:
    explicit Profile(const Latencies& latencies) : latencies_(latencies) {}
    void executes(Warp& w, const Instruction& i, Lanes lanes) override;
    void accesses(Warp& w, const Instruction& i, const Access& access) override;
    void write(std::ostream& out) const;

  private:
    void enter(Warp& w);
    void take_back(const Instruction& i);
    void begin_block();
    void issue(const Instruction& i, const Operands& o);
    void wait_for(const Instruction& i, const Path& path);
    void synchronise(Warp& w, const Instruction& i);
    void end_warp(Warp& w);
    void touch_global(Warp& w, const Instruction& i, const Access& access, Memories& counts);
    Memory where(const Instruction& i, const Access& access, const std::vector<uint64_t>& sectors);
    size_t index(const Instruction& i) const { return static_cast<size_t>(&i - launch_->kernel->code.data()); }

    const Latencies latencies_;
    std::map<uint64_t, Launch> launches_;  // by number
    std::unordered_map<const Kernel*, std::pair<std::vector<Operands>, uint32_t>> operands_;
    std::unordered_map<const Warp*, WarpState> warps_;
    SectorSet touched_;  // by any launch
    // Of the instruction that executes now.
    const Warp* warp_ = nullptr;
    WarpState* state_ = nullptr;
    Launch* launch_ = nullptr;
    BlockState* block_ = nullptr;
    Path issued_;
};

void Profile::enter(Warp& w) {
    const Grid& grid = *w.block->grid;
    auto [found, fresh] = launches_.try_emplace(grid.number);
    launch_ = &found->second;
    if (fresh) {
        Launch& l = *launch_;
        auto [operands, unknown] = operands_.try_emplace(w.kernel);
        if (unknown) operands->second.first = operands_of(*w.kernel, operands->second.second);
        l.kernel = w.kernel, l.operands = &operands->second.first, l.registers = operands->second.second;
        std::copy_n(grid.size, 3, l.size), std::copy_n(grid.block_size, 3, l.block_size);
        l.shared_bytes = grid.shared_bytes, l.blocks = grid.blocks;
        l.cooperative = grid.cooperative, l.dependent = grid.dependent;
        l.executions.resize(w.kernel->code.size()), l.stalls.resize(w.kernel->code.size());
    }
    block_ = &launch_->running[w.block];
    if (block_->warps_left == 0) block_->warps_left = static_cast<uint32_t>(w.block->warps.size());
    state_ = &warps_[&w];
    if (state_->ready.empty()) {
        state_->ready.resize(launch_->registers);
        state_->producer.resize(launch_->registers);
    }
    warp_ = &w;
}

// A poll in vain, again: how often depends on the interpreter, so only the last one counts.
void Profile::take_back(const Instruction& i) {
    WarpState& s = *state_;
    if (s.poll == &i && s.since_poll.size() <= kMostSpin) {
        for (const Instruction* counted : s.since_poll) --launch_->executions[index(*counted)];
        s.last = s.before_poll;
    }
    s.poll = &i, s.since_poll.clear(), s.before_poll = s.last;
}

// The warp goes no further before `path`.
void Profile::wait_for(const Instruction& i, const Path& path) {
    if (path.cycles <= state_->last.cycles) return;
    launch_->stalls[index(i)] += path.cycles - state_->last.cycles;
    state_->last = path;
}

void Profile::begin_block() {
    WarpState& s = *state_;
    const uint32_t busy = s.begun.cycles + s.slots;
    if (s.waited_longest != nullptr && s.last.cycles > busy) {
        launch_->stalls[index(*s.waited_longest)] += s.last.cycles - busy;
    }
    if (s.last.cycles < busy) s.last.cycles = busy;
    s.begun = s.last, s.slots = 0, s.waited_longest = nullptr;
}

void Profile::executes(Warp& w, const Instruction& i, Lanes lanes) {
    if (&w != warp_) enter(w);
    const Operands& o = (*launch_->operands)[index(i)];
    if (o.begins_block) begin_block();
    if (state_->barrier != nullptr && w.block->epoch > state_->barrier_epoch) {
        Path come = block_->barriers[state_->barrier_epoch].after(kBarrierCycles);
        ++come.barriers;
        wait_for(*state_->barrier, come);
        state_->barrier = nullptr;
        state_->begun = state_->last;
    }
    if (i.role == Role::kPolls) take_back(i);
    ++launch_->executions[index(i)];
    if (state_->poll != nullptr && state_->since_poll.size() <= kMostSpin) state_->since_poll.push_back(&i);
    issue(i, o);
    synchronise(w, i);
    if (i.role == Role::kExit && (w.live & ~lanes) == 0) end_warp(w);
}

void Profile::issue(const Instruction& i, const Operands& o) {
    WarpState& s = *state_;
    const Instruction* waited = nullptr;  // for whose result
    issued_ = s.begun;
    for (const uint32_t r : o.read) {
        if (s.ready[r].cycles <= issued_.cycles) continue;
        issued_ = s.ready[r], waited = s.producer[r];
    }
    const bool folded = o.cost.kind == Kind::kFree;
    for (const uint32_t r : o.written) {
        s.ready[r] = issued_.after(o.cost.latency);
        s.producer[r] = folded ? waited : &i;
    }
    if (folded) return;
    s.slots += o.cost.slots;
    if (issued_.cycles + o.cost.slots > s.last.cycles) s.last = issued_.after(o.cost.slots), s.waited_longest = waited;
}

// What makes a warp wait for others, or for copies.
void Profile::synchronise(Warp& w, const Instruction& i) {
    WarpState& s = *state_;
    if (i.role == Role::kBlockBarrier) {
        Path& last = block_->barriers[w.block->epoch];
        last = later(last, s.last);
        s.barrier = &i, s.barrier_epoch = w.block->epoch;
        if (w.block->epoch > 1)
            block_->barriers.erase(block_->barriers.begin(), block_->barriers.lower_bound(w.block->epoch - 1));
    } else if (i.role == Role::kLaunchWait) {
        s.wait = s.last;
    } else if (i.opcode == "cp.async.commit_group") {
        s.groups.push_back(s.open_group);
        s.open_group = {};
    } else if (i.opcode == "cp.async.wait_group") {
        while (s.groups.size() > static_cast<size_t>(i.number)) {
            wait_for(i, s.groups.front());
            s.groups.pop_front();
        }
    } else if (i.opcode.compare(0, 6, "membar") == 0 || i.opcode == "fence.acq_rel.gpu" || i.opcode == "fence.sc.gpu") {
        wait_for(i, s.last.behind(latencies_, Memory::kL2));
    }
}

void Profile::end_warp(Warp& w) {
    const Path after_wait = state_->last.since(state_->wait);
    block_->end = later(block_->end, state_->last);
    block_->end_after_wait = later(block_->end_after_wait, after_wait);
    warps_.erase(&w);
    warp_ = nullptr;
    if (--block_->warps_left != 0) return;
    launch_->end = later(launch_->end, block_->end);
    launch_->end_after_wait = later(launch_->end_after_wait, block_->end_after_wait);
    launch_->running.erase(w.block);
}

// The farthest of what a load asks for. What nobody has touched since the profile began comes from DRAM.
Memory Profile::where(const Instruction& i, const Access& access, const std::vector<uint64_t>& sectors) {
    const bool cached = !i.past_l1 && !i.acquire && access.bytes <= 16 &&
                        i.opcode.find("no_allocate") == std::string::npos && i.opcode.compare(0, 2, "ld") == 0;
    Memory farthest = Memory::kL1;
    for (const uint64_t sector : sectors) {
        if (touched_.add(sector)) {
            launch_->cold.add(sector);
            farthest = Memory::kDram;
        }
        const bool near = cached && !block_->l1.add(sector);
        launch_->l2_sectors += !near;
        if (!near && farthest == Memory::kL1) farthest = Memory::kL2;
    }
    return farthest;
}

void Profile::touch_global(Warp& w, const Instruction& i, const Access& access, Memories& counts) {
    const Sectors sectors = sectors_of(access);
    counts.asked += sectors.asked, counts.needed += sectors.needed;
    WarpState& s = *state_;
    if (access.is_write) {
        for (const uint64_t sector : sectors.numbers) launch_->written.add(sector), touched_.add(sector);
        launch_->l2_sectors += sectors.asked;
        const uint64_t first = access.addresses[std::countr_zero(access.lanes)];
        if (i.release) {  // an arrival at a counter
            std::vector<Path>& arrivals = launch_->arrivals[first];
            const Path seen = issued_.behind(latencies_, Memory::kL2);
            arrivals.push_back(arrivals.empty() ? seen : later(arrivals.back(), seen));
        }
        const Path done = issued_.behind(latencies_, Memory::kL2);
        for (const uint32_t r : (*launch_->operands)[index(i)].written) s.ready[r] = done;  // of atomics
        return;
    }
    for (const uint64_t sector : sectors.numbers) launch_->read.add(sector);
    if (i.acquire) {  // all that have arrived by the last whole round
        const uint64_t at = access.addresses[std::countr_zero(access.lanes)];
        uint32_t arrived;
        std::memcpy(&arrived, reinterpret_cast<const void*>(at), sizeof(arrived));
        const std::vector<Path>& arrivals = launch_->arrivals[at];
        const size_t whole = arrived / launch_->blocks * launch_->blocks;
        if (whole != 0 && whole <= arrivals.size()) wait_for(i, arrivals[whole - 1].behind(latencies_, Memory::kL2));
        block_->l1.clear();
        return;
    }
    const Path there = issued_.behind(latencies_, where(i, access, sectors.numbers));
    if (i.opcode.compare(0, 13, "cp.async.bulk") == 0) {
        const uint32_t mbarrier = *w.at<uint32_t>(i.vector[0]);
        block_->mbarriers[mbarrier] = there;
    } else if (i.opcode.compare(0, 8, "cp.async") == 0) {
        s.open_group = later(s.open_group, there);
    } else {
        for (const uint32_t r : (*launch_->operands)[index(i)].written) s.ready[r] = there;
    }
}

void Profile::accesses(Warp& w, const Instruction& i, const Access& access) {
    const bool shared = access.space == Space::kShared;
    Memories& counts = launch_->memories[{&i, shared}];
    counts.shared = shared, counts.is_write = access.is_write;
    ++counts.executions, counts.lanes += static_cast<uint64_t>(std::popcount(access.lanes));
    if (!shared) return touch_global(w, i, access, counts);
    if (i.opcode.compare(0, 17, "mbarrier.try_wait") == 0) {
        const uint64_t at = access.addresses[std::countr_zero(access.lanes)] + kSharedBase;
        wait_for(i, block_->mbarriers[at]);
        return;
    }
    const Wavefronts wavefronts = wavefronts_of(access);
    counts.asked += wavefronts.taken, counts.needed += wavefronts.needed;
}

// ---- the report ----

void write_path(std::ostream& out, const char* name, const Path& p) {
    out << ", \"" << name << R"(": {"cycles": )" << p.cycles << R"(, "dram": )" << p.waits[0] << R"(, "l2": )"
        << p.waits[1] << R"(, "l1": )" << p.waits[2] << R"(, "barriers": )" << p.barriers << "}";
}

void write_numbers(std::ostream& out, const char* name, const uint32_t (&numbers)[3]) {
    out << ", \"" << name << "\": [" << numbers[0] << ", " << numbers[1] << ", " << numbers[2] << "]";
}

void write_launch(std::ostream& out, const Launch& l) {
    constexpr auto kKinds = static_cast<size_t>(Kind::kCount);
    uint64_t instructions[kKinds] = {}, slots[kKinds] = {};
    for (size_t n = 0; n < l.executions.size(); ++n) {
        const Cost& cost = (*l.operands)[n].cost;
        instructions[static_cast<size_t>(cost.kind)] += l.executions[n];
        slots[static_cast<size_t>(cost.kind)] += l.executions[n] * cost.slots;
    }
    out << R"({"kernel": ")" << l.kernel->name << R"(", "title": ")" << l.kernel->title() << '"';
    write_numbers(out, "grid", l.size), write_numbers(out, "block", l.block_size);
    out << R"(, "shared_bytes": )" << l.shared_bytes << R"(, "cooperative": )" << l.cooperative << R"(, "dependent": )"
        << l.dependent << R"(, "bytes_read": )" << l.read.bytes() << R"(, "bytes_written": )" << l.written.bytes()
        << R"(, "bytes_cold": )" << l.cold.bytes() << R"(, "l2_sectors": )" << l.l2_sectors;
    write_path(out, "path", l.end), write_path(out, "path_after_wait", l.end_after_wait);
    const char* comma = "";
    out << R"(, "kinds": {)";
    for (size_t kind = 0; kind < kKinds; ++kind, comma = ", ") {
        out << comma << '"' << kKindNames[kind] << "\": [" << instructions[kind] << ", " << slots[kind] << "]";
    }
    out << R"(}, "memory": [)", comma = "";
    for (const auto& [key, m] : l.memories) {
        out << comma << R"({"place": ")" << l.kernel->caller(*key.first) << R"(", "line": )" << key.first->line
            << R"(, "opcode": ")" << key.first->opcode << R"(", "shared": )" << m.shared << R"(, "write": )"
            << m.is_write << R"(, "executions": )" << m.executions << R"(, "lanes": )" << m.lanes << R"(, "asked": )"
            << m.asked << R"(, "needed": )" << m.needed << "}";
        comma = ", ";
    }
    out << R"(], "stalls": [)", comma = "";
    for (size_t n = 0; n < l.stalls.size(); ++n) {
        if (l.stalls[n] == 0) continue;
        const Instruction& i = l.kernel->code[n];
        out << comma << "[\"" << l.kernel->caller(i) << "\", \"" << i.opcode << "\", " << l.stalls[n] << "]";
        comma = ", ";
    }
    out << "]}\n";
}

void Profile::write(std::ostream& out) const {
    for (const auto& [number, launch] : launches_) write_launch(out, launch);
}

std::unique_ptr<Profile> profile;

}  // namespace

}  // namespace headroom::ptx

using namespace headroom::ptx;

void hr_ptx_profile_begin(uint32_t dram, uint32_t l2, uint32_t l1) {
    profile = std::make_unique<Profile>(Latencies{{dram, l2, l1}});
    observer = profile.get();
}

int hr_ptx_profile_end(const char* path) {
    observer = nullptr;
    if (profile == nullptr) return 1;
    std::ofstream out(path);
    profile->write(out);
    profile = nullptr;
    out.flush();
    return out ? 0 : 1;
}
