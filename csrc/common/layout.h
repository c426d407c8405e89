// The "tiles" layout, in which GPUs keep packed weights: codes in the order in which the threads of an MMA consume them.
//
// Block: 16 (N) x 64 (K) weights, 128 * bits bytes. Lane l of a warp owns the 32 weights that it holds of the A
//   operand of four mma.m16n8k16 (or, warp by warp, of four wgmma k16 steps): exactly `bits` 32-bit words, no padding.
//   The words are stored as 16-byte vectors of all lanes, then 8-byte, then 4-byte ones, so that a warp's loads are
//   contiguous and free of bank conflicts: 8 words = 16 B + 16 B, 7 = 16 + 8 + 4, 6 = 16 + 8, 5 = 16 + 4, 3 = 8 + 4.
// Panel: 64 x 64 weights, four blocks one below the other, 512 * bits bytes.
// Matrix [N, K]: panels [ceil(N / 64)][ceil(K / 64)], row-major; codes beyond N or K are 0.
//
// Where a code's bits lie in its lane's words: bit_map.h.
#pragma once

#include <cstdint>

#include "format.h"

#if defined(__CUDACC__)
#define DS_FP6_HD __host__ __device__ __forceinline__
#else
#define DS_FP6_HD inline
#endif

namespace ds_fp6 {

constexpr int kLanes = 32;
constexpr int kBlockRows = 16, kBlockColumns = 64;
constexpr int kPanelRows = 64, kPanelColumns = 64;
constexpr int kPanelBlocks = kPanelRows / kBlockRows;
// k16 steps of a block, registers of an A fragment in each, and both: pairs of weights (32-bit registers) of a lane.
constexpr int kSteps = 4, kStepPairs = 4, kPairs = kSteps * kStepPairs;

template <int Bits>
struct Tiles {
    static_assert(3 <= Bits && Bits <= 8, "3 to 8 bits");

    static constexpr int kWords = Bits;  // of 32 bits, per lane and block: exactly `Bits` bits a weight
    static constexpr int kBlockBytes = kBlockRows * kBlockColumns * Bits / 8;
    static constexpr int kPanelBytes = kPanelRows * kPanelColumns * Bits / 8;

    // Vectors of 16 bytes a lane, then at most one of 8 bytes and one of 4, with their offsets in the block.
    static constexpr int kVectors16 = Bits / 4;
    static constexpr bool kVector8 = (Bits & 2) != 0, kVector4 = (Bits & 1) != 0;
    static constexpr int kOffset8 = kVectors16 * kLanes * 16;
    static constexpr int kOffset4 = kOffset8 + (kVector8 ? kLanes * 8 : 0);

    // Byte offset in the block of a lane's word.
    static DS_FP6_HD constexpr int word_offset(int lane, int word) {
        return word < 4 * kVectors16               ? word / 4 * kLanes * 16 + lane * 16 + word % 4 * 4
               : kVector8 && word < 4 * kVectors16 + 2 ? kOffset8 + lane * 8 + word % 2 * 4
                                                       : kOffset4 + lane * 4;
    }

    static_assert(kBlockBytes == kLanes * kWords * 4, "a lane's words are all there is in a block");
    static_assert(kPanelBytes == kPanelBlocks * kBlockBytes, "blocks fill a panel");
    static_assert(kOffset4 + (kVector4 ? kLanes * 4 : 0) == kBlockBytes, "vectors fill a block");
    static_assert(kBlockBytes % 128 == 0, "blocks are aligned for 16-byte and bulk copies");
};

// Which weight of a 16 x 64 block is in a lane's pair: column `pair_column` is in the low half, the next in the high one.
DS_FP6_HD constexpr int pair_row(int lane, int pair) { return lane / 4 + pair % 2 * 8; }
DS_FP6_HD constexpr int pair_column(int lane, int pair) {
    return pair / kStepPairs * 16 + pair % kStepPairs / 2 * 8 + lane % 4 * 2;
}

}  // namespace ds_fp6
