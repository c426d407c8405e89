// Tile shapes of the sm_90 kernel.
#pragma once

#include <type_traits>

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// kPanels      64-channel panels of weights a block computes at once
// kTokens      tokens a block computes at once: the n of wgmma
// kBlocks      64-wide blocks of K in a pipeline stage
// kStages      stages of the ring, at most: as many as fit
// kConsumers   warpgroups that multiply
// kSplit       of which this many take turns along K and add up at the end; the others share out the panels
// kClusterK    blocks of a cluster, which cut a tile along K and add up through each other's shared memory
template <int kPanels_, int kTokens_, int kBlocks_, int kStages_, int kConsumers_, int kSplit_, int kClusterK_>
struct Tile {
    static constexpr int kPanels = kPanels_, kTokens = kTokens_, kBlocks = kBlocks_, kStages = kStages_;
    static constexpr int kConsumers = kConsumers_, kSplit = kSplit_, kClusterK = kClusterK_;

    static constexpr int kGroups = kConsumers / kSplit;      // consumers along the channels
    static constexpr int kOwnPanels = kPanels / kGroups;     // panels of one consumer
    static constexpr int kOwnBlocks = kBlocks / kSplit;      // blocks of K of one consumer in a stage
    static constexpr int kUnits = kOwnPanels * kOwnBlocks;   // 64x64 blocks of weights of one consumer in a stage
    static constexpr int kSums = kTokens / 2;                // fp32 sums of a thread for one panel
    static constexpr int kOwnTokens = kTokens / kClusterK;   // of a tile, that one block of the cluster stores
    static constexpr int kOwnSums = kSums / kClusterK;
    // Whether a stage's weights are one copy, by a tensor map, instead of one a panel. A copy takes its thread as long
    // whatever its size, so that short ones hold it up; but the memory delivers a little less to a tensor map than to
    // long copies, and up to 32 tokens it is the limit (docs/kernels.md, version 38).
    static constexpr bool kMapsWeights = kTokens > 32 || (kTokens == 32 && kClusterK > 1);

    // Blocks of K in one copy of activations: all of a stage; or one, at 8 tokens, where four copies of 1 KB are faster than
    // one of 4 KB (docs/kernels.md, version 54).
    static constexpr int kCopiedBlocks = kTokens > 8 ? kBlocks : 1;

    static_assert(kConsumers % kSplit == 0 && kPanels % kGroups == 0 && kBlocks % kSplit == 0, "even shares");
    static_assert(kUnits % 2 == 0, "the two register buffers alternate with the units");
    static_assert(kClusterK == 1 || kClusterK == 2, "blocks exchange halves");
    static_assert(kOwnTokens % 8 == 0, "whole n8 parts of the sums");
};

// Weights in flight hide the memory's latency: with 36 KB an SM 3.5 TB/s were reached, with 100 KB 4.3. A token costs the
// L2 and the shared memory 128 bytes a block of K, so that more of them want more panels. At few tokens one panel for
// all consumers, in turns along K, leaves 8192 channels without a cut tile on 132 SMs. Four consumers hide each other's
// latencies better where their sums leave them registers: up to 32 tokens; three up to 64.
//
//                   panels tokens blocks stages consumers split clusterK
using Tile8 =           Tile<1,   8,   4,    9,     2,      2,    1>;
using Tile8Wide =       Tile<2,   8,   4,    8,     4,      2,    1>;
using Tile16 =          Tile<1,  16,   4,   10,     2,      2,    1>;
using Tile16Cut =       Tile<1,  16,   4,    8,     2,      2,    2>;
using Tile16Wide =      Tile<2,  16,   4,    6,     4,      2,    1>;
using Tile32Grouped =   Tile<2,  32,   2,   10,     2,      1,    1>;
using Tile32 =          Tile<2,  32,   4,    5,     4,      2,    1>;
using Tile32Cut =       Tile<2,  32,   2,   10,     2,      1,    2>;
using Tile32CutLong =   Tile<2,  32,   4,    5,     2,      1,    2>;
using Tile32Wide =      Tile<4,  32,   2,    6,     2,      1,    1>;
using Tile48 =          Tile<4,  48,   2,    5,     2,      1,    1>;
using Tile48Cut =       Tile<2,  48,   4,    4,     2,      1,    2>;
using Tile64 =          Tile<4,  64,   2,    5,     2,      1,    1>;
using Tile64Cut =       Tile<2,  64,   2,    7,     2,      1,    2>;
using Tile64WideCut =   Tile<4,  64,   2,    5,     2,      1,    2>;
using Tile96 =          Tile<4,  96,   2,    4,     2,      1,    1>;
using Tile96Narrow =    Tile<2,  96,   2,    5,     2,      1,    1>;
using Tile96Cut =       Tile<2,  96,   2,    5,     2,      1,    2>;
using Tile128 =         Tile<4, 128,   2,    3,     2,      1,    1>;
using Tile128Narrow =   Tile<2, 128,   2,    5,     2,      1,    1>;
using Tile128Cut =      Tile<2, 128,   2,    5,     2,      1,    2>;

// Tiles by their numbers, so that a choice of one is a value.
template <class... T>
struct TileList {
    template <class Wanted>
    static constexpr int number() {
        constexpr int kNumber = [] {
            int number = -1, at = 0;
            ((number = std::is_same_v<T, Wanted> ? at : number, ++at), ...);
            return number;
        }();
        static_assert(kNumber >= 0, "a tile of the list");
        return kNumber;
    }

    // run(the tile of that number).
    template <class Run>
    static auto with(int number, Run run) {
        return with_first<Run, T...>(number, run);
    }

private:
    template <class Run, class First, class... Rest>
    static auto with_first(int number, Run& run) {
        if constexpr (sizeof...(Rest) == 0) {
            return run(First());
        } else {
            return number == 0 ? run(First()) : with_first<Run, Rest...>(number - 1, run);
        }
    }
};

// Where channels have one scale, and where they have several: two sets of sums leave no registers for more.
using UngroupedTiles =
    TileList<Tile8, Tile8Wide, Tile16, Tile16Cut, Tile16Wide, Tile32, Tile32Cut, Tile32CutLong, Tile32Wide, Tile48,
             Tile48Cut, Tile64, Tile64Cut, Tile64WideCut, Tile96, Tile96Narrow, Tile96Cut, Tile128, Tile128Narrow,
             Tile128Cut>;
using GroupedTiles = TileList<Tile8, Tile16, Tile32Grouped, Tile64>;

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
