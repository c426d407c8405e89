// bf16 values of a token as fp16 ones for linear_sm90, whose weights take a third fewer instructions to become fp16 than
// bf16.
//
// They are multiplied by the power of two that takes the largest magnitude among them to [2^15, 2^16), or by so much less
// as larger ones may follow; their products' sum is multiplied by the inverse. Where none may follow, values of at least
// 2^-32 of the largest stay exact, smaller ones are off by at most 2^-40 of it. Where all are below 2^-110 they are
// multiplied by 2^126, and exact too. An infinity or NaN stays one, and spoils its own token only.
#pragma once

#include <cuda_fp16.h>

#include "ptx_sm90.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// The largest magnitudes of a vector's values with an even index and of those with an odd one, and of `largest`.
__device__ inline uint32_t largest_of(uint4 v, uint32_t largest) {
    constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
    largest = larger_u16x2(largest, larger_u16x2(v.x & kMagnitudes, v.y & kMagnitudes));
    return larger_u16x2(largest, larger_u16x2(v.z & kMagnitudes, v.w & kMagnitudes));
}

// The larger one of both, as fp32; the lower half of its bits is anything.
__device__ inline uint32_t larger_half(uint32_t pair) { return larger(pair, pair << 16); }

// By which a token is scaled, of its largest magnitude's bits as fp32: biased by 127, and so large that the factor's
// inverse is a normal number.
__device__ inline uint32_t scale_exponent(uint32_t largest) { return larger(largest >> 23, 16); }

struct TokenScale {
    float factor;

    // headroom: powers of two up to which larger ones may follow.
    __device__ void set(uint32_t largest, int headroom) {
        factor = __uint_as_float((127 + 142 - headroom - scale_exponent(largest)) << 23);
    }
    __device__ float inverse() const { return __uint_as_float((254u << 23) - __float_as_uint(factor)); }
};

__device__ inline uint32_t to_f16(uint32_t pair, float factor) {
    const __half2 converted =
        __floats2half2_rn(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xFFFF0000u) * factor);
    return reinterpret_cast<const uint32_t&>(converted);
}

__device__ inline uint4 to_f16(uint4 v, float factor) {
    return make_uint4(to_f16(v.x, factor), to_f16(v.y, factor), to_f16(v.z, factor), to_f16(v.w, factor));
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
