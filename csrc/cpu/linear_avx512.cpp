// Kernels for AVX-512 with VBMI, with BF16 dot products on top, and for the first AVX-512 CPUs, which lack both.
//
// Floor of one row of x: the packed weights over the memory bandwidth. Expanding 64 codes of e3m2 takes VPERMB,
// VPMULTISHIFTQB, two VPERMB look-ups and two unpacks, six shuffles for 48 bytes: at two shuffles a clock 16 bytes a
// clock and core, several times what a core's share of memory delivers.
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

DS_FP6_TARGET_BEGIN(
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,prefer-vector-width=512")

#include "element.h"
#include "math_avx512.h"
#include "expand_avx512.h"
#include "transpose_avx512.h"
#include "linear_dot.h"
#include "linear_panel.h"
#include "quantize_rows.h"
#include "kernel_set.h"

namespace ds_fp6 {
namespace cpu {
namespace {

// x in fp32. Codes -> bf16 bytes -> bf16 -> fp32, whose lower half is zero.
template <int kTableBits>
struct VbmiFp32 : Avx512Fp32Math {
    static constexpr int kVectors = 4, kChunk = 64;

    struct Expander {
        CodeReader reader, natural;
        ByteTables<kTableBits> tables;

        explicit Expander(const FormatSpec& format)
            : reader(format.bits(), CodeOrder::kFp32), natural(format.bits(), CodeOrder::kNatural), tables(format) {}
        float scale() const { return 1.0f; }

        DS_FP6_INLINE __mmask64 window(int64_t left) const { return reader.window(left); }
        DS_FP6_INLINE void expand(const uint8_t* codes, __mmask64 window, Weights out[kVectors]) const {
            const __m512i read = reader.read(codes, window), zero = _mm512_setzero_si512();
            const __m512i lower = tables.lower_bytes(read), upper = tables.upper_bytes(read);
            const __m512i low = _mm512_unpacklo_epi8(lower, upper), high = _mm512_unpackhi_epi8(lower, upper);
            out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, low));
            out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, low));
            out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, high));
            out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, high));
        }
    };

    static constexpr int dot_rows(int m) { return m <= 5 ? 4 : 2; }

    // A pair of codes along K as two units of fp32.
    static DS_FP6_INLINE void store_pair(uint32_t* tile, int64_t pair, __m512i bf16_pairs) {
        const __m512i second = _mm512_set1_epi32(int(0xffff0000));
        _mm512_storeu_si512(tile + 2 * pair * kLanes, _mm512_slli_epi32(bf16_pairs, 16));
        _mm512_storeu_si512(tile + (2 * pair + 1) * kLanes, _mm512_and_si512(bf16_pairs, second));
    }
};

// x in bf16: VDPBF16PS multiplies pairs exactly and adds them in fp32.
template <int kTableBits>
struct VbmiBf16 : Avx512Sum {
    using Weights = __m512i;  // 32 bf16
    static constexpr int kVectors = 2, kChunk = 64, kUnitCodes = 2;

    struct Expander {
        CodeReader reader, natural;
        ByteTables<kTableBits> tables;

        explicit Expander(const FormatSpec& format)
            : reader(format.bits(), CodeOrder::kBf16), natural(format.bits(), CodeOrder::kNatural), tables(format) {}
        float scale() const { return 1.0f; }

        DS_FP6_INLINE __mmask64 window(int64_t left) const { return reader.window(left); }
        DS_FP6_INLINE void expand(const uint8_t* codes, __mmask64 window, Weights out[kVectors]) const {
            const __m512i read = reader.read(codes, window);
            const __m512i lower = tables.lower_bytes(read), upper = tables.upper_bytes(read);
            out[0] = _mm512_unpacklo_epi8(lower, upper);
            out[1] = _mm512_unpackhi_epi8(lower, upper);
        }
    };

    static constexpr int dot_rows(int m) { return m <= 5 ? 4 : 2; }

    static DS_FP6_INLINE Weights load_tile(const uint32_t* tile) { return _mm512_loadu_si512(tile); }
    static DS_FP6_INLINE Weights broadcast(const uint32_t* x) { return _mm512_set1_epi32(int(*x)); }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, Weights x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, const uint32_t* x) {
        return multiply_add(sum, w, load_tile(x));
    }

    // A pair of codes along K as one unit of two bf16.
    static DS_FP6_INLINE void store_pair(uint32_t* tile, int64_t pair, __m512i bf16_pairs) {
        _mm512_storeu_si512(tile + pair * kLanes, bf16_pairs);
    }
};

// The tile of linear_panel.h with VBMI: rows are transposed as codes, when they are smallest.
template <class Isa>
struct VbmiTile : Isa {
    static void expand_tile(const typename Isa::Expander& expander, const uint8_t* const* rows, int64_t offset,
                            int64_t left, int64_t chunks, uint32_t* tile) {
        const CodeReader reader = expander.natural;
        const auto tables = expander.tables;
        for (int v = 0; v < Isa::kTileVectors; ++v) {
            uint32_t* out = tile + v * kTileUnits * Isa::kLanes;
            for (int64_t c = 0; c < chunks; ++c) {
                const __mmask64 window = reader.window(left - c * reader.size);
                __m512i codes[16];
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) {
                    const uint8_t* row = rows[v * 16 + r];
                    const uint8_t* from = row + offset + c * reader.size;
                    codes[r] = reader.read(from, window);
                }
                __m512i quads[4][4];
                interleave_rows(codes, quads);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    __m512i couples[4];
                    transpose_lanes(quads[j], couples);
#pragma GCC unroll 4
                    for (int l = 0; l < 4; ++l) {
                        const __m512i lower = tables.lower_bytes(couples[l]), upper = tables.upper_bytes(couples[l]);
                        const int64_t pair = c * 32 + 2 * (4 * l + j);
                        Isa::store_pair(out, pair, _mm512_unpacklo_epi8(lower, upper));
                        Isa::store_pair(out, pair + 1, _mm512_unpackhi_epi8(lower, upper));
                    }
                }
            }
        }
    }
};

template <template <int> class Isa>
struct VbmiFamily {
    using Native = Avx512Native;
    static constexpr int kChunk = Isa<6>::kChunk, kPanel = Isa<6>::kPanel;

    template <class Run>
    static void visit(const FormatSpec& format, const Run& run) {
        switch (format.bits()) {
            case 8: return run(VbmiTile<Isa<8>>());
            case 7: return run(VbmiTile<Isa<7>>());
            default: return run(VbmiTile<Isa<6>>());
        }
    }
};

}  // namespace

extern const KernelSet kAvx512VbmiKernels = Kernels<VbmiFamily<VbmiFp32>>::set("avx512_vbmi");
extern const KernelSet kAvx512Bf16Kernels = Kernels<VbmiFamily<VbmiFp32>, VbmiFamily<VbmiBf16>>::set("avx512_bf16");

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
