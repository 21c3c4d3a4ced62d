// A warp's ring of weight tiles in shared memory, always full: it runs ahead through barriers, layers and tokens.
//
// Matrices are used in one fixed order, so what comes next is known without waiting for anything. A tile is a piece
// of one row, at most a stage long. Tile i of a block goes to warp i % warps, which alone fetches it, uses it, and
// fetches into the same place: no synchronisation beyond the warp. Bulk copies where there are any, else cp.async.
#pragma once

#include "../device.h"

namespace headroom::persistent {

// Of `rows` that the blocks share, the first one of block `block`; they come 1 << together at a time.
HR_DEVICE int first_row(int rows, unsigned block, int together = 0) {
    return static_cast<int>(static_cast<int64_t>(rows >> together) * block / gridDim.x) << together;
}

// A block's rows [begin, end) of a weight matrix. A row is `chunks` tiles.
struct Matrix {
    const half* weight;
    int ld, begin, end, chunks;

    HR_DEVICE int tiles() const { return (end - begin) * chunks; }
};

// Waits until at most `left` groups of cp.async are on their way, or fewer: the instruction takes a constant.
template <int N = 15>
HR_DEVICE void cp_async_wait_at_most(int left) {
    if constexpr (N == 0) {
        cp_async_wait<0>();
    } else if (left >= N) {
        cp_async_wait<N>();
    } else {
        cp_async_wait_at_most<N - 1>(left);
    }
}

// Sequence: matrix(i) is the i-th of `count` matrices, which repeat `rounds` times.
template <typename Sequence>
class WeightRing {
  public:
    // stages: this warp's [depth][stage] halves; full: a barrier a stage.
    HR_DEVICE WeightRing(const Sequence& sequence, int count, int rounds, half* stages, uint64_t* full, int depth,
                         int stage)
        : sequence_(sequence),
          count_(count),
          rounds_(rounds),
          stages_(stages),
          full_(full),
          depth_(depth),
          stage_(stage),
          next_(sequence.matrix(0)),
          tile_(warp_id()) {
        if (kBulkCopy && lane_id() == 0) {
            for (int i = 0; i < depth; ++i) mbarrier_init(full + i, 1);
        }
        sync_warp();
        find_tile();
        for (int i = 0; i < depth; ++i) {
            fetch();
            turn();
        }
        parity_ = 0;
    }

    // The oldest tile, once it is there. Lane i may read 16-byte vectors i, i + 32, ...: what it has copied itself.
    HR_DEVICE const half* wait() const {
        if (kBulkCopy) {
            mbarrier_wait(full_ + at_, parity_);
        } else {
            cp_async_wait_at_most(depth_ - 1);
        }
        return stages_ + at_ * stage_;
    }

    // All lanes have used it: the next tile takes its place.
    HR_DEVICE void release() {
        if (kBulkCopy) sync_warp();  // lane 0 writes over what others have read
        --fetched_;
        fetch();
        turn();
    }

    // No copy may be on its way when the block ends.
    HR_DEVICE void drain() {
        if (!kBulkCopy) cp_async_wait<0>();
        for (; kBulkCopy && fetched_ > 0; --fetched_) {
            mbarrier_wait(full_ + at_, parity_);
            turn();
        }
    }

  private:
    HR_DEVICE void turn() {
        if (++at_ == depth_) {
            at_ = 0;
            parity_ ^= 1;
        }
    }

    HR_DEVICE void find_tile() {
        while (rounds_ > 0 && tile_ >= next_.tiles()) {
            if (++index_ == count_) {
                index_ = 0;
                --rounds_;
            }
            next_ = sequence_.matrix(index_);
            tile_ = warp_id();
        }
    }

    HR_DEVICE void fetch() {
        if (rounds_ > 0) {
            const int row = tile_ / next_.chunks, column = tile_ % next_.chunks * stage_;
            const int halves = min(stage_, next_.ld - column);
            const half* from = next_.weight + static_cast<int64_t>(next_.begin + row) * next_.ld + column;
            half* to = stages_ + at_ * stage_;
            if (!kBulkCopy) {
                for (int i = lane_id() * 8; i < halves; i += kWarp * 8) cp_async16(to + i, from + i);
            } else if (lane_id() == 0) {
                const unsigned bytes = static_cast<unsigned>(halves) * sizeof(half);
                mbarrier_expect_and_arrive(full_ + at_, bytes);
                bulk_copy(to, from, bytes, full_ + at_);
            }
            ++fetched_;
            tile_ += static_cast<int>(blockDim.x) / kWarp;
            find_tile();
        }
        if (!kBulkCopy) cp_async_commit();  // empty at the end, so that the groups to wait for stay the same
    }

    const Sequence& sequence_;
    int count_, rounds_;
    half* stages_;
    uint64_t* full_;
    int depth_, stage_;
    Matrix next_;  // and its tile_: the next to be fetched
    int index_ = 0, tile_;
    int at_ = 0, fetched_ = 0;
    unsigned parity_ = 0;
};

}  // namespace headroom::persistent
