// The ragged batches' kernels for any CPU.
#include <cstddef>
#include <cstdint>

#include "ragged.h"
#include "scratch.h"
#include "target.h"

#define DS_FP6_VECTOR_WIDTH 4

#include "element.h"
#include "ragged_vector.h"
#include "ragged_attention.h"
#include "ragged_rows.h"

namespace ds_fp6 {
namespace cpu {

extern const RaggedKernels kRaggedGeneric = ragged_kernels<PlainNative>();

}  // namespace cpu
}  // namespace ds_fp6
