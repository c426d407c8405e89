// The ring in shared memory and the two warps that fill it: one copies weights, one activations.
#pragma once

#include "common/layout.h"
#include "linear.h"
#include "linear_sm90_schedule.h"
#include "linear_sm90_tile.h"
#include "ptx_sm90.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// What a launch is about; the kernel's parameter beside the tensor maps of x and of the packed weights.
struct Problem {
    const uint8_t* tiles;  // packed weights, common/layout.h
    const float* scales;   // [n, groups]
    const void* bias;      // [n] of y's type or fp32, or null
    void* y;               // [m, n]; with a gate [m, n / 2]
    float* partials;       // [consumers of the grid][sums of a consumer], kAbsentSum where there is none
    int m, n;
    int x_blocks;      // 64-wide blocks of K in a copy of x: all of a stage, or one
    int groups;        // 1: one scale a channel
    int group_blocks;  // 64-wide blocks of K that share a scale
    bool bias_is_fp32;
    Gate gate;
    int panels;    // ceil(n / 64)
    int k_blocks;  // ceil(k / 64)
    Schedule schedule;
};

// Bytes of shared memory: activations first (their swizzle needs 1024-byte alignment), then weights, the staging of y,
// sums on their way between consumers, the barriers.
template <class T, int kBits>
struct SharedLayout {
    static constexpr int kWeightBlock = Tiles<kBits>::kPanelBytes;  // 64 x 64
    static constexpr int kActivationBlock = T::kTokens * 128;       // 64 x tokens
    static constexpr int kWeightStage = T::kPanels * T::kBlocks * kWeightBlock;
    static constexpr int kActivationStage = T::kBlocks * kActivationBlock;
    static constexpr int kStagedTokens = T::kOwnTokens < 64 ? T::kOwnTokens : T::kOwnTokens % 64 == 0 ? 64 : 48;
    static_assert(T::kOwnTokens % kStagedTokens == 0, "parts of one size");
    // Of one consumer: tokens, stored in sixteens, x 64 channels of 2 bytes.
    static constexpr int kStaging = (kStagedTokens + 15) / 16 * 16 * 128;
    // fp32 sums of one consumer, on their way to another one of the block, and to the other block of the cluster.
    static constexpr int kTurnBytes = T::kSplit > 1 ? T::kOwnPanels * T::kSums * 128 * 4 : 0;
    static constexpr int kPairBytes = T::kClusterK > 1 ? T::kOwnPanels * T::kOwnSums * 128 * 4 : 0;
    static constexpr int kExchange = T::kGroups * ((T::kSplit - 1) * kTurnBytes + kPairBytes);

    static constexpr int kMost = 227 * 1024;
    static constexpr int kBarrierBytes = (2 * T::kStages + 2 * T::kGroups) * 8;
    static constexpr int kFitting =
        (kMost - T::kGroups * kStaging - kExchange - kBarrierBytes) / (kWeightStage + kActivationStage);
    static constexpr int kStages = T::kStages < kFitting ? T::kStages : kFitting;
    static_assert(kStages >= 3, "one stage in use, one to be released late, one under way");

    static constexpr int kWeights = kStages * kActivationStage;
    static constexpr int kStagings = kWeights + kStages * kWeightStage;
    static constexpr int kExchangeAt = kStagings + T::kGroups * kStaging;
    static constexpr int kBarriers = kExchangeAt + kExchange;
    static constexpr int kBytes = kBarriers + kBarrierBytes;
};

// A position in the ring; `parity` is that of the phase which `full` completes for this turn.
template <int kStages>
struct RingSlot {
    int index = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++index == kStages) {
            index = 0;
            parity ^= 1;
        }
    }
};

// Lanes of a warp that let go of a slot, each for itself; one speaks for all, whose reads a wgmma that they waited for
// has consumed. racecheck believes only a lane that arrives itself: tests/cuda_sanitize.py.
#if defined(DS_FP6_EVERY_LANE_ARRIVES)
constexpr int kReleasingLanes = 32;
#else
constexpr int kReleasingLanes = 1;
#endif

template <class T, int kBits>
struct Ring {
    using Layout = SharedLayout<T, kBits>;
    using Slot = RingSlot<Layout::kStages>;

    uint32_t base;  // of the dynamic shared memory

    __device__ uint32_t activations(int slot) const { return base + slot * Layout::kActivationStage; }
    __device__ uint32_t weights(int slot) const { return base + Layout::kWeights + slot * Layout::kWeightStage; }
    __device__ uint32_t full(int slot) const { return base + Layout::kBarriers + slot * 8; }
    __device__ uint32_t empty(int slot) const { return base + Layout::kBarriers + (Layout::kStages + slot) * 8; }

    // One thread. A slot is full when both copiers have said what to expect and all of it has landed; it is empty when
    // every warp that reads it has let go of it.
    __device__ void initialize() const {
#pragma unroll
        for (int slot = 0; slot < Layout::kStages; ++slot) {
            barrier_init(full(slot), 2);
            barrier_init(empty(slot), 4 * T::kConsumers * kReleasingLanes);
        }
    }

    __device__ bool is_full(Slot slot) const { return barrier_try_wait(full(slot.index), slot.parity); }
    __device__ void wait_full(Slot slot) const { barrier_wait(full(slot.index), slot.parity); }
    // NOTE: the parity of the previous turn, so that the first turn does not wait.
    __device__ void wait_empty(Slot slot) const { barrier_wait(empty(slot.index), slot.parity ^ 1); }

    // A whole warp.
    __device__ void release(Slot slot, int lane) const {
        if (lane < kReleasingLanes) barrier_arrive(empty(slot.index));
    }
};

// How a block starts, or a cluster of blocks: one of the two copying warps makes the barriers, then everybody may use
// them. What a copier has to find out first, it finds out meanwhile. kThreads: of the block.
template <class T, int kThreads>
struct Start {
    static constexpr bool kCluster = T::kClusterK > 1;
    static constexpr int kCopiers = 15;  // a named barrier

    // The warp that has made the barriers goes on.
    __device__ static void announce() {
        if constexpr (kCluster) named_arrive(kCopiers, 64), cluster_arrive();
        else named_arrive(0, kThreads);
    }
    // The other copier waits for this block's only.
    __device__ static void wait_own() {
        if constexpr (kCluster) cluster_arrive(), named_sync(kCopiers, 64);
        else named_sync(0, kThreads);
    }
    __device__ static void wait() {
        if constexpr (kCluster) cluster_sync();
        else named_sync(0, kThreads);
    }
    // What is left to do of those that did not `wait`.
    __device__ static void finish() {
        if constexpr (kCluster) cluster_wait();
    }
};

// visit(the block's part of a piece, where its tile lies) for each piece of its worker, by a warp's first thread; ready()
// by the whole warp, once the first piece is found.
template <class T, class Ready, class Visit>
__device__ inline void visit_pieces(const Schedule& schedule, int worker, int rank, int lane, Ready ready, Visit visit) {
    PieceWalk walk(schedule, worker);
    Piece piece{};
    bool goes_on = walk.next(piece);
    TileOrigin origin = tile_origin(schedule, piece.tile);
    ready();
    for (; goes_on && lane == 0; goes_on = walk.next(piece), origin = tile_origin(schedule, piece.tile)) {
        visit(part_of<T::kClusterK>(piece, rank), origin);
    }
    __syncwarp();
}

// Packed weights as a tensor map has them: panels of rows of this length, as long as divides a 64 x 64 block of any width.
template <int kBits>
constexpr int kMapRowBytes = kBits % 2 == 0 ? 1024 : 512;

// Copies a stage's weights: T::kBlocks blocks from `block` of T::kPanels panels from `panel`. What is not there becomes
// zeros, or, where no map does so, is left out: what lies in shared memory instead is finite as weights, and the
// activations there, or the channels, are none.
template <class T, int kBits>
__device__ inline void copy_stage_weights(const Problem& p, const CUtensorMap* map, uint32_t target, int panel,
                                          int block, uint32_t barrier, uint64_t policy) {
    using Layout = SharedLayout<T, kBits>;
    if constexpr (T::kMapsWeights) {
        constexpr int kRows = Layout::kWeightBlock / kMapRowBytes<kBits>;
        barrier_arrive_expect(barrier, Layout::kWeightStage);
        tensor_copy(target, map, 0, block * kRows, panel, barrier, policy);
    } else {
        const int panels = min(T::kPanels, p.panels - panel);
        const int bytes = min(T::kBlocks, p.k_blocks - block) * Layout::kWeightBlock;
        barrier_arrive_expect(barrier, panels * bytes);
        for (int i = 0; i < panels; ++i) {
            bulk_copy(target + i * T::kBlocks * Layout::kWeightBlock,
                      p.tiles + (static_cast<int64_t>(panel + i) * p.k_blocks + block) * Layout::kWeightBlock, bytes,
                      barrier, policy);
        }
    }
}

// A warp; its first thread copies. Weights do not depend on the kernel before: this runs ahead of it, but not by the
// whole ring, which would be a queue in the memory for that kernel's own loads (docs/kernels.md, version 21); by less where
// consumers never catch up with what they begin late (44).
template <class Start, class T, int kBits>
__device__ inline void copy_weights(const Problem& p, const CUtensorMap* map, const Ring<T, kBits>& ring, int worker,
                                    int rank, int lane) {
    using Layout = SharedLayout<T, kBits>;
    const uint64_t policy = policy_evict_first();
    const int ahead_bytes = (T::kTokens > 32 && T::kPanels == 2 ? 24 : 72) * 1024;
    int ahead = max(1, ahead_bytes / Layout::kWeightStage), unused = Layout::kStages;  // stages
    typename Ring<T, kBits>::Slot slot;
    const auto ready = [&] {
        if constexpr (T::kMapsWeights) tensor_prefetch(map);
        Start::wait_own();
    };
    visit_pieces<T>(p.schedule, worker, rank, lane, ready, [&](const Piece& own, const TileOrigin& origin) {
        for (int step = own.begin; step < own.end; ++step, slot.advance()) {
            if (ahead-- == 0) wait_for_earlier_grids();
            if (unused-- <= 0) ring.wait_empty(slot);
            copy_stage_weights<T, kBits>(p, map, ring.weights(slot.index), origin.n * T::kPanels, step * T::kBlocks,
                                         ring.full(slot.index), policy);
        }
    });
}

// Copies a stage's activations: T::kBlocks blocks from `block` of T::kTokens tokens from `token`. What is not there becomes
// zeros, whose bytes count.
template <class T, int kBits>
__device__ inline void copy_stage_activations(const Problem& p, const CUtensorMap* map, uint32_t target, int token,
                                              int block, uint32_t barrier, uint64_t policy) {
    using Layout = SharedLayout<T, kBits>;
    barrier_arrive_expect(barrier, Layout::kActivationStage);
    if (T::kCopiedBlocks > 1 && p.x_blocks > 1) {
        tensor_copy(target, map, 0, token, block, barrier, policy);
    } else {
        for (int i = 0; i < T::kBlocks; ++i) {
            tensor_copy(target + i * Layout::kActivationBlock, map, (block + i) * 64, token, 0, barrier, policy);
        }
    }
}

// A warp; its first thread copies.
template <class T, int kBits>
__device__ inline void copy_activations(const Problem& p, const CUtensorMap* x_map, const Ring<T, kBits>& ring,
                                        int worker, int rank, int lane) {
    using Layout = SharedLayout<T, kBits>;
    const uint64_t policy = policy_evict_last();
    typename Ring<T, kBits>::Slot slot;
    const auto ready = [&] {
        tensor_prefetch(x_map);
        wait_for_earlier_grids();
    };
    visit_pieces<T>(p.schedule, worker, rank, lane, ready, [&](const Piece& own, const TileOrigin& origin) {
        for (int step = own.begin; step < own.end; ++step, slot.advance()) {
            ring.wait_empty(slot);
            copy_stage_activations<T, kBits>(p, x_map, ring.activations(slot.index), origin.m * T::kTokens,
                                             step * T::kBlocks, ring.full(slot.index), policy);
        }
    });
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
