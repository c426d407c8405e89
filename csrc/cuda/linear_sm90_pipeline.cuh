// The ring in shared memory and the two warps that fill it: one copies weights, one activations.
#pragma once

#include "common/layout.h"
#include "linear_sm90_schedule.h"
#include "linear_sm90_tile.h"
#include "ptx_sm90.cuh"

namespace ds_fp6::cuda::sm90 {

// What a launch is about; the kernel's parameters beside the tensor map of x.
struct Problem {
    const uint8_t* weight;  // packed tiles [ceil(n / 64)][ceil(k / 64)][4][128 * bits bytes]
    const float* scale;     // [n]
    const void* bias;       // [n] of y's type, or null
    void* y;                // [m, n], of x's type
    float* partial;         // [blocks][channels * tokens of a tile], in the order of the accumulators
    uint32_t* published;    // [blocks][consumers]: 1 while that consumer's partial sum waits for its owner
    int m, n;
    int overlap;
    int panels;    // ceil(n / 64)
    int k_blocks;  // ceil(k / 64)
    Schedule schedule;
};

// Bytes of shared memory: activations first (their swizzle needs 1024-byte alignment), then weights, the staging of y,
// the barriers.
template <class T, int kBits>
struct SharedLayout {
    static constexpr int kWeightBlock = Tiles<kBits>::kPanelBytes;  // 64 x 64
    static constexpr int kActivationBlock = T::kTokens * 128;
    static constexpr int kWeightStage = T::kPanels * T::kBlocks * kWeightBlock;
    static constexpr int kActivationStage = T::kBlocks * kActivationBlock;
    static constexpr int kStagedTokens = T::kTokens < 64 ? T::kTokens : 64;
    static constexpr int kStaging = kStagedTokens * 128;  // of one consumer: tokens x 64 channels of 2 bytes

    static constexpr int kWeights = T::kStages * kActivationStage;
    static constexpr int kStagings = kWeights + T::kStages * kWeightStage;
    static constexpr int kExchange = kStagings + T::kGroups * kStaging;  // fp32 sums of consumers that split K
    static constexpr int kExchangeBytes = (T::kSplit - 1) * T::kGroups * T::kOwnPanels * T::kAccumulators * 128 * 4;
    static constexpr int kBarriers = kExchange + kExchangeBytes;
    static constexpr int kBytes = kBarriers + 2 * T::kStages * 8;

    static_assert(T::kClusterK == 1 || T::kPanels * 64 * T::kTokens * 4 <= kStagings,
                  "the ring makes room for a tile's fp32 sums");
    static_assert(kBytes <= 227 * 1024, "a block's shared memory");
    static_assert(T::kResident == 1 || kBytes <= 113 * 1024, "two blocks an SM");
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

template <class T, int kBits>
struct Ring {
    using Layout = SharedLayout<T, kBits>;
    using Slot = RingSlot<T::kStages>;

    uint32_t base;  // of the dynamic shared memory
    uint32_t rank;  // in the cluster

    __device__ uint32_t activations(int slot) const { return base + slot * Layout::kActivationStage; }
    __device__ uint32_t weights(int slot) const { return base + Layout::kWeights + slot * Layout::kWeightStage; }
    __device__ uint32_t full(int slot) const { return base + Layout::kBarriers + slot * 8; }
    __device__ uint32_t empty(int slot) const { return base + Layout::kBarriers + (T::kStages + slot) * 8; }

    __device__ int rank_n() const { return rank % T::kClusterN; }
    __device__ int rank_m() const { return rank / T::kClusterN % T::kClusterM; }
    __device__ int rank_k() const { return rank / (T::kClusterN * T::kClusterM); }
    __device__ uint32_t rank_of(int n, int m) const {
        return (rank_k() * T::kClusterM + m) * T::kClusterN + n;
    }

    // The block at this one's place in another part of K.
    __device__ uint32_t rank_in_part(int k) const { return k * T::kClusterN * T::kClusterM + rank % (T::kClusterN * T::kClusterM); }

    // Blocks that share this block's activations differ in rank_n, those that share its weights in rank_m.
    static constexpr int kPeers = T::kClusterN + T::kClusterM - 1;
    __device__ uint32_t peer(int i) const {
        return i < T::kClusterN ? rank_of(i, rank_m())
                                : rank_of(rank_n(), (i - T::kClusterN + 1 + rank_m()) % T::kClusterM);
    }
    __device__ uint16_t sharers_of_activations() const {
        return static_cast<uint16_t>(((1u << T::kClusterN) - 1) << rank_of(0, rank_m()));
    }
    __device__ uint16_t sharers_of_weights() const {
        uint32_t ranks = 0;
        for (int m = 0; m < T::kClusterM; ++m) ranks |= 1u << rank_of(rank_n(), m);
        return static_cast<uint16_t>(ranks);
    }

    // This block's steps of a piece of the cluster.
    __device__ Piece own_part(const Piece& piece) const {
        if constexpr (T::kClusterK == 1) return piece;
        const int steps = piece.end - piece.begin, k = rank_k();
        return {piece.tile, piece.begin + steps * k / T::kClusterK, piece.begin + steps * (k + 1) / T::kClusterK};
    }

    // One thread. A slot is full when both copiers have said what to expect and all of it has landed; it is empty when
    // every warp that reads it, here or in a block that shares the copies, has let go of it.
    __device__ void initialize() const {
        for (int slot = 0; slot < T::kStages; ++slot) {
            barrier_init(full(slot), 2);
            barrier_init(empty(slot), 4 * T::kConsumers * kPeers);
        }
        barrier_init_fence();
    }

    __device__ bool is_full(Slot slot) const { return barrier_try_wait(full(slot.index), slot.parity); }
    __device__ void wait_full(Slot slot) const { barrier_wait(full(slot.index), slot.parity); }

    // NOTE: the parity of the previous turn, so that the first turn does not wait.
    __device__ void wait_empty(Slot slot) const { barrier_wait(empty(slot.index), slot.parity ^ 1); }

    // A whole warp.
    __device__ void release(Slot slot, int lane) const {
        if constexpr (T::kCluster > 1) {
            if (lane < kPeers) barrier_arrive_cluster(map_to_rank(empty(slot.index), peer(lane)));
        } else {
            if (lane == 0) barrier_arrive(empty(slot.index));
        }
    }
};

// First 64-channel panel and first token of this block in a tile of its cluster.
struct BlockOrigin {
    int panel, token;
};

template <class T, int kBits>
__device__ inline BlockOrigin block_origin(const Problem& p, const Ring<T, kBits>& ring, int tile) {
    const TileOrigin origin = tile_origin(p.schedule, tile);
    return {(origin.n * T::kClusterN + ring.rank_n()) * T::kPanels,
            (origin.m * T::kClusterM + ring.rank_m()) * T::kTokens};
}

// One thread. Weights do not depend on earlier kernels: this runs ahead of them.
template <class T, int kBits>
__device__ inline void copy_weights(const Problem& p, const Ring<T, kBits>& ring, int worker) {
    using Layout = SharedLayout<T, kBits>;
    const uint64_t policy = policy_evict_first();
    typename Ring<T, kBits>::Slot slot;
    PieceWalk walk(p.schedule, worker);
    for (Piece piece; walk.next(piece);) {
        piece = ring.own_part(piece);
        const int panel = block_origin(p, ring, piece.tile).panel;
        const int panels = min(T::kPanels, max(p.panels - panel, 0));
        for (int step = piece.begin; step < piece.end; ++step, slot.advance()) {
            const int block = step * T::kBlocks;
            // NOTE: blocks past K are not copied. What lies in shared memory instead is finite as weights, and the
            // activations there are zeros.
            const int bytes = min(T::kBlocks, p.k_blocks - block) * Layout::kWeightBlock;
            ring.wait_empty(slot);
            barrier_arrive_expect(ring.full(slot.index), panels * bytes);
            for (int i = 0; i < panels; ++i) {
                const uint8_t* source =
                    p.weight + (static_cast<int64_t>(panel + i) * p.k_blocks + block) * Layout::kWeightBlock;
                const uint32_t target = ring.weights(slot.index) + i * T::kBlocks * Layout::kWeightBlock;
                if constexpr (T::kClusterM == 1) {
                    bulk_copy(target, source, bytes, ring.full(slot.index), policy);
                } else if (i % T::kClusterM == ring.rank_m()) {
                    bulk_copy_multicast(target, source, bytes, ring.full(slot.index), ring.sharers_of_weights(),
                                        policy);
                }
            }
        }
    }
    if (p.overlap == 2) launch_later_grids();
}

// One thread. The tensor map fills rows past m and columns past k with zeros, and counts their bytes.
template <class T, int kBits>
__device__ inline void copy_activations(const Problem& p, const CUtensorMap* x_map, const Ring<T, kBits>& ring,
                                        int worker) {
    using Layout = SharedLayout<T, kBits>;
    constexpr int kRowParts = T::kTokens / T::kSliceRows;
    const uint64_t policy = policy_evict_last();
    typename Ring<T, kBits>::Slot slot;
    PieceWalk walk(p.schedule, worker);
    for (Piece piece; walk.next(piece);) {
        piece = ring.own_part(piece);
        const int token = block_origin(p, ring, piece.tile).token;
        for (int step = piece.begin; step < piece.end; ++step, slot.advance()) {
            ring.wait_empty(slot);
            barrier_arrive_expect(ring.full(slot.index), Layout::kActivationStage);
            for (int i = 0; i < T::kSlices / T::kClusterN; ++i) {
                const int slice = i * T::kClusterN + ring.rank_n();
                const int block = slice / kRowParts, row = slice % kRowParts * T::kSliceRows;
                const uint32_t target = ring.activations(slot.index) + block * Layout::kActivationBlock + row * 128;
                const int column = (step * T::kBlocks + block) * 64;
                if constexpr (T::kClusterN == 1) {
                    tensor_copy(target, x_map, column, token + row, ring.full(slot.index), policy);
                } else {
                    tensor_copy_multicast(target, x_map, column, token + row, ring.full(slot.index),
                                          ring.sharers_of_activations(), policy);
                }
            }
        }
    }
}

}  // namespace ds_fp6::cuda::sm90
