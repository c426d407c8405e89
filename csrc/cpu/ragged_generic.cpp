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

namespace {

struct GenericNative : PlainNative {
    static DS_FP6_INLINE Vector load_half(const uint16_t* source) {
        return Vector{to_float(source[0]), to_float(source[1]), to_float(source[2]), to_float(source[3])};
    }
};

}  // namespace

extern const RaggedKernels kRaggedGeneric = ragged_kernels<GenericNative>();

}  // namespace cpu
}  // namespace ds_fp6
