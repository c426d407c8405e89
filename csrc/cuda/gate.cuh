// Gated activations in a linear layer's epilogue.
#pragma once

#include <cmath>

#include "linear.h"

namespace ds_fp6 {
namespace cuda {

__device__ inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return std::exp(x);
#endif
}

// A divisor beyond 2^126 gives 0. A precise quotient would be a call.
__device__ inline float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// act(gate) * up. Where exp leaves fp32's range both functions end in 0 or the gate itself, as they should.
__device__ inline float gated(Gate kind, float gate, float up) {
    if (kind == Gate::kReglu) return fmaxf(gate, 0.f) * up;
    if (kind == Gate::kSiglu) return quotient(gate, 1.f + exponential(-gate)) * up;
    // GELU by tanh(z) = 1 - 2 / (exp(2z) + 1).
    const float z = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (2.f - quotient(2.f, exponential(2.f * z) + 1.f)) * up;
}

}  // namespace cuda
}  // namespace ds_fp6
