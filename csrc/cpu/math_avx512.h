// What all AVX-512 kernels share: fp32 sums in 512-bit registers. Included between DS_FP6_TARGET_BEGIN and _END.
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

DS_FP6_INLINE __mmask64 first_lanes(int64_t n) { return n >= 64 ? ~0ull : n > 0 ? (1ull << n) - 1 : 0; }

struct Avx512Native {
    static void to_floats(const uint16_t* source, int64_t n, float* out) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = __mmask16(first_lanes(n - i));
            _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, source + i)));
        }
    }
    static void from_floats(const float* source, int64_t n, uint16_t* out) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = __mmask16(first_lanes(n - i));
            const __m512 values = _mm512_maskz_loadu_ps(mask, source + i);
            _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
        }
    }
    static uint64_t compress(uint64_t bytes, int bits) {
        return _pext_u64(bytes, 0x0101010101010101ull * ((1u << bits) - 1));
    }
};

struct Avx512Sum {
    using Sum = __m512;
    using Native = Avx512Native;
    static constexpr int kLanes = 16, kTileVectors = 4, kRegisterRows = 6;
    static constexpr int kPanel = kTileVectors * kLanes;

    static DS_FP6_INLINE Sum zero() { return _mm512_setzero_ps(); }
    static DS_FP6_INLINE Sum load_sum(const float* from) { return _mm512_loadu_ps(from); }
    static DS_FP6_INLINE void store_sum(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
    static DS_FP6_INLINE Sum scaled_add(Sum sum, Sum addend, Sum scale) { return _mm512_fmadd_ps(addend, scale, sum); }
    static DS_FP6_INLINE Sum scaled_add(Sum sum, Sum addend, float scale) {
        return _mm512_fmadd_ps(addend, _mm512_set1_ps(scale), sum);
    }
    static DS_FP6_INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

struct Avx512Fp32Math : Avx512Sum {
    using Weights = __m512;
    static constexpr int kUnitCodes = 1;

    static DS_FP6_INLINE Weights load_tile(const uint32_t* tile) { return _mm512_loadu_ps(tile); }
    static DS_FP6_INLINE Weights broadcast(const uint32_t* x) { return _mm512_set1_ps(bits_to_float(*x)); }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, Weights x) { return _mm512_fmadd_ps(w, x, sum); }
    static DS_FP6_INLINE Sum multiply_add(Sum sum, Weights w, const uint32_t* x) {
        return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum);
    }
};

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
