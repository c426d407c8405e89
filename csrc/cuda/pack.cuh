// The inverse of dequant.cuh's extraction: codes into a lane's words, by the same bit map. Also compiles for the host.
#pragma once

#include <type_traits>

#include "dequant.cuh"

namespace ds_fp6 {
namespace cuda {

template <int Rotate>
DS_FP6_HD uint32_t rotate_right(uint32_t w) {
    if constexpr (Rotate == 0) return w;
    else return w >> Rotate | w << (32 - Rotate);
}

template <class Fmt, class T, int Index, int I = 0>
DS_FP6_HD void insert_virtual(uint32_t bits, uint32_t (&words)[Fmt::kBits]) {
    constexpr Terms terms = BitMapOf<Fmt, T>::kMap.virtual_word[Index];
    constexpr Term term = terms.term[I];
    words[term.source] |= rotate_right<term.rotate>(bits & term.mask);
    if constexpr (I + 1 < terms.count) insert_virtual<Fmt, T, Index, I + 1>(bits, words);
}

// Adds `pair`, as extract<Fmt, T, Pair> returns it, to words whose bits for it are still 0.
template <class Fmt, class T, int Pair, int I = 0>
DS_FP6_HD void insert(uint32_t pair, uint32_t (&words)[Fmt::kBits]) {
    constexpr Terms terms = BitMapOf<Fmt, T>::kMap.pair[Pair];
    constexpr Term term = terms.term[I];
    const uint32_t bits = rotate_right<term.rotate>(pair & term.mask);
    if constexpr (term.source < Fmt::kBits) words[term.source] |= bits;
    else insert_virtual<Fmt, T, term.source - Fmt::kBits>(bits, words);
    if constexpr (I + 1 < terms.count) insert<Fmt, T, Pair, I + 1>(pair, words);
}

// A code (below 2^bits) to its place in a half of a pair, and back.
template <class Fmt, class T>
DS_FP6_HD uint32_t place_code(uint32_t code) {
    constexpr int run = Fmt::kBits - 1;
    return (code >> run) << 15 | (code & ((1u << run) - 1)) << BitMapOf<Fmt, T>::kShift;
}
template <class Fmt, class T>
DS_FP6_HD uint32_t code_at(uint32_t half) {
    constexpr int run = Fmt::kBits - 1;
    return (half >> 15 & 1) << run | (half >> BitMapOf<Fmt, T>::kShift & ((1u << run) - 1));
}

// The fp32 value of the code in a half of a pair, exact.
template <class Fmt, class T>
DS_FP6_HD float value_at(uint32_t half) {
    // As fp32, where the exponent is at bit 23, the bits are w * 2^(bias - 127).
    const uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7FFFu) << (23 - T::kExponentAt);
    constexpr uint32_t factor = uint32_t(254 - Fmt::kBias) << 23;  // 2^(127 - bias)
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits) * __uint_as_float(factor);
#else
    float value, scale;
    std::memcpy(&value, &bits, 4);
    std::memcpy(&scale, &factor, 4);
    return value * scale;
#endif
}

// Calls f with std::integral_constant<int, 0>, <int, 1> ... for every pair of a block.
template <int Pair = 0, class F>
DS_FP6_HD void for_each_pair(F& f) {
    if constexpr (Pair < kPairs) {
        f(std::integral_constant<int, Pair>{});
        for_each_pair<Pair + 1>(f);
    }
}

}  // namespace cuda
}  // namespace ds_fp6
