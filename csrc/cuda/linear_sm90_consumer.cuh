// The warpgroups that multiply: words from shared memory -> weights in registers -> wgmma, one unit (a 64x64 block of
// weights) being dequantized while the one before it is multiplied.
#pragma once

#include "linear_sm90_pipeline.cuh"
#include "wgmma_sm90.cuh"

namespace ds_fp6::sm90 {

// Codes: the dequantization of one format, `expand(words, a)` with words [bits] of a lane and a [4 steps of 16][4].
template <class T, class Codes>
class Consumer {
public:
    static constexpr int kBits = Codes::kBits;
    using Element = typename Codes::Element;
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
        ring_.wait_full(slot_);
        prepare(a_[0], slot_, 0);
        for (int step = 1; step < steps; ++step) stage<false>(sums, step > 1);
        stage<true>(sums, steps > 1);
        wgmma_wait<0>();
        ring_.release(previous_, lane_);
    }

private:
    // On entry the stage's first unit lies in a_[0]; on exit, unless it was the last stage, the next stage's.
    template <bool kLast>
    __device__ void stage(Sums& sums, bool releases) {
        const Slot current = slot_;
        slot_.advance();
#pragma unroll
        for (int unit = 0; unit < T::kUnits; ++unit) {
            constexpr int kEnd = T::kUnits - 1;
            issue(sums[unit % T::kOwnPanels], a_[unit % 2], current, unit);
            uint32_t words[kBits];
            if (unit < kEnd) {
                load(words, current, unit + 1);
            } else if (!kLast) {
                ring_.wait_full(slot_);
                load(words, slot_, 0);
            }
            // The unit before this one is done: its registers are free, and after a stage's first unit so is the
            // previous stage.
            wgmma_wait<1>();
            if (unit == 0 && releases) ring_.release(previous_, lane_);
            if (unit < kEnd || !kLast) Codes::expand(words, a_[(unit + 1) % 2]);
        }
        previous_ = current;
    }

    using Slot = typename Ring<T, kBits>::Slot;
    using Weights = uint32_t[4][4];

    __device__ void issue(float (&sums)[T::kAccumulators], Weights& a, Slot slot, int unit) {
#pragma unroll
        for (int i = 0; i < 16; ++i) pin(a[i / 4][i % 4]);
        const uint64_t b = wgmma_descriptor(ring_.activations(slot.index) + activations_offset_ +
                                            unit / T::kOwnPanels * T::kSplit * Layout::kActivationBlock);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<Element, T::kTokens>::issue(sums, a[k], b + 2 * k, 1);
        wgmma_commit();
    }

    __device__ void load(uint32_t (&words)[kBits], Slot slot, int unit) const {
        const int block = unit % T::kOwnPanels * T::kBlocks + unit / T::kOwnPanels * T::kSplit;
        Codes::load(words, ring_.weights(slot.index) + weights_offset_ + block * Layout::kWeightBlock, lane_);
    }

    __device__ void prepare(Weights& a, Slot slot, int unit) const {
        uint32_t words[kBits];
        load(words, slot, unit);
        Codes::expand(words, a);
    }

    const Ring<T, kBits>& ring_;
    int lane_;
    int first_panel_;
    uint32_t weights_offset_, activations_offset_;
    Slot slot_, previous_;
    Weights a_[2];
};

}  // namespace ds_fp6::sm90
