// Kernels between dense weights and tiles. A warp works on 16 x 64 blocks, whose words it keeps in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pack.cuh"
#include "quantize.h"

namespace ds_fp6 {
namespace cuda {
namespace tiles {

// ---- dense elements ----

// widen, round: to and from fp32. larger: the larger magnitudes of a word's elements and of those in `largest`, where
// NaN is larger than all; magnitude: the largest of `largest` as fp32 bits.
template <Dtype D>
struct Element;
template <>
struct Element<Dtype::kFloat32> {
    using Type = float;
    static DS_FP6_DEVICE float widen(float v) { return v; }
    static DS_FP6_DEVICE float round(float v) { return v; }
    static DS_FP6_DEVICE uint32_t word(float v) { return __float_as_uint(v); }
    static DS_FP6_DEVICE uint32_t larger(uint32_t largest, uint32_t word) { return max(largest, word & 0x7FFFFFFFu); }
    static DS_FP6_DEVICE uint32_t magnitude(uint32_t largest) { return largest; }
};
template <>
struct Element<Dtype::kFloat16> {
    using Type = __half;
    static DS_FP6_DEVICE float widen(__half v) { return __half2float(v); }
    static DS_FP6_DEVICE __half round(float v) { return __float2half_rn(v); }
    static DS_FP6_DEVICE uint32_t word(__half v) { return __half_as_ushort(v); }
    static DS_FP6_DEVICE uint32_t larger(uint32_t largest, uint32_t word) {
        return ptx::max_f16x2(largest, word & 0x7FFF7FFFu);
    }
    static DS_FP6_DEVICE uint32_t magnitude(uint32_t largest) {
        const uint16_t low = largest & 0xFFFF, high = largest >> 16;
        return __float_as_uint(__half2float(__ushort_as_half(max(low, high))));
    }
};
template <>
struct Element<Dtype::kBFloat16> {
    using Type = __nv_bfloat16;
    static DS_FP6_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
    static DS_FP6_DEVICE __nv_bfloat16 round(float v) { return __float2bfloat16_rn(v); }
    static DS_FP6_DEVICE uint32_t word(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
    static DS_FP6_DEVICE uint32_t larger(uint32_t largest, uint32_t word) {
        return ptx::max_bf16x2(largest, word & 0x7FFF7FFFu);
    }
    static DS_FP6_DEVICE uint32_t magnitude(uint32_t largest) { return max(largest & 0xFFFF, largest >> 16) << 16; }
};

// Two neighbours in one access.
template <class Type>
struct alignas(2 * sizeof(Type)) Two {
    Type low, high;
};

// ---- rounding ----

// 2^kMaxExponent * (2 - 2^-M)
template <class Fmt>
DS_FP6_HD constexpr float largest_value() {
    return static_cast<float>(1u << Fmt::kMaxExponent) * (2.0f - 1.0f / (1u << Fmt::kMantissaBits));
}

// Bits whose upper ones, from bit 23 - M on, are the code, without its sign, of the value nearest to |t|: ties away from
// zero, saturating.
//
// |t| times a power of two, so that fp32's smallest normal number is the format's: exponents, subnormals and mantissas are
// then the format's, with more mantissa behind. Toward zero where fp32 has too few bits, which leaves what is under a half
// under it. Adding half a unit rounds; a carry moves into the exponent by itself.
template <class Fmt>
DS_FP6_DEVICE uint32_t rounded_magnitude(float t) {
    constexpr uint32_t half = 1u << (22 - Fmt::kMantissaBits);
    constexpr int exponent = -126 - Fmt::kMinExponent;  // of the factor: below -126 a subnormal number
    constexpr uint32_t factor = exponent >= -126 ? uint32_t(127 + exponent) << 23 : 1u << (149 + exponent);
    return __float_as_uint(__fmul_rz(fminf(fabsf(t), largest_value<Fmt>()), __uint_as_float(factor))) + half;
}

// bits, `places` to the right or, below 0, to the left.
template <int places>
DS_FP6_DEVICE uint32_t shifted(uint32_t bits) {
    if constexpr (places >= 0) return bits >> places;
    else return bits << -places;
}

// The pair (pack.cuh) of the codes nearest to t0 and t1. A zero has no sign.
template <class Fmt, class T>
DS_FP6_DEVICE uint32_t encode_pair(float t0, float t1) {
    constexpr int down = 23 - Fmt::kMantissaBits - BitMapOf<Fmt, T>::kShift;
    constexpr uint32_t magnitude = ((1u << (Fmt::kBits - 1)) - 1) << BitMapOf<Fmt, T>::kShift;
    const uint32_t low = shifted<down>(rounded_magnitude<Fmt>(t0)) & magnitude;
    const uint32_t pair = low | (shifted<down - 16>(rounded_magnitude<Fmt>(t1)) & magnitude << 16);
    const uint32_t signs = __float_as_uint(t0) >> 16 | (__float_as_uint(t1) & 0xFFFF0000u);
    const uint32_t not_zero = pair + 0x7FFF7FFFu;  // bit 15 of each half
    return pair | (signs & not_zero & 0x80008000u);
}

template <class Fmt>
DS_FP6_DEVICE float scale_of(uint32_t largest) {
    constexpr float smallest = 1.17549435e-38f;  // 2^-126: scales stay out of fp32's subnormals
    return largest == 0 ? 1.0f : fmaxf(__fdiv_rn(__uint_as_float(largest), largest_value<Fmt>()), smallest);
}

// w / scale as IEEE rounds it, from the rounded reciprocal: two corrections of the quotient by its exact remainder
// (Markstein). Exact while nothing on the way leaves fp32's range: where scale_divides_fast, and for |w| below 2^60.
// Smaller remainders than fp32 holds belong to quotients that round to zero anyway.
DS_FP6_DEVICE float divide_fast(float w, float scale, float reciprocal) {
    const float first = w * reciprocal;
    const float second = __fmaf_rn(__fmaf_rn(-first, scale, w), reciprocal, first);
    return __fmaf_rn(__fmaf_rn(-second, scale, w), reciprocal, second);
}
DS_FP6_DEVICE bool divides_fast(float scale, uint32_t largest) {
    constexpr float limit = 1152921504606846976.0f;  // 2^60
    return scale >= 1.0f / limit && scale <= limit && __uint_as_float(largest) <= limit;
}

// ---- a block of tiles ----

template <int Bits>
DS_FP6_DEVICE void store_words(uint8_t* block, int lane, const uint32_t (&words)[Bits]) {
    using Layout = Tiles<Bits>;
#pragma unroll
    for (int i = 0; i < Layout::kVectors16; ++i)
        *reinterpret_cast<uint4*>(block + i * kLanes * 16 + lane * 16) =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    if constexpr (Layout::kVector8)
        *reinterpret_cast<uint2*>(block + Layout::kOffset8 + lane * 8) =
            make_uint2(words[4 * Layout::kVectors16], words[4 * Layout::kVectors16 + 1]);
    if constexpr (Layout::kVector4)
        *reinterpret_cast<uint32_t*>(block + Layout::kOffset4 + lane * 4) = words[Bits - 1];
}

template <int Bits>
DS_FP6_DEVICE void load_words(const uint8_t* block, int lane, uint32_t (&words)[Bits]) {
#pragma unroll
    for (int i = 0; i < Bits; ++i)
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(block + Tiles<Bits>::word_offset(lane, i)));
}

// The block that holds rows 16 * strip ... and columns 64 * panel ...
template <int Bits>
DS_FP6_DEVICE size_t block_offset(int strip, int panel, int panels) {
    return (static_cast<size_t>(strip / kPanelBlocks) * panels + panel) * Tiles<Bits>::kPanelBytes +
           strip % kPanelBlocks * Tiles<Bits>::kBlockBytes;
}

DS_FP6_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- quantize: a block works on 16 rows, first for their scales, then, out of the cache, for their codes ----

constexpr int kQuantizeWarps = 16;
static_assert(kQuantizeWarps == kBlockRows, "a warp finds the scales of a row");

// Largest magnitude, as fp32 bits, of row[begin, end), of which `lanes` lanes each take a share; 0x7F800000 or more for
// NaN and infinity.
template <Dtype D>
DS_FP6_DEVICE uint32_t largest_magnitude(const typename Element<D>::Type* row, int begin, int end, int lane,
                                         int lanes) {
    constexpr int kVector = 16 / sizeof(typename Element<D>::Type), kUnroll = 4;
    uint32_t largest = 0;
    int at = begin;
    if (reinterpret_cast<uintptr_t>(row + begin) % 16 == 0) {
        for (; at + kUnroll * lanes * kVector <= end; at += kUnroll * lanes * kVector) {
            uint4 v[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) v[i] = __ldg(reinterpret_cast<const uint4*>(row + at) + i * lanes + lane);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                largest = Element<D>::larger(largest, v[i].x), largest = Element<D>::larger(largest, v[i].y);
                largest = Element<D>::larger(largest, v[i].z), largest = Element<D>::larger(largest, v[i].w);
            }
        }
    }
    for (int i = at + lane; i < end; i += lanes) largest = Element<D>::larger(largest, Element<D>::word(row[i]));
    return Element<D>::magnitude(largest);
}

// Checks and writes the scale of one group of a row. Returns whether it divides fast.
template <class Fmt, Dtype D>
DS_FP6_DEVICE bool settle_scale(const QuantizeProblem& p, const typename Element<D>::Type* from, int row, int group,
                                uint32_t largest) {
    if (largest >= 0x7F800000u) {
        int column = group * p.group_size;
        while (isfinite(Element<D>::widen(from[column]))) ++column;
        atomicMin(&p.refused->weight, static_cast<unsigned long long>(row) * p.k + column);
    }
    const size_t at = static_cast<size_t>(row) * p.groups + group;
    const float scale = p.given == nullptr ? scale_of<Fmt>(largest) : p.given[at];
    if (p.given != nullptr && !(scale > 0.0f && isfinite(scale)))
        atomicMin(&p.refused->scale, static_cast<unsigned long long>(at));
    p.scales[at] = scale;
    return divides_fast(scale, largest);
}

// The scales of a row, by one warp: a lane takes short groups each, all lanes a long one together. Returns whether all
// that this lane settled divide fast.
template <class Fmt, Dtype D>
DS_FP6_DEVICE bool find_scales(const QuantizeProblem& p, int row, int lane) {
    constexpr int kShort = 512;
    const auto* from = static_cast<const typename Element<D>::Type*>(p.w) + row * p.row_stride;
    const bool alone = p.group_size <= kShort;
    const int step = alone ? kLanes : 1;
    bool fast = true;
    for (int first = 0; first < p.groups; first += step) {
        const int group = alone ? first + lane : first;
        if (group >= p.groups) break;
        const int begin = group * p.group_size, end = min(p.k, begin + p.group_size);
        uint32_t largest = largest_magnitude<D>(from, begin, end, alone ? 0 : lane, alone ? 1 : kLanes);
        if (!alone) largest = __reduce_max_sync(0xFFFFFFFFu, largest);
        if (alone || lane == 0) fast &= settle_scale<Fmt, D>(p, from, row, group, largest);
    }
    return fast;
}

// This lane's weights of the 16 x 64 block at (row, column); 0 beyond the matrix.
template <Dtype D>
DS_FP6_DEVICE void load_block(const QuantizeProblem& p, int row, int column, int lane, bool in_pairs,
                              Two<typename Element<D>::Type> (&pairs)[kPairs]) {
    using Type = typename Element<D>::Type;
    const Type* from = static_cast<const Type*>(p.w) + row * p.row_stride + column;
    if (in_pairs && row + kBlockRows <= p.n && column + kBlockColumns <= p.k) {
        const Type* rows[2] = {from + lane / 4 * p.row_stride, from + (lane / 4 + 8) * p.row_stride};
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            pairs[i] = *reinterpret_cast<const Two<Type>*>(rows[i % 2] + pair_column(lane, i));
        return;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int r = pair_row(lane, i), c = pair_column(lane, i);
        const Type* at = from + r * p.row_stride + c;
        const bool inside = row + r < p.n;
        pairs[i].low = inside && column + c < p.k ? at[0] : Element<D>::round(0.0f);
        pairs[i].high = inside && column + c + 1 < p.k ? at[1] : Element<D>::round(0.0f);
    }
}

// Codes of the 16 x 64 block at (row, column), laid out for T.
template <class Fmt, class T, Dtype D>
DS_FP6_DEVICE void encode_block(const QuantizeProblem& p, int row, int column, int lane, bool in_pairs, bool fast,
                                uint8_t* block) {
    Two<typename Element<D>::Type> pairs[kPairs];
    load_block<D>(p, row, column, lane, in_pairs, pairs);
    const int rows[2] = {row + lane / 4, row + lane / 4 + 8};
    const int first_group = column / p.group_size, last_column = min(column + kBlockColumns, p.k) - 1;
    const bool one_group = first_group == last_column / p.group_size;
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        scale[i] = rows[i] < p.n ? p.scales[static_cast<size_t>(rows[i]) * p.groups + first_group] : 1.0f;

    uint32_t words[Fmt::kBits] = {};
    if (fast && one_group) {
        const float reciprocal[2] = {__frcp_rn(scale[0]), __frcp_rn(scale[1])};
        auto insert_pair = [&](auto index) {
            constexpr int i = decltype(index)::value, r = i % 2;
            const float low = Element<D>::widen(pairs[i].low), high = Element<D>::widen(pairs[i].high);
            insert<Fmt, T, i>(encode_pair<Fmt, T>(divide_fast(low, scale[r], reciprocal[r]),
                                                  divide_fast(high, scale[r], reciprocal[r])),
                              words);
        };
        for_each_pair(insert_pair);
    } else {
        auto insert_pair = [&](auto index) {
            constexpr int i = decltype(index)::value, r = i % 2;
            float own[2] = {scale[r], scale[r]};
            if (!one_group) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int c = column + pair_column(lane, i) + half;
                    if (rows[r] < p.n && c < p.k)
                        own[half] = p.scales[static_cast<size_t>(rows[r]) * p.groups + c / p.group_size];
                }
            }
            insert<Fmt, T, i>(encode_pair<Fmt, T>(__fdiv_rn(Element<D>::widen(pairs[i].low), own[0]),
                                                  __fdiv_rn(Element<D>::widen(pairs[i].high), own[1])),
                              words);
        };
        for_each_pair(insert_pair);
    }
    store_words<Fmt::kBits>(block, lane, words);
}

template <class Fmt, class T, Dtype D>
__global__ void __launch_bounds__(kQuantizeWarps * 32) quantize_kernel(const __grid_constant__ QuantizeProblem p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = blockIdx.x, row = strip * kBlockRows;
    const bool own_fast = row + warp < p.n ? find_scales<Fmt, D>(p, row + warp, lane) : true;
    const bool fast = __syncthreads_and(own_fast);
    const int panels = ceil_div(p.k, kPanelColumns);
    using Pair = Two<typename Element<D>::Type>;
    const bool in_pairs = reinterpret_cast<uintptr_t>(p.w) % sizeof(Pair) == 0 && p.row_stride % 2 == 0;
    for (int panel = warp; panel < panels; panel += kQuantizeWarps)
        encode_block<Fmt, T, D>(p, row, panel * kPanelColumns, lane, in_pairs, fast,
                                p.tiles + block_offset<Fmt::kBits>(strip, panel, panels));
}

}  // namespace tiles
}  // namespace cuda
}  // namespace ds_fp6
