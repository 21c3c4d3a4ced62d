#include "shared_memory.h"

namespace headroom::ptx {

namespace {

constexpr uint32_t kGrain = 2;  // bytes: the smallest that kernels store, an FP16 number

// Whether a bar.sync, or a bar.warp.sync of this warp, lies between then and now.
bool ordered_after_write(const Warp& warp, const Touched& t) {
    if (t.written_in_block != warp.block->epoch) return true;
    return t.writer / kWarp == warp.id && t.writer != Touched::kMany && t.written_in_warp < warp.epoch;
}

bool ordered_after_read(const Warp& warp, const Touched& t) {
    if (t.read_in_block != warp.block->epoch) return true;
    return t.reader_warp == warp.id && t.read_in_warp < warp.epoch;
}

std::string thread_name(uint16_t thread) {
    return thread == Touched::kMany ? "several threads" : "thread " + std::to_string(thread);
}

void note_read(const Warp& warp, Touched& t, uint16_t thread) {
    if (ordered_after_read(warp, t)) {
        t.reader = thread, t.reader_warp = static_cast<uint16_t>(warp.id);
    } else {
        if (t.reader != thread) t.reader = Touched::kMany;
        if (t.reader_warp != warp.id) t.reader_warp = Touched::kMany;
    }
    t.read_in_block = warp.block->epoch, t.read_in_warp = warp.epoch;
}

void note_write(const Warp& warp, Touched& t, uint16_t thread, bool atomic = false) {
    const bool joins = atomic && t.by_atomic && t.writer != thread && !ordered_after_write(warp, t);
    t.writer = joins ? Touched::kMany : thread, t.by_atomic = atomic;
    t.written_in_block = warp.block->epoch, t.written_in_warp = warp.epoch;
}

}  // namespace

uint8_t* shared_at(Warp& warp, uint32_t address) {
    return warp.block->shared.data() + (address - kSharedBase);
}

void check_shared(Warp& warp, const Instruction& i, int lane, uint32_t address, uint32_t bytes, uint32_t alignment) {
    const size_t size = warp.block->shared.size();
    const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
    if (offset < 0 || static_cast<size_t>(offset) + bytes > size) {
        fault(warp, i, lane,
              "out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
                  std::to_string(size) + " bytes of shared memory");
    }
    if (address % alignment != 0) {
        fault(warp, i, lane,
              "misaligned: " + std::to_string(offset) + " in shared memory is no multiple of " +
                  std::to_string(alignment));
    }
}

void touch_shared(Warp& warp, const Instruction& i, int lane, uint32_t address, uint32_t bytes, Touch how) {
    if (!settings.races) return;
    const uint16_t thread = warp.thread(lane);
    const uint32_t first = (address - kSharedBase) / kGrain, end = (address - kSharedBase + bytes + 1) / kGrain;
    for (uint32_t grain = first; grain < end; ++grain) {
        Touched& t = warp.block->touched[grain];
        const auto race = [&](const std::string& with) {
            const std::string does = how == Touch::kRead ? "read" : "write";
            fault(warp, i, lane, "race: " + does + " at " + std::to_string(grain * kGrain) + " after " + with);
        };
        if (t.by_bulk_copy) {
            const auto seen = warp.phases_seen.find({lane, t.mbarrier});
            if (seen == warp.phases_seen.end() || seen->second <= t.phase) {
                race("a bulk copy that this lane has not waited for");
            }
            if (how != Touch::kRead) t.by_bulk_copy = false;
        } else if (t.writer != thread && !ordered_after_write(warp, t) && !(how == Touch::kAtomic && t.by_atomic)) {
            race("the write of " + thread_name(t.writer));
        }
        if (how == Touch::kRead) {
            note_read(warp, t, thread);
        } else {
            if (t.reader != thread && !ordered_after_read(warp, t)) race("the read of " + thread_name(t.reader));
            note_write(warp, t, thread, how == Touch::kAtomic);
        }
    }
}

void touch_by_copy(Warp& warp, int lane, uint32_t address, uint32_t bytes) {
    if (!settings.races) return;
    const uint32_t first = (address - kSharedBase) / kGrain;
    for (uint32_t grain = first; grain < first + bytes / kGrain; ++grain) {
        note_write(warp, warp.block->touched[grain], warp.thread(lane));
    }
}

void touch_by_bulk_copy(Block& block, uint32_t address, uint32_t bytes, uint32_t mbarrier, uint32_t phase) {
    if (!settings.races) return;
    const uint32_t first = (address - kSharedBase) / kGrain;
    for (uint32_t grain = first; grain < first + bytes / kGrain; ++grain) {
        Touched& t = block.touched[grain];
        t.by_bulk_copy = true, t.mbarrier = mbarrier, t.phase = phase;
    }
}

}  // namespace headroom::ptx
