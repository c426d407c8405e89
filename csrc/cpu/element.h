// Rows of fp32, fp16 and bf16 to rows of fp32 and back. Included between DS_FP6_TARGET_BEGIN and _END (target.h).
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

DS_FP6_INLINE float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

DS_FP6_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

DS_FP6_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest_even);
}

// What a CPU may have instructions for: fp16, and compress(), which joins the low bits of eight bytes.
//
// This one has none. Its fp16 subnormals go through integers: they must survive flush-to-zero modes.
struct PlainNative {
    static float to_float(uint16_t half) {
        const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
        if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
        if (exponent == 0) return bits_to_float(sign | float_to_bits(float(mantissa) * 0x1p-24f));
        return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
    }
    static uint16_t from_float(float value) {
        const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
        if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520, halfway to 2^16
        if (magnitude < 0x38800000) {                                 // 2^-14
            // 2^23 leaves an fp32 sum no fraction, so that the addition rounds to nearest even.
            const float shifted = bits_to_float(magnitude) * 0x1p24f + 0x1p23f;
            return uint16_t(sign | (float_to_bits(shifted) & 0x7ff));
        }
        return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
    }
    static void to_floats(const uint16_t* source, int64_t n, float* out) {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(source[i]);
    }
    static void from_floats(const float* source, int64_t n, uint16_t* out) {
        for (int64_t i = 0; i < n; ++i) out[i] = from_float(source[i]);
    }
    static uint64_t compress(uint64_t bytes, int bits) {
        uint64_t out = 0;
        for (int i = 0; i < 8; ++i) out |= ((bytes >> (8 * i)) & ((1u << bits) - 1)) << (bits * i);
        return out;
    }
};

// source[offset, offset + n) of dtype to out [n].
template <class Native>
void load_floats(const void* source, Dtype dtype, int64_t offset, int64_t n, float* out) {
    if (dtype == Dtype::kFloat32) {
        const float* from = static_cast<const float*>(source) + offset;
        for (int64_t i = 0; i < n; ++i) out[i] = from[i];
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
    if (dtype == Dtype::kFloat16) return Native::to_floats(from, n, out);
    for (int64_t i = 0; i < n; ++i) out[i] = bits_to_float(uint32_t(from[i]) << 16);
}

// source [n] to out[offset, offset + n) of dtype, rounded to nearest even.
template <class Native>
void store_floats(const float* source, Dtype dtype, int64_t offset, int64_t n, void* out) {
    if (dtype == Dtype::kFloat32) {
        float* to = static_cast<float*>(out) + offset;
        for (int64_t i = 0; i < n; ++i) to[i] = source[i];
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + offset;
    if (dtype == Dtype::kFloat16) return Native::from_floats(source, n, to);
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(source[i]);
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
