#include "global_memory.h"

#include <cstring>
#include <unordered_set>

namespace headroom::ptx {

namespace {

constexpr uint64_t kLine = 128, kGrain = 16;
constexpr uint64_t kFirstPage = 4096;  // no pointer that is meant
constexpr size_t kMostLateStores = 512;
constexpr uint64_t kStaleReads = 64;  // a stale line is dropped once in so many reads

std::map<uint64_t, uint64_t> named;               // begin -> end
std::unordered_set<uint64_t> written, read_only;  // grains, while a kernel with ld.global.nc is there

void* pointer(uint64_t address) {
    return reinterpret_cast<void*>(address);
}

void apply(const LateStore& store) {
    std::memcpy(pointer(store.at), store.bytes.data(), store.bytes.size());
}

// A block sees its own stores at once.
void overlay(const Block& block, uint64_t address, uint8_t* to, uint32_t bytes) {
    for (const LateStore& store : block.late_stores) {
        const uint64_t begin = std::max(address, store.at);
        const uint64_t end = std::min(address + bytes, store.at + store.bytes.size());
        if (begin < end) std::memcpy(to + (begin - address), store.bytes.data() + (begin - store.at), end - begin);
    }
}

// As a line in L1 would: copied once, then read again and again.
void read_stale(Block& block, uint64_t address, void* to, uint32_t bytes) {
    const uint64_t line = address / kLine;
    if (chance() % kStaleReads == 0) block.stale_lines.erase(line);
    std::vector<uint8_t>& held = block.stale_lines[line];
    if (held.empty()) {
        held.resize(kLine);
        std::memcpy(held.data(), pointer(line * kLine), kLine);
    }
    std::memcpy(to, held.data() + address % kLine, bytes);
}

template <class F>
void for_grains(uint64_t address, uint32_t bytes, F run) {
    for (uint64_t grain = address / kGrain; grain <= (address + bytes - 1) / kGrain; ++grain) run(grain);
}

}  // namespace

void name_memory(uint64_t begin, uint64_t bytes) {
    if (bytes == 0) return;
    const uint64_t end = begin + bytes;
    auto it = named.lower_bound(begin);
    if (it != named.end() && it->first == begin && it->second == end) return;
    if (it != named.begin() && std::prev(it)->second > begin) std::prev(it)->second = begin;
    while (it != named.end() && it->first < end) it = named.erase(it);
    named[begin] = end;
}

void forget_named_memory() {
    named.clear();
}

void check_global(Warp& warp, const Instruction& i, int lane, uint64_t address, uint64_t bytes, uint32_t alignment) {
    if (address % alignment != 0) {
        fault(warp, i, lane, "misaligned: a global address that is no multiple of " + std::to_string(alignment));
    }
    if (address < kFirstPage || address >= kGenericShared) {
        fault(warp, i, lane, "out of bounds: no global memory is at " + std::to_string(address));
    }
    if (!settings.named_memory) return;
    auto it = named.upper_bound(address);
    if (it == named.begin()) fault(warp, i, lane, "out of bounds: before all tensors");
    --it;
    if (address + bytes > it->second) {
        fault(warp, i, lane,
              "out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(address - it->first) +
                  " of a tensor's " + std::to_string(it->second - it->first));
    }
}

void read_global(Warp& warp, const Instruction& i, int lane, uint64_t address, void* to, uint32_t bytes, bool past_l1) {
    if (i.read_only) {
        for_grains(address, bytes, [&](uint64_t grain) {
            if (written.count(grain) != 0) fault(warp, i, lane, "ld.global.nc of what was written in this launch");
            read_only.insert(grain);
        });
    }
    if (!settings.weak_memory) {
        std::memcpy(to, pointer(address), bytes);
        return;
    }
    if (past_l1) {
        std::memcpy(to, pointer(address), bytes);
    } else {
        read_stale(*warp.block, address, to, bytes);
    }
    overlay(*warp.block, address, static_cast<uint8_t*>(to), bytes);
}

void write_global(Warp& warp, const Instruction& i, int lane, uint64_t address, const void* from, uint32_t bytes) {
    if (!read_only.empty()) {
        for_grains(address, bytes, [&](uint64_t grain) {
            if (read_only.count(grain) != 0) fault(warp, i, lane, "a store to what ld.global.nc read in this launch");
        });
    }
    if (warp.kernel->reads_only) for_grains(address, bytes, [&](uint64_t grain) { written.insert(grain); });
    note_progress();
    if (!settings.weak_memory) {
        std::memcpy(pointer(address), from, bytes);
        return;
    }
    Block& block = *warp.block;
    const auto line = block.stale_lines.find(address / kLine);
    if (line != block.stale_lines.end()) std::memcpy(line->second.data() + address % kLine, from, bytes);
    const auto* first = static_cast<const uint8_t*>(from);
    block.late_stores.push_back({address, {first, first + bytes}, warp.thread(lane)});
    if (block.late_stores.size() > kMostLateStores) {
        apply(block.late_stores.front());
        block.late_stores.pop_front();
    }
}

void settle(Block& block, uint64_t address, uint32_t bytes) {
    std::erase_if(block.late_stores, [&](const LateStore& store) {
        const bool there = store.at < address + bytes && address < store.at + store.bytes.size();
        if (there) apply(store);
        return there;
    });
    block.stale_lines.erase(address / kLine);
}

void release(Warp& warp, int lane) {
    note_progress();
    if (!settings.weak_memory) return;
    std::deque<LateStore> left;
    for (LateStore& store : warp.block->late_stores) {
        if (store.behind_barrier || store.thread == warp.thread(lane)) {
            apply(store);
        } else {
            left.push_back(std::move(store));
        }
    }
    warp.block->late_stores = std::move(left);
}

void acquire(Warp& warp) {
    warp.block->stale_lines.clear();
}

void release_all(Block& block) {
    for (const LateStore& store : block.late_stores) apply(store);
    block.late_stores.clear();
}

void forget_read_only() {
    written.clear();
    read_only.clear();
}

}  // namespace headroom::ptx
