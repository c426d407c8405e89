// What linear_sm80.cuh computes on: tiles, their place in shared memory, the problem, and the 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dequant.cuh"
#include "ptx.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm80 {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kWarpsN = 4;
constexpr int kWarpRows = 32, kWarpBlocks = kWarpRows / kBlockRows;  // channels of a warp
constexpr int kChannels = kWarpsN * kWarpRows, kPanels = kChannels / kPanelRows;
constexpr int kSwizzleRow = kPanelColumns * 2;  // bytes of a token in a panel of x

// Tokens        of a block; kWarpTokens of a warp
// WarpsK        warps that take turns along K and add up at the end; the others share out the tokens
// Stages        stages of the ring, of WarpsK panels along K
template <int Tokens, int WarpsK, int Stages>
struct Tile {
    static constexpr int kTokens = Tokens, kWarpsK = WarpsK, kStages = Stages;
    static constexpr int kWarpsM = kWarps / kWarpsN / kWarpsK;
    static constexpr int kWarpTokens = kTokens / kWarpsM, kFragments = kWarpTokens / 8;
    static constexpr int kColumns = kWarpsK * kPanelColumns;
    static constexpr int kSumThreads = kThreads / kWarpsK;        // threads that hold a tile's sums
    static constexpr int kSums = kWarpBlocks * kFragments * 4;    // fp32 sums of each of them
    static constexpr int kPartialBytes = kChannels * kTokens * 4;  // of a piece of a tile in the workspace
    static_assert(kFragments % 2 == 0, "x is read 16 tokens at a time");
};

template <class Tile, int Bits>
struct SharedLayout {
    static constexpr int kWeightBytes = kPanels * Tile::kWarpsK * Tiles<Bits>::kPanelBytes;
    static constexpr int kPanelOfX = Tile::kTokens * kSwizzleRow;
    static constexpr int kStageBytes = kWeightBytes + Tile::kWarpsK * kPanelOfX;
    static constexpr int kRingBytes = Tile::kStages * kStageBytes;
    // After the main loop the ring is free for the sums of the other warps along K, then for y.
    static constexpr int kPitchOfY = kChannels + 8;  // elements; + 8 spreads the tokens over the banks
    static constexpr int kSumBytes = (Tile::kWarpsK - 1) * Tile::kPartialBytes;
    static constexpr int kBytesOfY = Tile::kTokens * kPitchOfY * 2;
    static constexpr int kEpilogueBytes = kSumBytes > kBytesOfY ? kSumBytes : kBytesOfY;
    static constexpr int kBytes = kRingBytes > kEpilogueBytes ? kRingBytes : kEpilogueBytes;
};

struct Problem {
    const uint8_t* tiles;   // [panels_n, panels_k, 512 * bits]
    const uint16_t* x;      // [m, k] fp16 or bf16
    const float* scales;    // [n, groups]
    const void* bias;       // [n] fp32 or x's type, or null
    uint16_t* y;            // [m, n] of x's type
    uint32_t* arrived;      // [grid], 0 between launches: pieces of the cut tile that begins in that block
    float4* partials;       // [grid][2][Tile::kSums / 4][Tile::kSumThreads]
    int m, n, k;
    int panels_n, panels_k;
    int groups, group_size;
    bool bias_is_fp32;
    int tiles_m, steps;     // tiles along the tokens, steps along K of a tile
    // The line of all tiles' steps is cut into a range for each block: range_least steps, and one more for the first
    // range_more blocks.
    int range_least, range_more;
};

// The 16-bit types as the MMA, the epilogue and the host know them.
template <class T>
struct Traits;
template <>
struct Traits<Half> {
    static DS_FP6_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_m16n8k16_f16(d, a, b0, b1);
    }
    static DS_FP6_DEVICE uint16_t round(float v) { return __half_as_ushort(__float2half_rn(v)); }
    static DS_FP6_DEVICE float widen(uint16_t v) { return __half2float(__ushort_as_half(v)); }
};
template <>
struct Traits<BFloat16> {
    static DS_FP6_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_m16n8k16_bf16(d, a, b0, b1);
    }
    static DS_FP6_DEVICE uint16_t round(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
    static DS_FP6_DEVICE float widen(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
};

// A range of a tile's steps, [begin, end).
struct Piece {
    int tile_n, tile_m;
    int begin, end;
};

}  // namespace sm80
}  // namespace cuda
}  // namespace ds_fp6
