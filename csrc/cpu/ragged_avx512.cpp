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

extern const RaggedKernels kRaggedAvx512 = ragged_kernels<Avx512Native>();

}  // namespace cpu
}  // namespace ds_fp6

DS_FP6_TARGET_END

#endif  // __x86_64__
