// Fused quantization and packing of rows; plain loops that the compiler vectorizes for each instruction set.
// Included between DS_FP6_TARGET_BEGIN and _END (target.h).
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// Smallest normal fp32: scales stay out of the subnormals.
constexpr float kSmallestScale = 0x1p-126f;

// codes[n] = code of the value nearest to w / scale: ties away from zero, saturating, never -0.
//
// Above the smallest normal, adding half a unit to the fp32 bits and cutting them off rounds the magnitude, and a
// carry moves into the exponent by itself. Below it, whole halves of the smallest value are counted, then rounded up to
// units as integers; adding 0.5 to a float would round a second time. No branches: the compiler vectorizes.
inline void encode(const float* w, int64_t n, float scale, const FormatSpec& format, uint8_t* codes) {
    const int drop = 23 - format.mantissa_bits, sign_shift = 31 - (format.bits() - 1);
    const uint32_t half = 1u << (drop - 1);
    const uint32_t rebias = uint32_t(127 - format.bias()) << format.mantissa_bits;
    const int32_t max_code = (1 << (format.bits() - 1)) - 1;
    const int32_t sign_bit = 1 << (format.bits() - 1);
    const int32_t normal = int32_t(128 - format.bias()) << 23;  // bits of 2^(1 - bias)
    const float to_half_units = bits_to_float(uint32_t(127 + format.bias() + format.mantissa_bits) << 23);
    for (int64_t i = 0; i < n; ++i) {
        const float t = w[i] / scale;
        const int32_t bits = int32_t(float_to_bits(t));
        const int32_t magnitude = bits & 0x7fffffff;
        const int32_t rounded = int32_t(((uint32_t(magnitude) + half) >> drop) - rebias);
        const float small = bits_to_float(uint32_t(magnitude < normal ? magnitude : normal));
        const int32_t subnormal = (int32_t(small * to_half_units) + 1) >> 1;
        int32_t code = magnitude < normal ? subnormal : rounded;
        code = code < max_code ? code : max_code;
        const int32_t sign = code > 0 ? int32_t(uint32_t(bits) >> sign_shift) & sign_bit : 0;
        codes[i] = uint8_t(code | sign);
    }
}

// codes[n], then zeros up to a multiple of 8, to ceil(n * bits / 8) bytes.
template <class Native>
void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
    int64_t left = ceil_div(n * bits, 8);
    for (int64_t i = 0; i < n; i += 8, out += bits, left -= bits) {
        uint64_t bytes;
        __builtin_memcpy(&bytes, codes + i, 8);
        const uint64_t run = Native::compress(bytes, bits);
        if (left >= 8) {
            __builtin_memcpy(out, &run, 8);  // bytes beyond `bits` are written again by the next run
        } else {
            for (int b = 0; b < bits && b < left; ++b) out[b] = uint8_t(run >> (8 * b));
        }
    }
}

// The largest magnitude of w[n] as fp32 bits: 0x7f800000 or more where a NaN or an infinity is among them.
inline int32_t largest_magnitude(const float* w, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t magnitude = int32_t(float_to_bits(w[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

inline float scale_of(int32_t largest, float format_max) {
    if (largest == 0) return 1.0f;
    const float scale = bits_to_float(uint32_t(largest)) / format_max;
    return scale > kSmallestScale ? scale : kSmallestScale;
}

template <class Native>
int64_t quantize_rows(const QuantizeProblem& p, int64_t n0, int64_t n1) {
    const int bits = p.format.bits();
    const int64_t row_bytes = ceil_div(p.k * bits, 8);
    const int64_t group_size = p.group_size ? p.group_size : p.k, groups = ceil_div(p.k, group_size);
    const float format_max = p.format.max();
    float* row = static_cast<float*>(scratch(Scratch::kRow, p.k * sizeof(float)));
    uint8_t* codes = static_cast<uint8_t*>(scratch(Scratch::kCodes, p.k + 8));
    for (int64_t n = n0; n < n1; ++n) {
        load_floats<Native>(p.w, p.dtype, n * p.row_stride, p.k, row);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * group_size, size = p.k - begin < group_size ? p.k - begin : group_size;
            const int32_t largest = largest_magnitude(row + begin, size);
            if (largest >= 0x7f800000) return n;
            const float scale = p.given_scales ? p.given_scales[n * groups + g] : scale_of(largest, format_max);
            p.scales[n * groups + g] = scale;
            encode(row + begin, size, scale, p.format, codes + begin);
        }
        for (int i = 0; i < 8; ++i) codes[p.k + i] = 0;
        pack_codes<Native>(codes, p.k, bits, p.packed + n * row_bytes);
    }
    return -1;
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
