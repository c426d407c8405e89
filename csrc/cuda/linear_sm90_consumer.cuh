// The warpgroups that multiply: words from shared memory -> weights in registers -> wgmma. While a unit (a 64x64 block of
// weights) is multiplied in steps of 16 along K, the next one is dequantized and the words of the one after it are loaded.
#pragma once

#include <type_traits>
#include <utility>

#include "dequant.cuh"
#include "linear_sm90_pipeline.cuh"
#include "wgmma_sm90.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

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

// How a lane's words of a 16x64 block become operands of type T: Half or BFloat16, the activations' in shared memory.
template <class Fmt, class T>
struct Codes {
    using Operand = T;
    using Dequantize = Dequant<Fmt, T>;
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

// Scales of groups along K: a unit is summed on its own, then added with its two channels' scales.
template <class T>
struct GroupedSums {
    const float* row[T::kOwnPanels][2];  // scales of the two channels of a thread in each panel
    uint32_t blocks_inverse;             // ceil(2^31 / blocks of a group)
    uint32_t last_group;
    float scale[2];                      // of the unit, for both channels
    float part[T::kSums];                // of the unit

    __device__ void start(const Problem& p, int first_channel) {
        blocks_inverse = (0x80000000u + p.group_blocks - 1) / p.group_blocks;
        last_group = p.groups - 1;
#pragma unroll
        for (int i = 0; i < 2 * T::kOwnPanels; ++i) {
            const int n = min(first_channel + i / 2 * 64 + i % 2 * 8, p.n - 1);
            row[i / 2][i % 2] = p.scales + static_cast<int64_t>(n) * p.groups;
        }
    }

    template <int kUnit>
    __device__ void load_scale(int block) {
        // A stage may end past K, where the sums are zeros.
        const uint32_t group = min(__umulhi(2 * block, blocks_inverse), last_group);
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[i] = __ldg(row[kUnit % T::kOwnPanels][i] + group);
    }

    template <int kUnit>
    __device__ void add(float (&sums)[T::kOwnPanels][T::kSums]) {
#pragma unroll
        for (int i = 0; i < T::kSums; ++i) {
            sums[kUnit % T::kOwnPanels][i] += part[i] * scale[i / 2 % 2];
        }
    }
};

struct NotGrouped {};

template <class T, class C, bool kGrouped>
class Consumer {
public:
    static constexpr int kBits = C::kBits;
    using Layout = SharedLayout<T, kBits>;
    using Sums = float[T::kOwnPanels][T::kSums];

    __device__ Consumer(const Problem& p, const Ring<T, kBits>& ring, int warpgroup, int warp, int lane)
        : p_(p), ring_(ring), lane_(lane) {
        const int group = warpgroup / T::kSplit;
        turn_ = warpgroup % T::kSplit;
        channel_ = group * T::kOwnPanels * 64 + warp * 16 + lane / 4;
        // Unit u: panel u % kOwnPanels of this consumer's, block of K turn + kSplit * (u / kOwnPanels).
        weights_offset_ = (group * T::kOwnPanels * T::kBlocks + turn_) * Layout::kWeightBlock + warp * 128 * kBits;
        activations_offset_ = turn_ * Layout::kActivationBlock;
    }

    // sums = weights . activations over a block's part of a piece: the next stages of the ring.
    __device__ void multiply(Sums& sums, const Piece& own) {
        unroll<T::kOwnPanels>([&](auto panel) {
#pragma unroll
            for (int i = 0; i < T::kSums; ++i) sums[panel][i] = 0.f;
        });
        if (own.begin == own.end) return;
        if constexpr (kGrouped) {
            grouped_.start(p_, tile_origin(p_.schedule, own.tile).n * T::kPanels * 64 + channel_);
        }
        ring_.wait_full(slot_);
        load(words_[0], slot_, 0);
        load(words_[1], slot_, 1);
        unroll<4>([&](auto k) { C::template expand<k>(words_[0], a_[0][k]); });
        for (int step = own.begin; step < own.end - 1; ++step) {
            stage<false>(sums, step, step != own.begin);
        }
        stage<true>(sums, own.end - 1, own.end - 1 != own.begin);
        wgmma_wait<0>();
        ring_.release(previous_, lane_);
    }

private:
    using Slot = typename Ring<T, kBits>::Slot;
    using Weights = uint32_t[4][4];  // [step of 16 along K][register of A]

    // On entry the stage's first unit lies in a_[0] and the second one's words in words_[1]; on exit, unless it was the
    // last stage, the next stage's do.
    template <bool kLast>
    __device__ void stage(Sums& sums, int step, bool has_previous) {
        const Slot current = slot_;
        // NOTE: the compiler takes what a shuffle returns for uniform: a descriptor then costs one move, not five. It
        // forgets if the value is carried over from the previous stage.
        const uint32_t b = __shfl_sync(~0u, (ring_.activations(current.index) + activations_offset_) >> 4, 0);
        slot_.advance();
        unroll<T::kUnits>([&](auto unit) {
            if constexpr (kGrouped) grouped_.template load_scale<unit>(block_of(step, unit));
            constexpr bool kExpands = unit + 1 < T::kUnits || !kLast, kLoads = unit + 2 < T::kUnits || !kLast;
            constexpr bool kEnters = unit + 2 == T::kUnits && !kLast;  // the next stage
            constexpr int kBlock = unit / T::kOwnPanels * T::kSplit;
            const bool entered = kEnters && ring_.is_full(slot_);
            unroll<2>([&](auto half) {
                constexpr int k = 2 * half;
                multiply_32(target(sums, unit), a_[unit % 2][k], a_[unit % 2][k + 1],
                            b + kBlock * (Layout::kActivationBlock / 16) + 2 * k, !kGrouped || half != 0);
                if constexpr (kEnters && half == 1) {
                    if (!entered) ring_.wait_full(slot_);
                }
                if constexpr (kLoads && half == 1) {
                    load(words_[unit % 2], unit + 2 < T::kUnits ? current : slot_, (unit + 2) % T::kUnits);
                }
                // All but the newest two are done: the registers of the previous unit's same half are free, and after
                // the first unit so is the previous stage.
                wgmma_wait<2>();
                if (unit == 0 && half == 1 && has_previous) ring_.release(previous_, lane_);
                if constexpr (kExpands) {
                    C::template expand<k>(words_[(unit + 1) % 2], a_[(unit + 1) % 2][k]);
                    C::template expand<k + 1>(words_[(unit + 1) % 2], a_[(unit + 1) % 2][k + 1]);
                }
            });
            if constexpr (kGrouped) {
                wgmma_wait<0>();
                grouped_.template add<unit>(sums);
            }
        });
        previous_ = current;
    }

    template <class Unit>
    __device__ float (&target(Sums& sums, Unit unit))[T::kSums] {
        if constexpr (kGrouped) return grouped_.part;
        else return sums[unit % T::kOwnPanels];
    }

    // Two steps of 16 along K; b: the first one's activations, in 16-byte units.
    __device__ static void multiply_32(float (&sums)[T::kSums], uint32_t (&a0)[4], uint32_t (&a1)[4], uint32_t b,
                                       bool adds) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pin(a0[i]), pin(a1[i]);
        wgmma_fence();
        using Operand = typename C::Operand;
        Wgmma<T::kTokens>::template issue<Operand>(sums, a0, wgmma_descriptor(b), adds);
        Wgmma<T::kTokens>::template issue<Operand>(sums, a1, wgmma_descriptor(b + 2), 1);
        wgmma_commit();
    }

    // Of K, in blocks of 64.
    __device__ int block_of(int step, int unit) const {
        return step * T::kBlocks + turn_ + unit / T::kOwnPanels * T::kSplit;
    }

    __device__ void load(uint32_t (&words)[kBits], Slot slot, int unit) const {
        const int block = unit % T::kOwnPanels * T::kBlocks + unit / T::kOwnPanels * T::kSplit;
        C::load(words, ring_.weights(slot.index) + weights_offset_ + block * Layout::kWeightBlock, lane_);
    }

    const Problem& p_;
    const Ring<T, kBits>& ring_;
    int lane_, turn_, channel_;
    uint32_t weights_offset_, activations_offset_;
    Slot slot_, previous_;
    uint32_t words_[2][kBits];  // of a unit with even number, with odd number
    Weights a_[2];
    std::conditional_t<kGrouped, GroupedSums<T>, NotGrouped> grouped_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
