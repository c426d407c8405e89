// Kernels for the first AVX-512 CPUs (F, BW, DQ, VL): no byte permutation across lanes, no bf16.
//
// As linear_avx2.cpp, on 32 codes: VPERMD brings to each 128-bit lane the words of its eight codes, a byte shuffle
// puts the two bytes that hold a code into its 16-bit lane, shifts make it an fp16 of value * 2^(bias - 15), and
// VCVTPH2PS widens it. Five exponent bits would run into fp16's infinity, so those formats look their values up.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from undefined registers
#endif

DS_FP6_TARGET_BEGIN("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

#include "element.h"
#include "math_avx512.h"
#include "transpose_avx512.h"
#include "linear_dot.h"
#include "linear_panel.h"
#include "quantize_rows.h"
#include "kernel_set.h"

namespace ds_fp6 {
namespace cpu {
namespace {

// kLookUp: values from a table, for five exponent bits; else through fp16.
template <bool kLookUp>
struct BaseFp32 : Avx512Fp32Math {
    static constexpr int kVectors = 2, kChunk = 32;

    struct Expander {
        __m512i words, bytes, shifts, mask;
        __m128i exponent_shift;
        float power;
        int bits;
        float table[256];

        explicit Expander(const FormatSpec& format) : bits(format.bits()) {
            alignas(64) uint32_t word[16];
            alignas(64) uint8_t byte[64];
            alignas(64) uint16_t shift[32];
            for (int lane = 0; lane < 4; ++lane) {
                const int first_word = lane * bits / 4, first_byte = lane * bits % 4;
                for (int i = 0; i < 4; ++i) word[lane * 4 + i] = uint32_t(first_word + i < 15 ? first_word + i : 15);
                for (int i = 0; i < 8; ++i) {
                    byte[lane * 16 + 2 * i] = uint8_t(first_byte + i * bits / 8);
                    byte[lane * 16 + 2 * i + 1] = uint8_t(first_byte + i * bits / 8 + 1);
                    shift[lane * 8 + i] = uint16_t(16 - bits - i * bits % 8);
                }
            }
            words = _mm512_load_si512(word);
            bytes = _mm512_load_si512(byte);
            shifts = _mm512_load_si512(shift);
            if (kLookUp) {
                format.values(table);
                exponent_shift = _mm_cvtsi32_si128(16 - bits);
                mask = _mm512_set1_epi16(int16_t((1 << bits) - 1));
                power = 1.0f;
            } else {
                exponent_shift = _mm_cvtsi32_si128(5 - format.exponent_bits);
                mask = _mm512_set1_epi16(int16_t(0x8000 | ((1 << (bits - 1)) - 1) << (10 - format.mantissa_bits)));
                power = float(1 << (15 - format.bias()));
            }
        }
        float scale() const { return power; }

        DS_FP6_INLINE __mmask64 window(int64_t left) const { return first_lanes(left < 4 * bits ? left : 4 * bits); }
        DS_FP6_INLINE void expand(const uint8_t* codes, __mmask64 window, Weights out[kVectors]) const {
            const __m512i run = _mm512_maskz_loadu_epi8(window, codes);
            __m512i lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, run), bytes);
            lanes = _mm512_sllv_epi16(lanes, shifts);
            lanes = _mm512_and_si512(_mm512_sra_epi16(lanes, exponent_shift), mask);
            const __m256i low = _mm512_castsi512_si256(lanes), high = _mm512_extracti64x4_epi64(lanes, 1);
            if (kLookUp) {
                out[0] = _mm512_i32gather_ps(_mm512_cvtepu16_epi32(low), table, 4);
                out[1] = _mm512_i32gather_ps(_mm512_cvtepu16_epi32(high), table, 4);
            } else {
                out[0] = _mm512_cvtph_ps(low);
                out[1] = _mm512_cvtph_ps(high);
            }
        }
    };

    static constexpr int dot_rows(int m) { return m <= 2 ? 4 : 2; }

    static void expand_tile(const Expander& expander, const uint8_t* const* rows, int64_t offset, int64_t left,
                            int64_t chunks, uint32_t* tile) {
        float* out = reinterpret_cast<float*>(tile);
        for (int v = 0; v < kTileVectors; ++v)
            for (int64_t c = 0; c < chunks; ++c) {
                const __mmask64 window = expander.window(left - c * 4 * expander.bits);
                __m512 half[2][16];
                for (int r = 0; r < 16; ++r) {
                    const uint8_t* row = rows[v * 16 + r];
                    Weights weights[kVectors];
                    const uint8_t* from = row + offset + c * 4 * expander.bits;
                    expander.expand(from, window, weights);
                    half[0][r] = weights[0];
                    half[1][r] = weights[1];
                }
                for (int h = 0; h < 2; ++h) {
                    transpose_floats(half[h]);
                    for (int i = 0; i < 16; ++i)
                        store_sum(out + (v * kTileUnits + c * kChunk + h * 16 + i) * kLanes, half[h][i]);
                }
            }
    }
};

struct BaseFamily {
    using Native = Avx512Native;
    static constexpr int kChunk = BaseFp32<false>::kChunk, kPanel = BaseFp32<false>::kPanel;

    template <class Run>
    static void visit(const FormatSpec& format, const Run& run) {
        if (format.exponent_bits == 5) return run(BaseFp32<true>());
        run(BaseFp32<false>());
    }
};

}  // namespace

extern const KernelSet kAvx512BaseKernels = Kernels<BaseFamily>::set("avx512_base");

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
