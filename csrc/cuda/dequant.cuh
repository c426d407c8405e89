// Packed words to MMA operands in registers: a lane's words of a 16 x 64 block (common/layout.h), laid out for fp16 or
// for bf16, to the A fragments of its four k16 steps in that type, exact for every code.
//
// Also compiles for the host, where the two arithmetic instructions are emulated, so that a CPU can check every code.
#pragma once

#include "common/bit_map.h"
#if defined(__CUDACC__)
#include "ptx.cuh"
#endif
#if !defined(__CUDA_ARCH__)
#include <cmath>
#include <cstring>
#endif

namespace ds_fp6 {

namespace cuda {

// w rotated to the left by Rotate as far as Mask sees it. A shift wherever no bit under Mask wraps around: left shifts
// run as multiplications beside the logic pipe.
template <int Rotate, uint32_t Mask>
DS_FP6_HD uint32_t rotated(uint32_t w) {
    constexpr uint32_t wrapped = Mask & ((1u << Rotate) - 1);
    if constexpr (Rotate == 0) return w;
    else if constexpr (wrapped == 0) return w << Rotate;
    else if constexpr (wrapped == Mask) return w >> (32 - Rotate);
    else return w << Rotate | w >> (32 - Rotate);
}

// Bits of a under mask, of b elsewhere.
DS_FP6_HD uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return ptx::select_bits(mask, a, b);
#else
    return (a & mask) | (b & ~mask);
#endif
}

// The virtual word `Index`; bits that no pair takes are whatever the last term's word has there.
template <class Fmt, class T, int Index, int I = 0>
DS_FP6_HD uint32_t virtual_word(const uint32_t (&words)[Fmt::kBits]) {
    constexpr Terms terms = BitMapOf<Fmt, T>::kMap.virtual_word[Index];
    constexpr Term term = terms.term[I];
    const uint32_t bits = rotated<term.rotate, term.mask>(words[term.source]);
    if constexpr (I + 1 == terms.count) return bits;
    else return select_bits(term.mask, bits, virtual_word<Fmt, T, Index, I + 1>(words));
}

template <class Fmt, class T, int Source>
DS_FP6_HD uint32_t source(const uint32_t (&words)[Fmt::kBits]) {
    if constexpr (Source < Fmt::kBits) return words[Source];
    else return virtual_word<Fmt, T, Source - Fmt::kBits>(words);
}

// Two codes in T's places, sign at bit 15 of each half, the other bits shifted to BitMapOf<Fmt, T>::kShift, out of
// words that are laid out for T.
template <class Fmt, class T, int Pair, int I = 0>
DS_FP6_HD uint32_t extract(const uint32_t (&words)[Fmt::kBits]) {
    constexpr Terms terms = BitMapOf<Fmt, T>::kMap.pair[Pair];
    constexpr Term term = terms.term[I];
    const uint32_t pair = rotated<term.rotate, term.mask>(source<Fmt, T, term.source>(words)) & term.mask;
    if constexpr (I + 1 == terms.count) return pair;
    else return pair | extract<Fmt, T, Pair, I + 1>(words);
}

// min of positive fp16 pairs.
DS_FP6_HD uint32_t min_f16x2(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return ptx::min_f16x2(a, b);
#else
    // Positive fp16 numbers are ordered as their bits are.
    const uint32_t low = (a & 0xFFFF) < (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF;
    return low | ((a >> 16) < (b >> 16) ? a >> 16 : b >> 16) << 16;
#endif
}

// bf16 pairs times 2^Exponent where the product is exact.
template <int Exponent>
DS_FP6_HD uint32_t scale_bf16x2(uint32_t a) {
    static_assert(-126 <= Exponent && Exponent <= 127, "a normal number");
#if defined(__CUDA_ARCH__)
    // NOTE: mul.bf16x2 needs sm_90; adding -0 keeps the sign of a zero.
    constexpr uint32_t factor = bit_map::both_halves(uint32_t(127 + Exponent) << 7), minus_zero = 0x80008000u;
    return ptx::fma_bf16x2(a, factor, minus_zero);
#else
    uint32_t result = 0;
    for (int half = 0; half < 2; ++half) {
        uint32_t bits = (a >> (16 * half)) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        value = std::ldexp(value, Exponent);
        std::memcpy(&bits, &value, 4);
        result |= (bits >> 16) << (16 * half);
    }
    return result;
#endif
}

// Words to operands. The operand's value is w * 2^-kScaleExponent exactly; 2^kScaleExponent belongs into the epilogue.
//
// Instructions a pair on the logic pipe + beside it (left shifts, arithmetic), counted in sm_90a machine code:
//            e3m2         e2m2         e2m1         e3m1         e2m3         e4m3         e5m2
//   fp16  1.63 + 0.50  1.63 + 0.56  1.50 + 0.75  1.75 + 0.81  2.50 + 1.38  1.50 + 1.00  3.50 + 2.00
//   bf16  1.63 + 1.50  2.00 + 1.69  2.00 + 1.75  2.00 + 1.69  2.25 + 1.88  2.50 + 2.00  2.50 + 2.00
// Formats in segments take 3 to 6 logic instructions.
template <class Fmt, class T>
struct Dequant;

template <class Fmt>
struct Dequant<Fmt, Half> {
    // Five exponent bits would reach fp16's infinity, so they are halved.
    static constexpr bool kHalve = Fmt::kExponentBits == 5;
    static constexpr int kScaleExponent = kHalve ? 1 : 15 - Fmt::kBias;

    template <int Pair>
    static DS_FP6_HD uint32_t pair(const uint32_t (&words)[Fmt::kBits]) {
        const uint32_t w = extract<Fmt, Half, Pair>(words);
        if constexpr (!kHalve) return w;
        // A step of the exponent less, or, where none is left, half the bits: bits - min(bits / 2, one step).
        else return w - min_f16x2(w >> 1 & (BitMapOf<Fmt, Half>::kMagnitude >> 1), bit_map::both_halves(1u << 10));
    }

    // The A fragment of k16 step Step.
    template <int Step>
    static DS_FP6_HD void fragment(const uint32_t (&words)[Fmt::kBits], uint32_t (&a)[4]) {
        a[0] = pair<4 * Step>(words);
        a[1] = pair<4 * Step + 1>(words);
        a[2] = pair<4 * Step + 2>(words);
        a[3] = pair<4 * Step + 3>(words);
    }
};

template <class Fmt>
struct Dequant<Fmt, BFloat16> {
    // So that sums of the largest activations do not overflow: 2^20 is 32768 terms times e3m2's largest value. Products
    // of activations below 2^-100 leave fp32's normal numbers instead, and lose bits that no y shows.
    static constexpr int kScaleExponent = 20;

    template <int Pair>
    static DS_FP6_HD uint32_t pair(const uint32_t (&words)[Fmt::kBits]) {
        // As bf16 the bits are w * 2^(bias - 127).
        return scale_bf16x2<127 - Fmt::kBias - kScaleExponent>(extract<Fmt, BFloat16, Pair>(words));
    }

    // The A fragment of k16 step Step.
    template <int Step>
    static DS_FP6_HD void fragment(const uint32_t (&words)[Fmt::kBits], uint32_t (&a)[4]) {
        a[0] = pair<4 * Step>(words);
        a[1] = pair<4 * Step + 1>(words);
        a[2] = pair<4 * Step + 2>(words);
        a[3] = pair<4 * Step + 3>(words);
    }
};

}  // namespace cuda
}  // namespace ds_fp6
