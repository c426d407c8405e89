// The ragged batches' kernels for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ragged.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__)

#define DS_FP6_VECTOR_WIDTH 16

DS_FP6_TARGET_BEGIN("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

#include "element.h"
#include "math_avx512.h"
#include "ragged_vector.h"
#include "ragged_attention.h"
#include "ragged_rows.h"

namespace ds_fp6 {
namespace cpu {

namespace {

struct Native512 : Avx512Native {
    static DS_FP6_INLINE Vector load_half(const uint16_t* source) {
        return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    }
};

}  // namespace

extern const RaggedKernels kRaggedAvx512 = ragged_kernels<Native512>();

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
