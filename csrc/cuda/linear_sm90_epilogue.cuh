// From fp32 sums in registers to y: scales, bias, store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "gate.cuh"
#include "linear_sm90_consumer.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

__device__ inline uint32_t pack_pair(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T, class C, bool kGrouped>
class Epilogue {
public:
    static constexpr int kBits = C::kBits;
    using Layout = SharedLayout<T, kBits>;
    using Element = std::conditional_t<std::is_same_v<typename C::Operand, Half>, __half, __nv_bfloat16>;  // of y
    using OwnSums = float[T::kOwnPanels][T::kOwnSums];

    __device__ Epilogue(const Problem& p, const Ring<T, kBits>& ring, int rank, int warpgroup, int thread)
        : p_(p), rank_(rank), group_(warpgroup / T::kSplit), thread_(thread) {
        staging_ = ring.base + Layout::kStagings + group_ * Layout::kStaging;
    }

    // Where the tile's part of this consumer begins; scale and bias, as they lie in memory, of the two channels of each
    // panel that a thread holds sums of.
    struct Terms {
        int channel, token;
        float scale[T::kOwnPanels][2];
        uint32_t bias[T::kOwnPanels][2];
    };

    // Ahead of the multiplication, so that it hides the loads; nothing here may use what they return.
    __device__ Terms load_terms(const Piece& piece) const {
        Terms terms{};
        if (piece.begin != 0) return terms;
        const TileOrigin origin = tile_origin(p_.schedule, piece.tile);
        terms.channel = (origin.n * T::kPanels + group_ * T::kOwnPanels) * 64;
        terms.token = origin.m * T::kTokens + rank_ * T::kOwnTokens;
        keep(terms.channel), keep(terms.token);
        const int first = terms.channel + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2 * T::kOwnPanels; ++i) {
            const int n = first + i / 2 * 64 + i % 2 * 8;
            if (n >= p_.n) continue;
            terms.scale[i / 2][i % 2] = kGrouped ? 1.f : p_.scales[n];
            if (p_.bias_is_fp32) terms.bias[i / 2][i % 2] = static_cast<const uint32_t*>(p_.bias)[n];
            else if (p_.bias) terms.bias[i / 2][i % 2] = static_cast<const uint16_t*>(p_.bias)[n];
        }
        return terms;
    }

    // y = sums * scale (+ bias), rounded once.
    __device__ void store(const OwnSums& sums, const Terms& terms) const {
#pragma unroll
        for (int panel = 0; panel < T::kOwnPanels; ++panel) store_panel(sums[panel], terms, panel);
    }

private:
    static constexpr int kFirstGroupBarrier = 2;
    // Whether each warp copies the 16 channels that it staged, 32 bytes a token, instead of 128 bytes with the others,
    // whom it would wait for: worth it where there is little to copy.
    static constexpr bool kWarpCopies = T::kOwnTokens <= 32;

    // What is kept in a register is not computed again at the end, where it would be waited for.
    __device__ static void keep(int& value) { asm volatile("" : "+r"(value)); }

    __device__ float bias_value(uint32_t bits) const {
        if (p_.bias_is_fp32) return __uint_as_float(bits);
        const uint16_t half = static_cast<uint16_t>(bits);
        return to_float(reinterpret_cast<const Element&>(half));
    }

    __device__ void sync() const { named_sync(kFirstGroupBarrier + group_, 128); }

    // Between staging and copying.
    __device__ void sync_staging() const {
        if constexpr (kWarpCopies) __syncwarp();
        else sync();
    }

    // What a thread copies of each sixteen tokens that are staged: a token's 16 bytes. The order of the tokens is that
    // in which the swizzle leaves no two of eight neighbouring lanes the same banks.
    __device__ int copied_row() const {
        if constexpr (!kWarpCopies) return thread_ / 8;
        const int i = thread_ % 32 / 2;
        return i / 8 * 8 + i % 4 * 2 + i / 4 % 2;
    }
    __device__ int copied_chunk() const { return kWarpCopies ? thread_ / 32 * 2 + thread_ % 2 : thread_ % 8; }

    // 64 channels, kOwnTokens tokens: transposed through shared memory, up to 64 tokens at a time, 128 bytes a token
    // whose 16-byte chunks are swizzled by the token.
    __device__ void store_panel(const float (&sums)[T::kOwnSums], const Terms& terms, int panel) const {
        const int channel = terms.channel + panel * 64, token = terms.token;
        const float scale[2] = {C::kValue * terms.scale[panel][0], C::kValue * terms.scale[panel][1]};
        const float bias[2] = {bias_value(terms.bias[panel][0]), bias_value(terms.bias[panel][1])};
        const int warp = thread_ / 32, lane = thread_ % 32;
#pragma unroll
        for (int first = 0; first < T::kOwnTokens; first += Layout::kStagedTokens) {
            if (token + first >= p_.m) break;
            sync_staging();
#pragma unroll
            for (int t = 0; t < Layout::kStagedTokens; t += 16) {
                uint32_t q[4] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (t + 8 * (i / 2) >= Layout::kStagedTokens) continue;
                    const int h = i % 2, at = 4 * ((first + t) / 8 + i / 2) + 2 * h;
                    q[i] = pack_pair(sums[at] * scale[h] + bias[h], sums[at + 1] * scale[h] + bias[h], Element());
                }
                const int row = t + lane % 8 + (Layout::kStagedTokens >= 16 ? lane / 16 * 8 : 0);
                const int chunk = 2 * warp + lane / 8 % 2;
                const uint32_t address = staging_ + row * 128 + ((chunk ^ (row % 8)) * 16);
                if constexpr (Layout::kStagedTokens >= 16) {
                    store_matrix_transposed_4(address, q[0], q[1], q[2], q[3]);
                } else {
                    store_matrix_transposed_2(address, q[0], q[1]);
                }
            }
            sync_staging();
            if (p_.gate == Gate::kNone) {
                copy_staged(channel, token + first);
            } else {
                with_gate(p_.gate, [&](auto gate) { copy_gated<decltype(gate)::value>(channel, token + first); });
            }
        }
    }

    __device__ void copy_staged(int channel, int token) const {
        const int chunk = copied_chunk(), n = channel + 8 * chunk;
        uint16_t* y = static_cast<uint16_t*>(p_.y);
#pragma unroll
        for (int row = 0; row < Layout::kStagedTokens; row += 16) {
            const int inside = row + copied_row(), m = token + inside;
            if (inside >= Layout::kStagedTokens || m >= p_.m || n >= p_.n) continue;
            const uint4 v = load_shared_16(staging_ + inside * 128 + ((chunk ^ (inside % 8)) * 16));
            uint16_t* target = y + static_cast<int64_t>(m) * p_.n + n;
            if (p_.n % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = v;
            } else {
                const uint16_t* values = reinterpret_cast<const uint16_t*>(&v);
                for (int i = 0; i < 8 && n + i < p_.n; ++i) target[i] = values[i];
            }
        }
    }

    // Eight staged channels become four of y.
    template <Gate kGate>
    __device__ void copy_gated(int channel, int token) const {
        const int chunk = copied_chunk(), n = (channel + 8 * chunk) / 2, channels = p_.n / 2;
        uint16_t* y = static_cast<uint16_t*>(p_.y);
#pragma unroll
        for (int row = 0; row < Layout::kStagedTokens; row += 16) {
            const int inside = row + copied_row(), m = token + inside;
            if (inside >= Layout::kStagedTokens || m >= p_.m || n >= channels) continue;
            const uint4 v = load_shared_16(staging_ + inside * 128 + ((chunk ^ (inside % 8)) * 16));
            const uint2 out = make_uint2(gated_pair<kGate>(v.x, v.y), gated_pair<kGate>(v.z, v.w));
            uint16_t* target = y + static_cast<int64_t>(m) * channels + n;
            if (channels % 4 == 0) {
                *reinterpret_cast<uint2*>(target) = out;
            } else {
                const uint16_t* values = reinterpret_cast<const uint16_t*>(&out);
                for (int i = 0; i < 4 && n + i < channels; ++i) target[i] = values[i];
            }
        }
    }

    // Two (gate, up) pairs to two channels.
    template <Gate kGate>
    __device__ uint32_t gated_pair(uint32_t first, uint32_t second) const {
        const Element* a = reinterpret_cast<const Element*>(&first);
        const Element* b = reinterpret_cast<const Element*>(&second);
        return pack_pair(gated<kGate>(to_float(a[0]), to_float(a[1])), gated<kGate>(to_float(b[0]), to_float(b[1])),
                         Element());
    }

    const Problem& p_;
    int rank_, group_, thread_;
    uint32_t staging_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
