// Weights of the next linear layer, asked for at the end of this one: they come into the L2 while the kernels between the
// two, and the start of the next, leave the memory idle.
#pragma once

#include "common/layout.h"
#include "linear_sm90_schedule.h"
#include "ptx_sm90.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// What each block of the next layer's kernel reads first, by that kernel's own schedule.
struct Ahead {
    const uint8_t* tiles;  // packed weights; null: there is nothing to ask for
    Schedule schedule;
    int panels;       // of the weight
    int k_blocks;
    int tile_panels;  // of a tile
    int step_blocks;  // of K in a step
    int cluster;      // blocks that cut a piece along K, 1 or 2
    int steps;        // to ask for, at most
};

// One thread of each of `blocks` blocks.
template <int kBits>
__device__ inline void ask_ahead(const Ahead& a, int block, int blocks) {
    if (a.tiles == nullptr) return;
    constexpr int kBlockBytes = Tiles<kBits>::kPanelBytes;  // 64 x 64
    for (; block < a.schedule.workers * a.cluster; block += blocks) {
        PieceWalk walk(a.schedule, block / a.cluster);
        Piece piece;
        if (!walk.next(piece)) continue;
        if (a.cluster > 1) piece = part_of<2>(piece, block % 2);
        const int first = piece.begin * a.step_blocks;
        const int count = min(min(piece.end - piece.begin, a.steps) * a.step_blocks, a.k_blocks - first);
        if (count <= 0) continue;
        const int panel = tile_origin(a.schedule, piece.tile).n * a.tile_panels;
        for (int i = panel; i < min(panel + a.tile_panels, a.panels); ++i) {
            bulk_prefetch(a.tiles + (static_cast<int64_t>(i) * a.k_blocks + first) * kBlockBytes, count * kBlockBytes);
        }
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
