// Kernels for AVX2, FMA and F16C (every CPU with AVX2 has both).
//
// Sixteen codes of any width fill at most 16 bytes. A byte shuffle puts the two bytes that hold a code into its
// 16-bit lane, a multiplication moves the code to the top of the lane, and an arithmetic shift makes room for the
// exponent bits that fp16 has more: the lane is then an fp16 that equals value * 2^(bias - 15), subnormals included,
// and VCVTPH2PS widens it. The power of two comes back with the scale.
//
//   6 bits, e3m2:   .... ..s eeemm... -> s eeemm 0000000000 -> s 00eee mm00000000
//
// Five exponent bits would run into fp16's infinity, so those formats look their values up.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__)

DS_FP6_TARGET_BEGIN("avx2,fma,f16c,bmi2")

#include "element.h"
#include "quantize_rows.h"
#include "linear_dot.h"
#include "linear_panel.h"
#include "kernel_set.h"

namespace ds_fp6 {
namespace cpu {
namespace {

struct Avx2Native {
    static void to_floats(const uint16_t* source, int64_t n, float* out) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
        for (; i < n; ++i) out[i] = _cvtsh_ss(source[i]);
    }
    static void from_floats(const float* source, int64_t n, uint16_t* out) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < n; ++i) out[i] = _cvtss_sh(source[i], _MM_FROUND_TO_NEAREST_INT);
    }
    static uint64_t compress(uint64_t bytes, int bits) {
        return _pext_u64(bytes, 0x0101010101010101ull * ((1u << bits) - 1));
    }
};

// kLookUp: values from a table, for five exponent bits; else through fp16.
template <bool kLookUp>
struct Avx2Fp32 {
    using Sum = __m256;
    using Weights = __m256;
    using Native = Avx2Native;
    static constexpr int kLanes = 8, kVectors = 4, kChunk = 32, kUnitCodes = 1;
    static constexpr int kTileVectors = 2, kRegisterRows = 6;

    struct Expander {
        __m256i bytes, factors, mask;
        __m128i exponent_shift;
        float power;
        int bits;
        float table[256];

        explicit Expander(const FormatSpec& format) : bits(format.bits()) {
            alignas(32) uint8_t byte[32];
            alignas(32) uint16_t factor[16];
            for (int i = 0; i < 16; ++i) {
                const int first = i * bits / 8, offset = i * bits % 8;
                byte[2 * i] = uint8_t(first);
                byte[2 * i + 1] = first + 1 < 16 ? uint8_t(first + 1) : 0x80;
                factor[i] = uint16_t(1 << (16 - bits - offset));
            }
            bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
            factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(factor));
            if (kLookUp) {
                format.values(table);
                exponent_shift = _mm_cvtsi32_si128(16 - bits);
                mask = _mm256_set1_epi16(int16_t((1 << bits) - 1));
                power = 1.0f;
            } else {
                exponent_shift = _mm_cvtsi32_si128(5 - format.exponent_bits);
                mask = _mm256_set1_epi16(int16_t(0x8000 | ((1 << (bits - 1)) - 1) << (10 - format.mantissa_bits)));
                power = float(1 << (15 - format.bias()));
            }
        }
        float scale() const { return power; }

        DS_FP6_INLINE void expand16(__m128i run, Weights out[2]) const {
            __m256i lanes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(run), bytes);
            lanes = _mm256_mullo_epi16(lanes, factors);
            lanes = _mm256_and_si256(_mm256_sra_epi16(lanes, exponent_shift), mask);
            const __m128i low = _mm256_castsi256_si128(lanes), high = _mm256_extracti128_si256(lanes, 1);
            if (kLookUp) {
                out[0] = _mm256_i32gather_ps(table, _mm256_cvtepu16_epi32(low), 4);
                out[1] = _mm256_i32gather_ps(table, _mm256_cvtepu16_epi32(high), 4);
            } else {
                out[0] = _mm256_cvtph_ps(low);
                out[1] = _mm256_cvtph_ps(high);
            }
        }

        DS_FP6_INLINE int64_t window(int64_t left) const { return left; }
        DS_FP6_INLINE void expand(const uint8_t* codes, int64_t left, Weights out[kVectors]) const {
            alignas(16) uint8_t last[32];
            if (__builtin_expect(left < 2 * bits + 16, 0)) {  // what a load of each half would reach
                for (int i = 0; i < 32; ++i) last[i] = i < left ? codes[i] : 0;
                codes = last;
            }
            expand16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), out);
            expand16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 2 * bits)), out + 2);
        }
    };

    static constexpr int dot_rows(int m) { return m == 1 ? 4 : 2; }
    static DS_FP6_INLINE Sum zero() { return _mm256_setzero_ps(); }
    static DS_FP6_INLINE Sum load_sum(const float* from) { return _mm256_loadu_ps(from); }
    static DS_FP6_INLINE void store_sum(float* to, Sum sum) { _mm256_storeu_ps(to, sum); }
    static DS_FP6_INLINE Weights load_tile(const uint32_t* tile) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(tile));
    }
    static DS_FP6_INLINE Weights broadcast(const uint32_t* x) {
        return _mm256_broadcast_ss(reinterpret_cast<const float*>(x));
    }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, Weights x) { return _mm256_fmadd_ps(w, x, sum); }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, const uint32_t* x) {
        return _mm256_fmadd_ps(w, load_tile(x), sum);
    }
    static DS_FP6_INLINE Sum scaled_add(Sum sum, Sum addend, Sum scale) { return _mm256_fmadd_ps(addend, scale, sum); }
    static DS_FP6_INLINE Sum scaled_add(Sum sum, Sum addend, float scale) {
        return _mm256_fmadd_ps(addend, _mm256_set1_ps(scale), sum);
    }
    static DS_FP6_INLINE float total(Sum sum) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }

    // Eight rows of eight values to eight columns.
    static DS_FP6_INLINE void transpose(__m256 r[8]) {
        __m256 pairs[8], quads[8];
        for (int i = 0; i < 4; ++i) {
            pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int h = 0; h < 2; ++h)
            for (int i = 0; i < 2; ++i) {
                const __m256d a = _mm256_castps_pd(pairs[4 * h + i]), b = _mm256_castps_pd(pairs[4 * h + 2 + i]);
                quads[4 * h + 2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                quads[4 * h + 2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20);
            r[4 + i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31);
        }
    }

    static void expand_tile(const Expander& expander, const uint8_t* const* rows, int64_t offset, int64_t left,
                            int64_t chunks, uint32_t* tile) {
        float* out = reinterpret_cast<float*>(tile);
        for (int v = 0; v < kTileVectors; ++v)
            for (int64_t c = 0; c < chunks; ++c) {
                __m256 eights[kVectors][8];
                for (int r = 0; r < 8; ++r) {
                    const uint8_t* row = rows[v * 8 + r];
                    Weights weights[kVectors];
                    const uint8_t* from = row + offset + c * 4 * expander.bits;
                    expander.expand(from, left - c * 4 * expander.bits, weights);
                    for (int j = 0; j < kVectors; ++j) eights[j][r] = weights[j];
                }
                for (int j = 0; j < kVectors; ++j) {
                    transpose(eights[j]);
                    for (int i = 0; i < 8; ++i)
                        store_sum(out + (v * kTileUnits + c * kChunk + j * 8 + i) * kLanes, eights[j][i]);
                }
            }
    }
};

struct Avx2Family {
    using Native = Avx2Native;
    static constexpr int kChunk = Avx2Fp32<false>::kChunk;
    static constexpr int kPanel = Avx2Fp32<false>::kTileVectors * Avx2Fp32<false>::kLanes;

    template <class Run>
    static void visit(const FormatSpec& format, const Run& run) {
        if (format.exponent_bits == 5) return run(Avx2Fp32<true>());
        run(Avx2Fp32<false>());
    }
};

}  // namespace

extern const KernelSet kAvx2Kernels = Kernels<Avx2Family>::set("avx2");

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
