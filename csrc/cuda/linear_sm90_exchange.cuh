// Sums of consumers that worked on different parts of K meet in shared memory: in this block's, or, halves of the
// tokens each, in the two blocks' of a cluster.
#pragma once

#include "linear_sm90_pipeline.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// visitor(float4, i) for the thread's sums four by four, i counting in fours; returns what replaces them.
template <int kPanels, int kSums, class Visitor>
__device__ inline void visit4(float (&sums)[kPanels][kSums], Visitor visitor) {
#pragma unroll
    for (int i = 0; i < kPanels * kSums / 4; ++i) {
        float* s = &sums[i * 4 / kSums][i * 4 % kSums];
        const float4 v = visitor(make_float4(s[0], s[1], s[2], s[3]), i);
        s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
    }
}

__device__ inline float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <class T, int kBits>
class Exchange {
public:
    using Layout = SharedLayout<T, kBits>;
    using Sums = float[T::kOwnPanels][T::kSums];
    using OwnSums = float[T::kOwnPanels][T::kOwnSums];

    __device__ Exchange(const Ring<T, kBits>& ring, int rank, int warpgroup, int thread)
        : base_(ring.base), rank_(rank), thread_(thread) {
        group_ = warpgroup / T::kSplit;
        turn_ = warpgroup % T::kSplit;
    }

    // One thread, for the block.
    __device__ static void initialize(const Ring<T, kBits>& ring) {
        if constexpr (T::kClusterK > 1) {
            for (int group = 0; group < T::kGroups; ++group) {
                barrier_init(arrived(ring.base, group), 1);
                barrier_init(taken(ring.base, group), 4);
            }
        }
    }

    // All consumers; leaves the whole sums with the first one of each group and returns whether this is it.
    __device__ bool add_up_turns(Sums& sums, bool first_piece) const {
        if constexpr (T::kSplit > 1) {
            constexpr int kAll = T::kConsumers * 128;
            if (!first_piece) named_sync(kTurnsBarrier, kAll);  // the sums of the piece before have been read
            if (turn_ != 0) {
                visit4(sums, [&](float4 sum, int i) {
                    store_shared_16(of_turn(turn_) + i * 2048, sum);
                    return sum;
                });
            }
            named_sync(kTurnsBarrier, kAll);
            if (turn_ != 0) return false;
#pragma unroll
            for (int turn = 1; turn < T::kSplit; ++turn) {
                visit4(sums, [&](float4 sum, int i) { return sum + load_shared_float4(of_turn(turn) + i * 2048); });
            }
        }
        return true;
    }

    // The first consumer of each group: sums of this block's half of the tokens, of both blocks.
    __device__ OwnSums& add_up_cluster(Sums& sums, OwnSums& storage) {
        if constexpr (T::kClusterK == 1) {
            return sums;
        } else {
            if (thread_ == 0) barrier_arrive_expect(arrived(base_, group_), Layout::kPairBytes);
            const uint32_t other = rank_ ^ 1;
            const uint32_t target = map_to_rank(of_pair(), other), signal = map_to_rank(arrived(base_, group_), other);
            wait_taken();
            visit4(storage, [&](float4, int i) {
                store_async_16(target + i * 2048, half_of(sums, i, rank_ ^ 1), signal);
                return half_of(sums, i, rank_);
            });
            barrier_wait(arrived(base_, group_), parity_);
            visit4(storage, [&](float4 sum, int i) { return sum + load_shared_float4(of_pair() + i * 2048); });
            __syncwarp();
            if (thread_ % 32 == 0) barrier_arrive_cluster(map_to_rank(taken(base_, group_), other));
            parity_ ^= 1;
            return storage;
        }
    }

    // What this block sent has been read: before it may leave, and before it may send again.
    __device__ void wait_taken() const {
        if constexpr (T::kClusterK > 1) {
            if (turn_ == 0) barrier_wait(taken(base_, group_), parity_ ^ 1);
        }
    }

private:
    static constexpr int kTurnsBarrier = 1;

    // This group's buffers: of each consumer after the first, and of the other block.
    __device__ uint32_t of_turn(int turn) const { return buffer() + (turn - 1) * Layout::kTurnBytes; }
    __device__ uint32_t of_pair() const { return buffer() + (T::kSplit - 1) * Layout::kTurnBytes; }
    __device__ uint32_t buffer() const {
        return base_ + Layout::kExchangeAt + group_ * (Layout::kExchange / T::kGroups) + thread_ * 16;
    }

    __device__ static float4 half_of(const Sums& sums, int i, int half) {
        const float* s = &sums[i * 4 / T::kOwnSums][i * 4 % T::kOwnSums];
        constexpr int kFurther = T::kOwnSums;
        return make_float4(half ? s[kFurther] : s[0], half ? s[kFurther + 1] : s[1], half ? s[kFurther + 2] : s[2],
                           half ? s[kFurther + 3] : s[3]);
    }

    __device__ static uint32_t arrived(uint32_t base, int group) {
        return base + Layout::kBarriers + (2 * Layout::kStages + 2 * group) * 8;
    }
    __device__ static uint32_t taken(uint32_t base, int group) { return arrived(base, group) + 8; }

    uint32_t base_;
    int rank_, thread_, group_, turn_;
    uint32_t parity_ = 0;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
