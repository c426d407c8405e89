// The warpgroups that multiply: words from shared memory -> weights in registers -> wgmma. While a unit (a 64x64 block of
// weights) is multiplied in four steps of 16 along K, the next one is dequantized, a step after a step.
#pragma once

#include <type_traits>
#include <utility>

#include "dequant.cuh"
#include "linear_sm90_pipeline.cuh"
#include "wgmma_sm90.cuh"

namespace ds_fp6::cuda::sm90 {

// A compile-time index as a value, on the device too.
template <int kValue>
struct Index {
    __host__ __device__ constexpr operator int() const { return kValue; }
};

// body(0), ..., body(kCount - 1) with compile-time indices.
template <class Body, int... kIndex>
__device__ __forceinline__ void unroll(Body body, std::integer_sequence<int, kIndex...>) {
    (body(Index<kIndex>()), ...);
}

template <int kCount, class Body>
__device__ __forceinline__ void unroll(Body body) {
    unroll(body, std::make_integer_sequence<int, kCount>());
}

// How a lane's words of a 16x64 block become operands of Type.
template <class Fmt, class Type>
struct Codes {
    using Dequantize = Dequant<Fmt, std::conditional_t<std::is_same_v<Type, __half>, Half, BFloat16>>;
    using Element = Type;
    static constexpr int kBits = Fmt::kBits;
    static constexpr float kValue = static_cast<float>(1 << Dequantize::kScaleExponent);  // of an operand's 1

    __device__ static void load(uint32_t (&words)[kBits], uint32_t block, int lane) {
        using Block = Tiles<kBits>;
#pragma unroll
        for (int i = 0; i < Block::kVectors16; ++i) {
            const uint4 v = load_shared_16(block + (i * kLanes + lane) * 16);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
        constexpr int kNext = 4 * Block::kVectors16;
        if constexpr (Block::kVector8) {
            const uint2 v = load_shared_8(block + Block::kOffset8 + lane * 8);
            words[kNext] = v.x, words[kNext + 1] = v.y;
        }
        if constexpr (Block::kVector4) {
            words[kNext + (Block::kVector8 ? 2 : 0)] = load_shared_4(block + Block::kOffset4 + lane * 4);
        }
    }

    // a: the operand of one step of 16 along K.
    template <int kStep>
    __device__ static void expand(const uint32_t (&words)[kBits], uint32_t (&a)[4]) {
        Dequantize::template fragment<kStep>(words, a);
    }
};

template <class T, class C>
class Consumer {
public:
    static constexpr int kBits = C::kBits;
    using Element = typename C::Element;
    using Layout = SharedLayout<T, kBits>;
    using Sums = float[T::kOwnPanels][T::kAccumulators];

    __device__ Consumer(const Ring<T, kBits>& ring, int warpgroup, int warp, int lane)
        : ring_(ring), lane_(lane) {
        const int group = warpgroup / T::kSplit, turn = warpgroup % T::kSplit;
        first_panel_ = group * T::kOwnPanels;
        // Unit u: panel first_panel_ + u % kOwnPanels, block of K turn + kSplit * (u / kOwnPanels).
        weights_offset_ = (first_panel_ * T::kBlocks + turn) * Layout::kWeightBlock + warp * 128 * kBits;
        activations_offset_ = turn * Layout::kActivationBlock;
    }

    __device__ int first_panel() const { return first_panel_; }

    // sums = weights . activations over the next `steps` stages of the ring.
    __device__ void multiply(Sums& sums, int steps) {
#pragma unroll
        for (int panel = 0; panel < T::kOwnPanels; ++panel) {
#pragma unroll
            for (int i = 0; i < T::kAccumulators; ++i) sums[panel][i] = 0.f;
        }
        if (steps == 0) return;
        ring_.wait_full(slot_);
        load(words_[0], slot_, 0);
        load(words_[1], slot_, 1);
        unroll<4>([&](auto k) { C::template expand<k>(words_[0], a_[0][k]); });
        for (int step = 1; step < steps; ++step) stage<false>(sums, step > 1);
        stage<true>(sums, steps > 1);
        wgmma_wait<0>();
        ring_.release(previous_, lane_);
    }

private:
    using Slot = typename Ring<T, kBits>::Slot;
    using Weights = uint32_t[4][4];  // [step of 16 along K][register of A]

    // While unit u is multiplied, unit u + 1 is dequantized and the words of unit u + 2 are loaded. On entry the stage's
    // first unit lies in a_[0] and the second one's words in words_[1]; on exit, unless it was the last stage, the
    // next stage's do.
    template <bool kLast>
    __device__ void stage(Sums& sums, bool releases) {
        const Slot current = slot_;
        // NOTE: the compiler takes what a shuffle returns for uniform: a descriptor then costs one move, not five. It
        // forgets if the value is carried over from the previous stage.
        const uint32_t b = __shfl_sync(~0u, (ring_.activations(current.index) + activations_offset_) >> 4, 0);
        slot_.advance();
        unroll<T::kUnits>([&](auto unit) {
            constexpr bool kExpands = unit + 1 < T::kUnits || !kLast, kLoads = unit + 2 < T::kUnits || !kLast;
            constexpr bool kEnters = unit + 2 == T::kUnits && !kLast;  // the next stage
            constexpr int kBlock = unit / T::kOwnPanels * T::kSplit;
            const bool entered = kEnters && ring_.is_full(slot_);
            unroll<2>([&](auto half) {
                constexpr int k = 2 * half;
                multiply_32(sums[unit % T::kOwnPanels], a_[unit % 2][k], a_[unit % 2][k + 1],
                            b + kBlock * (Layout::kActivationBlock / 16) + 2 * k);
                if constexpr (kEnters && half == 1) {
                    if (!entered) ring_.wait_full(slot_);
                }
                if constexpr (kLoads && half == 1) {
                    load(words_[unit % 2], unit + 2 < T::kUnits ? current : slot_, (unit + 2) % T::kUnits);
                }
                // All but the newest two are done: the registers of the previous unit's same half are free, and after
                // the first unit so is the previous stage.
                wgmma_wait<2>();
                if (unit == 0 && half == 1 && releases) ring_.release(previous_, lane_);
                if constexpr (kExpands) {
                    C::template expand<k>(words_[(unit + 1) % 2], a_[(unit + 1) % 2][k]);
                    C::template expand<k + 1>(words_[(unit + 1) % 2], a_[(unit + 1) % 2][k + 1]);
                }
            });
        });
        previous_ = current;
    }

    // Two steps of 16 along K; b: the first one's activations, in 16-byte units.
    __device__ static void multiply_32(float (&sums)[T::kAccumulators], uint32_t (&a0)[4], uint32_t (&a1)[4],
                                       uint32_t b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pin(a0[i]), pin(a1[i]);
        wgmma_fence();
        Wgmma<Element, T::kTokens>::issue(sums, a0, wgmma_descriptor(b), 1);
        Wgmma<Element, T::kTokens>::issue(sums, a1, wgmma_descriptor(b + 2), 1);
        wgmma_commit();
    }

    __device__ void load(uint32_t (&words)[kBits], Slot slot, int unit) const {
        const int block = unit % T::kOwnPanels * T::kBlocks + unit / T::kOwnPanels * T::kSplit;
        C::load(words, ring_.weights(slot.index) + weights_offset_ + block * Layout::kWeightBlock, lane_);
    }

    const Ring<T, kBits>& ring_;
    int lane_;
    int first_panel_;
    uint32_t weights_offset_, activations_offset_;
    Slot slot_, previous_;
    uint32_t words_[2][kBits];  // of a unit with even number, with odd number
    Weights a_[2];
};

}  // namespace ds_fp6::cuda::sm90
