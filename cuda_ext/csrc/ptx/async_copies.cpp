#include "async_copies.h"

#include <cstdlib>
#include <cstring>

#include "addresses.h"
#include "global_memory.h"
#include "opcodes.h"
#include "shared_memory.h"

namespace headroom::ptx {

namespace {

constexpr uint32_t kCopyBytes = 16;                    // cp.async.cg has no other size
constexpr uint8_t kInFlight = 0xff;                    // NaN
constexpr uint64_t kMbarrier = 0xBA44'BA44'BA44'BA44;  // what an mbarrier's memory holds: it is opaque

bool arrives_now() {
    return settings.copies == Copies::kAtOnce || (settings.copies == Copies::kEither && chance() % 2 != 0);
}

void observe_global(Warp& w, const Instruction& i, Lanes lanes, uint32_t bytes, const uint64_t* from) {
    if (observer != nullptr && bytes != 0) observer->accesses(w, i, {Space::kGlobal, false, lanes, bytes, from});
}

// ---- cp.async ----

// Once; but it counts as the lane's write of the moment in which the lane knows of it.
void arrive(Warp& w, const Instruction& i, int lane, AsyncCopy& copy) {
    touch_by_copy(w, lane, copy.to, kCopyBytes);
    if (copy.arrived) return;
    uint8_t* const to = shared_at(w, copy.to);
    std::memset(to, 0, kCopyBytes);
    if (copy.bytes != 0) read_global(w, i, lane, copy.from, to, copy.bytes, true);
    copy.arrived = true;
}

void copy_async(Warp& w, const Instruction& i, Lanes lanes) {
    const Addresses to(w, i, lanes, kCopyBytes, true);
    const uint64_t* const from = w.at<uint64_t>(i.b);
    Lanes reading = 0;
    for_lanes(lanes, [&](int lane) {
        const uint32_t bytes = i.c == kNone ? kCopyBytes : w.at<uint32_t>(i.c)[lane];
        AsyncCopy copy{static_cast<uint32_t>(to[lane]), from[lane], bytes};
        if (bytes > kCopyBytes) fault(w, i, lane, "src-size is over cp-size");
        check_shared(w, i, lane, copy.to, kCopyBytes, kCopyBytes);
        touch_shared(w, i, lane, copy.to, kCopyBytes, Touch::kWrite);
        if (bytes != 0) {
            check_global(w, i, lane, copy.from, bytes, kCopyBytes);
            reading |= 1u << lane;
        }
        if (arrives_now()) {
            arrive(w, i, lane, copy);
        } else {
            std::memset(shared_at(w, copy.to), kInFlight, kCopyBytes);
        }
        w.copies[lane].open.push_back(copy);
    });
    if (reading != 0) observe_global(w, i, reading, kCopyBytes, from);
}

void commit_group(Warp& w, const Instruction&, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        CopyGroups& groups = w.copies[lane];
        groups.committed.push_back(std::move(groups.open));
        groups.open.clear();
    });
}

// Until at most i.number groups are on their way. Of the lane's own copies alone: a barrier shows them to others.
void wait_group(Warp& w, const Instruction& i, Lanes lanes) {
    for_lanes(lanes, [&](int lane) {
        auto& committed = w.copies[lane].committed;
        while (committed.size() > static_cast<size_t>(i.number)) {
            for (AsyncCopy& copy : committed.front()) arrive(w, i, lane, copy);
            committed.pop_front();
        }
    });
}

// ---- mbarriers and bulk copies ----

Mbarrier& mbarrier_at(Warp& w, const Instruction& i, int lane, uint32_t address) {
    if (address % 8 != 0) fault(w, i, lane, "misaligned: an mbarrier");
    const auto it = w.block->mbarriers.find(address);
    if (it == w.block->mbarriers.end()) fault(w, i, lane, "no mbarrier was initialised there");
    uint64_t held;
    std::memcpy(&held, shared_at(w, address), sizeof(held));
    if (held != kMbarrier) fault(w, i, lane, "the mbarrier was overwritten");
    return it->second;
}

void end_phase_if_over(Mbarrier& m) {
    if (m.pending != 0 || m.bytes != 0) return;
    ++m.phase;
    m.pending = m.expected;
}

void init_mbarrier(Warp& w, const Instruction& i, Lanes lanes) {
    const Addresses addresses(w, i, lanes, sizeof(uint64_t), true);
    for_lanes(lanes, [&](int lane) {
        const auto address = static_cast<uint32_t>(addresses[lane]);
        check_shared(w, i, lane, address, sizeof(uint64_t), sizeof(uint64_t));
        touch_shared(w, i, lane, address, sizeof(uint64_t), Touch::kWrite);
        std::memcpy(shared_at(w, address), &kMbarrier, sizeof(kMbarrier));
        Mbarrier& m = w.block->mbarriers[address] = {};
        m.expected = m.pending = w.at<uint32_t>(i.b)[lane];
    });
}

void fence_mbarriers(Warp& w, const Instruction&, Lanes) {
    for (auto& [address, m] : w.block->mbarriers) m.fenced = true;
}

void expect_and_arrive(Warp& w, const Instruction& i, Lanes lanes) {
    const Addresses addresses(w, i, lanes, sizeof(uint64_t), true);
    for_lanes(lanes, [&](int lane) {
        Mbarrier& m = mbarrier_at(w, i, lane, static_cast<uint32_t>(addresses[lane]));
        m.bytes += w.at<uint32_t>(i.b)[lane];
        if (m.pending == 0) fault(w, i, lane, "more arrivals than the mbarrier expects");
        --m.pending;
        end_phase_if_over(m);
    });
}

// True where the phase of that parity is over: the mbarrier is in one of the other parity.
void try_wait(Warp& w, const Instruction& i, Lanes lanes) {
    Lanes& over = *w.at<Lanes>(i.to);
    const Addresses addresses(w, i, lanes, sizeof(uint64_t), false);
    for_lanes(lanes, [&](int lane) {
        const auto address = static_cast<uint32_t>(addresses[lane]);
        const Mbarrier& m = mbarrier_at(w, i, lane, address);
        const bool is_over = m.phase % 2 != (w.at<uint32_t>(i.b)[lane] & 1);
        if (is_over) w.phases_seen[{lane, address}] = m.phase;
        over = (over & ~(1u << lane)) | static_cast<Lanes>(is_over) << lane;
    });
}

void copy_bulk(Warp& w, const Instruction& i, Lanes lanes) {
    Block& block = *w.block;
    for_lanes(lanes, [&](int lane) {
        const BulkCopy copy{w.at<uint32_t>(i.a)[lane], w.at<uint64_t>(i.b)[lane], w.at<uint32_t>(i.c)[lane],
                            w.at<uint32_t>(i.vector[0])[lane]};
        if (copy.bytes % 16 != 0 || copy.from % 16 != 0 || copy.to % 16 != 0) {
            fault(w, i, lane,
                  "misaligned: a bulk copy of " + std::to_string(copy.bytes) + " bytes, not in units of 16");
        }
        check_shared(w, i, lane, copy.to, copy.bytes, 16);
        touch_shared(w, i, lane, copy.to, copy.bytes, Touch::kWrite);
        check_global(w, i, lane, copy.from, copy.bytes, 16);
        Mbarrier& m = mbarrier_at(w, i, lane, copy.mbarrier);
        if (!m.fenced) fault(w, i, lane, "no fence between the mbarrier's init and the asynchronous proxy");
        touch_by_bulk_copy(block, copy.to, copy.bytes, copy.mbarrier, m.phase);
        std::memset(shared_at(w, copy.to), kInFlight, copy.bytes);
        block.bulk_copies.push_back(copy);
        uint64_t from[kWarp];
        from[lane] = copy.from;
        observe_global(w, i, 1u << lane, copy.bytes, from);
        if (arrives_now()) complete_bulk_copy(block, block.bulk_copies.size() - 1);
    });
}

}  // namespace

void complete_bulk_copy(Block& block, size_t which) {
    const BulkCopy copy = block.bulk_copies[which];
    block.bulk_copies.erase(block.bulk_copies.begin() + static_cast<long>(which));
    std::memcpy(block.shared.data() + (copy.to - kSharedBase), reinterpret_cast<void*>(copy.from), copy.bytes);
    Mbarrier& m = block.mbarriers[copy.mbarrier];
    m.bytes -= copy.bytes;
    end_phase_if_over(m);
    note_progress();
}

bool drop_copies(Warp& w, int lane) {
    CopyGroups& groups = w.copies[lane];
    bool any = !groups.open.empty();
    for (const auto& group : groups.committed) any = any || !group.empty();
    groups = {};
    return any;
}

bool decode_async_copy(Decoder& d) {
    Instruction& i = d.i;
    const std::string& opcode = i.opcode;
    i.space = Space::kShared;
    if (opcode == "cp.async.cg.shared.global") {
        if (d.operands.at(2) != "16") throw Fault("a cp-size that is not 16");
        d.address(0);
        i.b = d.bare_address(1, kWide);
        if (d.operands.size() > 3) i.c = d.source(3, kNarrow);
        i.execute = copy_async;
    } else if (opcode == "cp.async.commit_group") {
        i.execute = commit_group;
    } else if (opcode == "cp.async.wait_group") {
        i.number = std::atoi(d.operands.at(0).c_str());
        i.execute = wait_group;
    } else if (opcode == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes") {
        i.a = d.bare_address(0, kNarrow), i.b = d.bare_address(1, kWide);
        i.c = d.source(2, kNarrow), i.vector[0] = d.bare_address(3, kNarrow);
        i.execute = copy_bulk;
    } else if (opcode == "mbarrier.init.shared::cta.b64") {
        d.address(0);
        i.b = d.source(1, kNarrow);
        i.execute = init_mbarrier;
    } else if (opcode == "mbarrier.arrive.expect_tx.shared::cta.b64") {
        if (d.operands.at(0) != "_") throw Fault("an arrival whose state is kept");
        d.address(1);
        i.b = d.source(2, kNarrow);
        i.execute = expect_and_arrive;
    } else if (opcode == "mbarrier.try_wait.parity.shared::cta.b64") {
        i.to = d.target(0, kPredicate);
        d.address(1);
        i.b = d.source(2, kNarrow);
        i.execute = try_wait, i.role = Role::kPolls;
    } else if (opcode == "fence.mbarrier_init.release.cluster") {
        i.execute = fence_mbarriers;
    } else {
        return false;
    }
    return true;
}

}  // namespace headroom::ptx
