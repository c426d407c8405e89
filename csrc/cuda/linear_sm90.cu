// linear_sm90: what it computes, handed to its format's launcher, instantiated in linear_sm90_*.cu.
#include "dequant.cuh"
#include "dispatch.h"
#include "linear.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

template <class Fmt, class T>
cudaError_t launch(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);

namespace {

// NOTE: code for sm_80 or its PTX has no kernel body. Hopper's architecture is always asked for as 9.0a.
constexpr bool compiled_for_hopper() {
    for (int architecture : {__CUDA_ARCH_LIST__}) {
        if (architecture == 900) return true;
    }
    return false;
}

// The formats that modes name; others are left to the sm_80 kernel, to keep the build short.
template <class Fmt>
constexpr bool kInstantiated = false;
template <> constexpr bool kInstantiated<Format<3, 2>> = true;
template <> constexpr bool kInstantiated<Format<2, 3>> = true;
template <> constexpr bool kInstantiated<Format<2, 2>> = true;
template <> constexpr bool kInstantiated<Format<2, 1>> = true;
template <> constexpr bool kInstantiated<Format<4, 3>> = true;

}  // namespace
}  // namespace sm90

bool linear_sm90_supports(const LinearProblem& problem) {
    if (!sm90::compiled_for_hopper()) return false;
    if (problem.groups > 1 && problem.group_size % 64 != 0) return false;
    return dispatch_format(
        problem.exponent_bits, problem.mantissa_bits,
        [](auto format) { return sm90::kInstantiated<decltype(format)>; }, false);
}

cudaError_t linear_sm90(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream) {
    return dispatch_format(
        problem.exponent_bits, problem.mantissa_bits,
        [&](auto format) {
            using Fmt = decltype(format);
            if constexpr (sm90::kInstantiated<Fmt>) {
                if (problem.dtype == Dtype::kFloat16) return sm90::launch<Fmt, Half>(problem, device, workspace, stream);
                return sm90::launch<Fmt, BFloat16>(problem, device, workspace, stream);
            } else {
                return cudaErrorInvalidValue;
            }
        },
        cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ds_fp6
