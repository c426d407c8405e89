// linear_sm80: hands a problem to its format's launcher, instantiated in linear_sm80_*.cu.
#include "dequant.cuh"
#include "dispatch.h"
#include "linear.h"

namespace ds_fp6 {
namespace cuda {
namespace sm80 {

template <class Fmt, class T>
cudaError_t launch(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);

}  // namespace sm80

// An extension without the Hopper kernel still links.
__attribute__((weak)) bool linear_sm90_supports(const LinearProblem&) { return false; }
__attribute__((weak)) cudaError_t linear_sm90(const LinearProblem&, const Device&, void*, cudaStream_t) {
    return cudaErrorNotSupported;
}

bool linear_sm80_supports(const LinearProblem& problem) {
    return problem.groups == 1 || problem.group_size % 16 == 0;
}

cudaError_t linear_sm80(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream) {
    return dispatch_format(
        problem.exponent_bits, problem.mantissa_bits,
        [&](auto format) {
            using Fmt = decltype(format);
            return problem.dtype == Dtype::kFloat16 ? sm80::launch<Fmt, Half>(problem, device, workspace, stream)
                                                    : sm80::launch<Fmt, BFloat16>(problem, device, workspace, stream);
        },
        cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ds_fp6
