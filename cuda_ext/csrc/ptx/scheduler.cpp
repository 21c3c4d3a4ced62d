// Who goes on, and when: lanes within warps, warps within blocks, blocks within grids, grids behind each other.
#include <algorithm>
#include <cstdio>

#include "async_copies.h"
#include "global_memory.h"
#include "parser.h"

namespace headroom::ptx {

Observer* observer = nullptr;

namespace {

constexpr uint32_t kMostInTurn = 100'000;  // instructions of a warp before another one's
constexpr uint32_t kPatience = 20'000;     // instructions of a split that may be spinning while others could go on
constexpr uint32_t kPollingLoop = 64;      // instructions at most: a warp that runs more between polls works
constexpr uint64_t kVainPolls = 200'000;   // before it is a livelock
constexpr size_t kMostText = 1500;

uint64_t executed, vain_polls;  // of this call; the latter since something moved
bool moved;                     // in this round of all warps
bool may_lag;                   // nothing is known to stand still

std::string hex(Lanes lanes) {
    char text[16];
    std::snprintf(text, sizeof(text), "%08x", lanes);
    return text;
}

uint32_t product(const uint32_t (&size)[3]) {
    return size[0] * size[1] * size[2];
}

// ---- lanes ----

// Splits at one place go on together; those that wait for the warp are joined when they go on.
void merge(Warp& w) {
    std::vector<Split>& splits = w.splits;
    for (size_t first = 0; first < splits.size(); ++first) {
        for (size_t other = first + 1; other < splits.size();) {
            const bool same = splits[first].at == splits[other].at && splits[first].state == splits[other].state;
            if (!same || splits[first].state == Split::kAtWarp) {
                ++other;
                continue;
            }
            splits[first].lanes |= splits[other].lanes;
            splits.erase(splits.begin() + static_cast<long>(other));
        }
    }
}

void drop_empty(Warp& w) {
    std::erase_if(w.splits, [](const Split& split) { return split.lanes == 0; });
}

bool launch_before_is_done(const Block& block) {
    return block.grid->before == nullptr || block.grid->before->done;
}

// The split that goes on now; -1 where all wait.
int choose(Warp& w) {
    int chosen = -1;
    for (size_t n = 0; n < w.splits.size(); ++n) {
        Split& split = w.splits[n];
        if (split.state == Split::kAtLaunch && launch_before_is_done(*w.block)) {
            split.state = Split::kRuns;
            ++split.at;
            acquire(w);
        }
        if (split.state != Split::kRuns) continue;
        const bool first = chosen < 0 || (settings.any_order ? chance() % 2 != 0
                                                             : split.at < w.splits[static_cast<size_t>(chosen)].at);
        if (first) chosen = static_cast<int>(n);
    }
    if (chosen < 0 || settings.any_order || w.splits[static_cast<size_t>(chosen)].ran <= kPatience) return chosen;
    w.splits[static_cast<size_t>(chosen)].ran = 0;  // it may wait for a lane that is behind it
    for (size_t n = 0; n < w.splits.size(); ++n) {
        if (w.splits[n].state == Split::kRuns && chance() % 2 != 0) chosen = static_cast<int>(n);
    }
    return chosen;
}

void open_block_barrier(Block& block) {
    if (block.live_warps == 0 || block.at_barrier < block.live_warps) return;
    if (block.live_warps * kWarp < block.threads) {
        note("a block barrier went on without warps that have ended: " + block.grid->kernel->title());
    }
    for (auto& warp : block.warps) {
        for (Split& split : warp->splits) {
            if (split.state != Split::kAtBlock) continue;
            split.state = Split::kRuns;
            ++split.at;
        }
    }
    block.at_barrier = 0;
    ++block.epoch;
    moved = true;
    for (LateStore& store : block.late_stores) store.behind_barrier = true;
}

enum class Next { kSame, kChooseAgain, kGiveWay };

Next branch(Warp& w, size_t which, const Instruction& i, Lanes taken) {
    Split& split = w.splits[which];
    if (taken == split.lanes) {
        split.at = static_cast<uint32_t>(i.target);
        return Next::kSame;
    }
    ++split.at;
    if (taken == 0) return Next::kSame;
    split.lanes &= ~taken;
    w.splits.push_back({static_cast<uint32_t>(i.target), taken, Split::kRuns, split.ran});
    return Next::kChooseAgain;
}

Next exit_lanes(Warp& w, size_t which, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        if (drop_copies(w, lane)) note("a thread ends with cp.async not waited for: " + w.kernel->title());
    });
    w.live &= ~lanes;
    w.splits[which].lanes = 0;
    drop_empty(w);
    for (Split& split : w.splits) {
        if (split.state == Split::kAtWarp) split.state = Split::kRuns;  // looks again who is still to come
    }
    if (w.live != 0) return Next::kChooseAgain;
    --w.block->live_warps;
    open_block_barrier(*w.block);
    return Next::kGiveWay;
}

// Who must come to a warp's operation before it goes on.
Lanes wanted_lanes(Warp& w, const Instruction& i, Lanes here) {
    if (i.role != Role::kWarp) return w.live;
    const uint32_t* const named = w.at<uint32_t>(i.lanes_named);
    const Lanes mask = named[__builtin_ctz(here)];
    for_lanes(here, [&](int lane) {
        if (named[lane] != mask) fault(w, i, lane, "divergence: lanes that name different masks");
        if ((mask >> lane & 1) == 0) fault(w, i, lane, "divergence: a lane that its own mask does not name");
    });
    const uint32_t left = w.block->threads - w.id * kWarp;
    const Lanes begun = left >= kWarp ? ~0u : (1u << left) - 1;
    if ((mask & ~w.live & begun) != 0) note("a warp operation names lanes that have ended: " + where(w, i));
    return mask & w.live;
}

// All who are here wait until those that are wanted have come; then they go on as one.
Next meet(Warp& w, size_t which, const Instruction& i, Lanes arriving) {
    const Lanes wanted = wanted_lanes(w, i, arriving);
    const uint32_t at = w.splits[which].at;
    w.splits[which].state = Split::kAtWarp;
    Lanes here = 0;
    for (const Split& split : w.splits) {
        if (split.state == Split::kAtWarp && split.at == at) here |= split.lanes;
    }
    if ((here & wanted) != wanted) return Next::kChooseAgain;
    for (Split& split : w.splits) {
        if (split.state == Split::kAtWarp && split.at == at) split.lanes = 0;
    }
    Split& split = w.splits[which];
    split.lanes = here, split.state = Split::kRuns;
    if (i.role == Role::kBlockBarrier) {
        split.state = Split::kAtBlock;
        drop_empty(w);
        ++w.block->at_barrier;
        open_block_barrier(*w.block);
        return Next::kChooseAgain;
    }
    if (i.role == Role::kWholeWarp && here != ~0u) {
        fault(w, i, __builtin_ctz(here), "divergence: an operation of the whole warp without all of its lanes");
    }
    i.execute(w, i, here);
    ++split.at;
    if (w.splits.size() == 1) return Next::kSame;
    drop_empty(w);
    return Next::kChooseAgain;
}

Next step(Warp& w, size_t which) {
    Split& split = w.splits[which];
    const Instruction& i = w.kernel->code[split.at];
    Lanes lanes = split.lanes;
    if (i.guard != kNone) {
        const Lanes guard = *w.at<Lanes>(i.guard);
        lanes &= i.guard_negated ? ~guard : guard;
    }
    if (lanes != 0) ++i.executions;
    if (observer != nullptr && lanes != 0) observer->executes(w, i, lanes);
    ++split.ran;
    if (i.role == Role::kPlain) {
        if (lanes != 0) i.execute(w, i, lanes);
        ++split.at;
        return Next::kSame;
    }
    if (i.role == Role::kBranch) return branch(w, which, i, lanes);
    if (lanes == 0) {
        ++split.at;
        return Next::kSame;
    }
    if (lanes != split.lanes) {  // those whose guard fails go past
        const Split past{split.at + 1, split.lanes & ~lanes, Split::kRuns, split.ran};
        split.lanes = lanes;
        w.splits.push_back(past);
    }
    switch (i.role) {
        case Role::kExit:
            return exit_lanes(w, which, lanes);
        case Role::kPolls: {
            i.execute(w, i, lanes);
            ++w.splits[which].at;
            const bool in_vain = i.acquire || (~*w.at<Lanes>(i.to) & lanes) != 0;
            if (!in_vain) return Next::kSame;
            ++vain_polls;
            return Next::kGiveWay;
        }
        case Role::kLaunchWait:
            if (!launch_before_is_done(*w.block)) {
                w.splits[which].state = Split::kAtLaunch;
                return Next::kChooseAgain;
            }
            acquire(w);
            ++w.splits[which].at;
            return Next::kSame;
        default:
            return meet(w, which, i, lanes);
    }
}

struct Turn {
    uint32_t ran = 0;
    bool polled = false;  // and gave way
};

Turn run_warp(Warp& w, uint32_t most) {
    Turn turn;
    while (turn.ran < most && w.live != 0) {
        if (w.splits.size() > 1) merge(w);
        const int chosen = choose(w);
        if (chosen < 0) break;
        const auto which = static_cast<size_t>(chosen);
        const bool alone = w.splits.size() == 1;
        uint32_t until = kNone, left = most - turn.ran;  // until: where the next split waits to be joined
        if (!alone && settings.any_order) left = 1 + static_cast<uint32_t>(chance() % 40);
        if (!alone && !settings.any_order) {
            for (size_t n = 0; n < w.splits.size(); ++n) {
                if (n != which && w.splits[n].state == Split::kRuns) until = std::min(until, w.splits[n].at);
            }
        }
        Next next = Next::kSame;
        for (; left > 0 && next == Next::kSame && w.splits[which].at < until; --left) {
            next = step(w, which);
            ++turn.ran;
        }
        if (next == Next::kGiveWay) {
            turn.polled = w.live != 0;
            break;
        }
    }
    executed += turn.ran;
    return turn;
}

// ---- blocks ----

uint32_t special_value(const std::string& name, const Grid& g, const Block& b, uint32_t thread) {
    const int axis = name.back() - 'x';
    const uint32_t index[3] = {thread % g.block_size[0], thread / g.block_size[0] % g.block_size[1],
                               thread / g.block_size[0] / g.block_size[1]};
    if (name == "%laneid") return thread % kWarp;
    if (name.compare(0, 5, "%tid.") == 0) return index[axis];
    if (name.compare(0, 6, "%ntid.") == 0) return g.block_size[axis];
    if (name.compare(0, 7, "%ctaid.") == 0) return b.index[axis];
    return g.size[axis];
}

std::unique_ptr<Warp> make_warp(Block& block, uint32_t id) {
    const Kernel& kernel = *block.grid->kernel;
    auto warp = std::make_unique<Warp>();
    warp->block = &block, warp->kernel = &kernel, warp->id = id;
    const uint32_t left = block.threads - id * kWarp;
    warp->live = left >= kWarp ? ~0u : (1u << left) - 1;
    warp->registers.assign(kernel.register_bytes, 0xff);  // NaN, and no small index: what nobody wrote shows
    for (const Constant& constant : kernel.constants) {
        if (constant.wide) {
            std::fill_n(warp->at<uint64_t>(constant.at), kWarp, constant.value);
        } else {
            std::fill_n(warp->at<uint32_t>(constant.at), kWarp, static_cast<uint32_t>(constant.value));
        }
    }
    for (const auto& [name, at] : kernel.special) {
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
            warp->at<uint32_t>(at)[lane] = special_value(name, *block.grid, block, id * kWarp + lane);
        }
    }
    warp->splits.push_back({0, warp->live});
    return warp;
}

void begin_block(Grid& g) {
    auto block = std::make_unique<Block>();
    const uint32_t n = g.order[g.begun++];
    block->grid = &g;
    block->index[0] = n % g.size[0];
    block->index[1] = n / g.size[0] % g.size[1];
    block->index[2] = n / g.size[0] / g.size[1];
    block->threads = product(g.block_size);
    block->shared.assign(g.shared_bytes, 0xff);
    if (settings.races) block->touched.resize(g.shared_bytes / 2 + 1);
    block->live_warps = (block->threads + kWarp - 1) / kWarp;
    for (uint32_t id = 0; id < block->live_warps; ++id) block->warps.push_back(make_warp(*block, id));
    g.resident.push_back(std::move(block));
    moved = true;
}

// Returns whether any of its warps might go on: it ran, or it lags behind.
bool run_block(Block& block) {
    static constexpr uint32_t kTempers[] = {kMostInTurn, 7, 200, 3000};
    bool can_go_on = false, all_wait = true;
    for (auto& warp : block.warps) {
        if (warp->live == 0) continue;
        if (settings.seed != 0 && may_lag && chance() % 4 == 0) {
            all_wait = false, can_go_on = true;
            continue;
        }
        const uint32_t temper = kTempers[settings.seed % 4];
        const Turn turn =
            run_warp(*warp, settings.seed == 0 ? kMostInTurn : 1 + static_cast<uint32_t>(chance() % temper));
        can_go_on = can_go_on || turn.ran != 0;
        all_wait = all_wait && (turn.polled || turn.ran == 0);
        warp->since_poll = turn.polled ? 0 : warp->since_poll + turn.ran;
        if (warp->since_poll > kPollingLoop) moved = true;
    }
    const bool may_arrive = all_wait || settings.copies != Copies::kAtTheWait;
    if (!block.bulk_copies.empty() && block.live_warps > 0 && may_arrive) {
        complete_bulk_copy(block, chance() % block.bulk_copies.size());
    }
    return can_go_on;
}

void end_block(Grid& g, Block& block) {
    if (!block.bulk_copies.empty()) {
        throw Fault("a block ends with " + std::to_string(block.bulk_copies.size()) +
                    " bulk copies on their way: " + g.kernel->title());
    }
    release_all(block);
    if (!block.let_next_begin) ++g.let_next_begin;
    ++g.finished;
    moved = true;
}

// ---- grids ----

uint32_t most_resident(const Grid& g) {
    if (g.cooperative) return g.blocks;
    return settings.seed % 2 != 0 ? 1 + static_cast<uint32_t>(chance() % 5) : 2;
}

bool run_grid(Grid& g) {
    while (g.begun < g.blocks && g.resident.size() < most_resident(g)) begin_block(g);
    bool can_go_on = false;
    for (size_t n = 0; n < g.resident.size();) {
        can_go_on = run_block(*g.resident[n]) || can_go_on;
        if (g.resident[n]->live_warps == 0) {
            end_block(g, *g.resident[n]);
            g.resident.erase(g.resident.begin() + static_cast<long>(n));
        } else {
            ++n;
        }
    }
    g.done = g.finished == g.blocks;
    return can_go_on;
}

std::string state_of(const Grid& g) {
    static const char* const kStates[] = {"run", "wait for their warp", "wait at the block's barrier",
                                          "wait for the launch before"};
    std::string text;
    for (const auto& block : g.resident) {
        for (const auto& warp : block->warps) {
            for (const Split& split : warp->splits) {
                if (text.size() > kMostText) return text + "\n  ...";
                text += "\n  lanes " + hex(split.lanes) + " " + kStates[split.state] + ": " +
                        where(*warp, g.kernel->code[split.at]);
            }
        }
    }
    return text;
}

void prepare(Grid& g) {
    g.order.resize(g.blocks);
    for (uint32_t n = 0; n < g.blocks; ++n) g.order[n] = n;
    if (settings.seed != 0) std::shuffle(g.order.begin(), g.order.end(), chance);
}

}  // namespace

std::string where(const Warp& w, const Instruction& i) {
    const uint32_t* const b = w.block->index;
    return w.kernel->title() + ", PTX line " + std::to_string(i.line) + " (" + w.kernel->place(i) + "), block " +
           std::to_string(b[0]) + "," + std::to_string(b[1]) + "," + std::to_string(b[2]) + " warp " +
           std::to_string(w.id) + ": " + i.text;
}

void fault(const Warp& w, const Instruction& i, int lane, const std::string& what) {
    throw Fault(what + " -- lane " + std::to_string(lane) + ", " + where(w, i));
}

void note_progress() {
    moved = true;
}

void run(std::vector<std::unique_ptr<Grid>>& queue) {
    executed = vain_polls = 0;
    may_lag = true;
    for (auto& g : queue) prepare(*g);
    for (size_t first = 0; first < queue.size();) {
        moved = false;
        bool can_go_on = false;
        size_t last = first;  // grids up to here may run now
        while (last + 1 < queue.size() && queue[last + 1]->dependent &&
               queue[last]->let_next_begin == queue[last]->blocks) {
            ++last;
        }
        for (size_t n = first; n <= last; ++n) {
            if (!queue[n]->done) can_go_on = run_grid(*queue[n]) || can_go_on;
        }
        const auto stop = [&](std::string why) {
            for (size_t n = first; n <= last; ++n) why += state_of(*queue[n]);
            throw Fault(why);
        };
        may_lag = moved;
        if (moved) vain_polls = 0;
        if (!moved && !can_go_on) stop("deadlock");
        if (vain_polls > kVainPolls) stop("livelock: nothing moves");
        if (executed > settings.budget) stop("the budget of instructions is used up");
        if (first == last && queue[first]->done) forget_read_only();
        while (first < queue.size() && queue[first]->done) ++first;
    }
    queue.clear();
}

}  // namespace headroom::ptx
