// linear_sm90: what it computes, handed to its format's launcher, instantiated in linear_sm90_*.cu.
#include "dequant.cuh"
#include "dispatch.h"
#include "linear.h"
#include "linear_sm90_from_bf16.cuh"
#include "linear_sm90_heuristics.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

template <class Fmt>
cudaError_t launch(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);
template <class Fmt>
cudaError_t launch_bf16(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);

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

bool is_converted_in_front(const LinearProblem& problem, const Device& device) {
    return problem.dtype == Dtype::kBFloat16 && bf16_way(problem, device) == BFloat16Way::kInFront;
}

}  // namespace
}  // namespace sm90

bool linear_sm90_supports(const LinearProblem& problem) {
    if (!sm90::compiled_for_hopper()) return false;
    if (problem.groups > 1 && problem.group_size % 64 != 0) return false;
    return dispatch_format(
        problem.exponent_bits, problem.mantissa_bits,
        [](auto format) { return sm90::kInstantiated<decltype(format)>; }, false);
}

size_t linear_sm90_scratch_bytes(const LinearProblem& problem, const Device& device) {
    return sm90::is_converted_in_front(problem, device) ? sm90::f16_bytes(problem) + problem.m * sizeof(float) : 0;
}

cudaError_t linear_sm90(LinearProblem problem, const Device& device, void* workspace, void* scratch,
                        cudaStream_t stream) {
    const bool in_front = sm90::is_converted_in_front(problem, device);
    const bool in_bf16 = problem.dtype == Dtype::kBFloat16 && !in_front;
    if (in_front) {
        const cudaError_t status = sm90::convert_activations(problem, scratch, stream);
        if (status != cudaSuccess) return status;
    }
    return dispatch_format(
        problem.exponent_bits, problem.mantissa_bits,
        [&](auto format) {
            using Fmt = decltype(format);
            if constexpr (sm90::kInstantiated<Fmt>) {
                return in_bf16 ? sm90::launch_bf16<Fmt>(problem, device, workspace, stream)
                               : sm90::launch<Fmt>(problem, device, workspace, stream);
            } else {
                return cudaErrorInvalidValue;
            }
        },
        cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ds_fp6
