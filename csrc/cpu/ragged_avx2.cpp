// The ragged batches' kernels for AVX2, FMA and F16C.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ragged.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__)

#define DS_FP6_VECTOR_WIDTH 8

DS_FP6_TARGET_BEGIN("avx2,fma,f16c,bmi2")

#include "element.h"
#include "ragged_vector.h"
#include "ragged_attention.h"
#include "ragged_rows.h"

namespace ds_fp6 {
namespace cpu {
namespace {

struct F16cNative {
    static DS_FP6_INLINE Vector load_half(const uint16_t* source) {
        return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    }
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
};

}  // namespace

extern const RaggedKernels kRaggedAvx2 = ragged_kernels<F16cNative>();

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
