// fp16 on a CPU, rounded to nearest even.
#pragma once

#include "gpu.h"

struct __half {
    uint16_t bits;
};
inline float __half2float(__half h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 0x3FF;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | mantissa << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(std::ldexp(float(mantissa), -24)));
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float v) {
    const uint32_t bits = __float_as_uint(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    uint32_t rounded;
    if (magnitude > 0x7F800000) rounded = 0x7E00;
    else if (magnitude >= 0x477FF000) rounded = 0x7C00;
    else if (magnitude < 0x38800000) rounded = uint32_t(std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24)));
    else rounded = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    return {uint16_t(sign | rounded)};
}
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
