// Tile shapes of the sm_90 kernel.
#pragma once

#include <cstdint>

namespace ds_fp6::cuda::sm90 {

// kPanels      64-channel panels of weights a block computes at once
// kTokens      tokens a block computes at once: the n of wgmma
// kBlocks      64-wide blocks of K in a pipeline stage
// kStages      stages of the ring
// kConsumers   warpgroups that multiply
// kSplit       of which this many take turns along K and add up at the end; the others share out the panels
// kClusterN    blocks of a cluster that differ in channels: they share the activations by multicast
// kClusterM    blocks of a cluster that differ in tokens: they share the weights by multicast
// kClusterK    blocks of a cluster that cut a tile along K and add up through each other's shared memory
// kResident    blocks that fit an SM together: 2 lets the next kernel begin under this one's end
template <int kPanels_, int kTokens_, int kBlocks_, int kStages_, int kConsumers_, int kSplit_, int kClusterN_,
          int kClusterM_, int kClusterK_, int kResident_>
struct Tile {
    static constexpr int kPanels = kPanels_, kTokens = kTokens_, kBlocks = kBlocks_, kStages = kStages_;
    static constexpr int kConsumers = kConsumers_, kSplit = kSplit_;
    static constexpr int kClusterN = kClusterN_, kClusterM = kClusterM_, kClusterK = kClusterK_;
    static constexpr int kResident = kResident_;

    static constexpr int kCluster = kClusterN * kClusterM * kClusterK;
    static constexpr int kGroups = kConsumers / kSplit;     // consumers along the channels
    static constexpr int kOwnPanels = kPanels / kGroups;    // panels of one consumer
    static constexpr int kOwnBlocks = kBlocks / kSplit;     // blocks of K of one consumer in a stage
    static constexpr int kUnits = kOwnPanels * kOwnBlocks;  // 64x64 blocks of weights of one consumer in a stage
    static constexpr int kAccumulators = kTokens / 2;       // fp32 registers of a thread for one panel

    // Where the even share of registers is too small, the producers hand theirs to the consumers; it takes whole
    // warpgroups. The shares at launch: 168 registers of 384 threads, 96 of 640.
    static constexpr bool kMovesRegisters = kOwnPanels * kAccumulators > (kConsumers > 2 ? 24 : 96);
    static constexpr int kConsumerRegisters = kConsumers > 2 ? 104 : 232;
    static constexpr int kProducerRegisters = kConsumers > 2 ? 56 : 40;
    static constexpr int kThreads = kConsumers * 128 + (kMovesRegisters ? 128 : 64);

    // A stage's activations arrive as slices, dealt out to the blocks of the cluster that share them.
    static constexpr int kSliceRows = kClusterN > kBlocks ? kTokens * kBlocks / kClusterN : kTokens;
    static constexpr int kSlices = kBlocks * (kTokens / kSliceRows);

    static_assert(kConsumers % kSplit == 0 && kPanels % kGroups == 0 && kBlocks % kSplit == 0);
    static_assert(kUnits % 2 == 0, "the two register buffers alternate with the units");
    static_assert(kSliceRows % 8 == 0 && kSlices % kClusterN == 0, "slices are whole 1024-byte swizzle atoms");
    static_assert(kPanels % kClusterM == 0, "panels are dealt out to the blocks that share them");
};

}  // namespace ds_fp6::cuda::sm90
