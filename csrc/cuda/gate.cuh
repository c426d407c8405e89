// Gated activations in a linear layer's epilogue, where nothing hides them: one instruction each for the exponential and
// the reciprocal, without what makes them right for subnormal numbers.
#pragma once

#include <cmath>
#include <type_traits>

#include "linear.h"
#if defined(__CUDACC__)
#include "ptx.cuh"
#endif

namespace ds_fp6 {
namespace cuda {

__device__ inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
    return ptx::exp2_approximate(x * 1.4426950408889634f);
#else
    return std::exp(x);
#endif
}

// 0 for a divisor beyond 2^126.
__device__ inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    return ptx::reciprocal_approximate(x);
#else
    return 1.f / x;
#endif
}

// act(gate) * up. Where exp leaves fp32's range both functions end in 0 or the gate itself, as they should.
template <Gate kGate>
__device__ inline float gated(float gate, float up) {
    if constexpr (kGate == Gate::kReglu) {
        return fmaxf(gate, 0.f) * up;
    } else if constexpr (kGate == Gate::kSiglu) {
        return gate * reciprocal(1.f + exponential(-gate)) * up;
    } else {
        // GELU by tanh(z) = 1 - 2 / (exp(2z) + 1).
        const float z = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return gate * (1.f - reciprocal(exponential(2.f * z) + 1.f)) * up;
    }
}

// run(std::integral_constant of the gate), which is one.
template <class Run>
__device__ inline void with_gate(Gate gate, Run run) {
    if (gate == Gate::kReglu) run(std::integral_constant<Gate, Gate::kReglu>());
    else if (gate == Gate::kSiglu) run(std::integral_constant<Gate, Gate::kSiglu>());
    else run(std::integral_constant<Gate, Gate::kGeglu>());
}

}  // namespace cuda
}  // namespace ds_fp6
