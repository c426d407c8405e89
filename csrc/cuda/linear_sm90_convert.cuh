// The warps that make fp16 of activations in bf16 in the ring, in place, between the copy of a stage and the consumers.
//
// A token is scaled as its first stage needs it, with room for eight times as much. A later stage that exceeds it changes
// the scale: consumers then multiply the token's sums by the ratio before they go on. At the end of a piece they multiply
// them by the inverse of its last scale, so that pieces can be added up.
#pragma once

#include "linear_sm90_pipeline.cuh"
#include "linear_sm90_token_scale.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// By how much less sums are at the end of a piece, so that those of the largest activations do not overflow: as much as
// weights that become bf16 are smaller (dequant.cuh).
constexpr float kSumRoom = 256;

// A token's scale while a warp converts one stage of it after the other.
struct RunningScale {
    static constexpr int kHeadroom = 3;

    TokenScale scale;
    uint32_t limit;  // the largest magnitude that fits, in both halves

    __device__ void set(uint32_t largest) {
        scale.set(largest, kHeadroom);
        limit = (min((scale_exponent(largest) + kHeadroom + 1) << 7, 0x8000u) - 1) * 0x00010001u;
    }
};

// converter: of T::kConverters warps, which share out the tokens. A token's row of a block is 128 bytes, in whatever order
// the swizzle has its vectors.
template <class T, int kBits>
__device__ inline void convert_stages(const Problem& p, const Ring<T, kBits>& ring, int worker, int rank, int converter,
                                      int lane) {
    using Layout = SharedLayout<T, kBits>;
    constexpr int kLanesOfToken = 8 * T::kBlocks, kAtOnce = 32 / kLanesOfToken;  // tokens
    constexpr int kStride = kAtOnce * T::kConverters, kTurns = T::kTokens / kStride;
    static_assert(32 % kLanesOfToken == 0 && kTurns * kStride == T::kTokens && T::kConverters <= 4, "even shares");
    const int inside = lane % kLanesOfToken, first_token = converter * kAtOnce + lane / kLanesOfToken;
    const uint32_t offset = inside / 8 * Layout::kActivationBlock + inside % 8 * 16 + first_token * 128;

    RunningScale running[kTurns];
    typename Ring<T, kBits>::Slot slot;
    PieceWalk walk(p.schedule, worker);
    for (Piece piece; walk.next(piece);) {
        const Piece own = part_of<T::kClusterK>(piece, rank);
        for (int step = own.begin; step < own.end; ++step, slot.advance()) {
            const uint32_t vectors = ring.activations(slot.index) + offset;
            ring.wait_landed(slot);
            uint4 v[kTurns];
            bool fits = step != own.begin;
#pragma unroll
            for (int i = 0; i < kTurns; ++i) v[i] = load_shared_16(vectors + i * kStride * 128);
#pragma unroll
            for (int i = 0; i < kTurns; ++i) fits &= largest_of(v[i], running[i].limit) == running[i].limit;
            const bool changes = !warp_all(fits);
            float ratio[kTurns];
#pragma unroll
            for (int i = 0; i < kTurns; ++i) ratio[i] = 1.f;
            if (changes) {
#pragma unroll
                for (int i = 0; i < kTurns; ++i) {
                    const uint32_t largest = lanes_largest<kLanesOfToken>(larger_half(largest_of(v[i], 0)), lane);
                    if (step != own.begin && largest >> 16 <= running[i].limit >> 16) continue;
                    const float before = running[i].scale.inverse();
                    running[i].set(largest);
                    ratio[i] = running[i].scale.factor * before;
                }
            }
            if (lane == 0) store_shared_4(ring.rescales(slot.index) + converter * 4, changes);
#pragma unroll
            for (int i = 0; i < kTurns; ++i) {
                store_shared_16(vectors + i * kStride * 128, to_f16(v[i], running[i].scale.factor));
                const int token = (first_token + i * kStride) * 4;  // NOTE: also where another warp's tokens change
                if (inside == 0) store_shared_4(ring.ratios(slot.index) + token, __float_as_uint(ratio[i]));
                if (inside == 0 && step == own.end - 1) {
                    const float inverse = running[i].scale.inverse() / kSumRoom;
                    store_shared_4(ring.inverses(slot.index) + token, __float_as_uint(inverse));
                }
            }
            async_proxy_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(ring.full(slot.index));
        }
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
