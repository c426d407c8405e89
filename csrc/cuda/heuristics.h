// Which kernel and which tile for which problem: tables with their reasons. No torch.
#pragma once

#include "linear.h"

namespace ds_fp6 {
namespace cuda {

enum class LinearKernel {
    kSm90,        // linear_sm90
    kSm80,        // linear_sm80
    kDequantize,  // weights to 16 bits, then cuBLAS
    kReference,   // weights to fp32, then cuBLAS in fp32: what no kernel supports
};

// The first row whose architecture and support fit is taken.
//
//   architecture  tokens      kernel       reason
//   9.0           any         sm90         wgmma; mma.sync reaches about 62 % of its rate
//   9.0           > 192       dequantize   only what sm90 does not support gets here; cuBLAS's wgmma wins back the 2.75
//                                          bytes a weight that writing and reading 16-bit weights costs (gate_up of
//                                          LLaMA-70B, 256 tokens: 389 + 349 us against 895 us of sm80; 128: 389 + 250
//                                          against 485)
//   other         > 2048      dequantize   writing 16-bit weights is < 5 % of the product there
//   any           any         sm80
//   any           any         reference    groups that are not multiples of 16
inline LinearKernel choose_kernel(const LinearProblem& problem, const Device& device) {
    const bool hopper = device.major == 9 && device.minor == 0;
    if (hopper && linear_sm90_supports(problem)) return LinearKernel::kSm90;
    if (!linear_sm80_supports(problem)) return LinearKernel::kReference;
    if (problem.m > (hopper ? 192 : 2048)) return LinearKernel::kDequantize;
    return LinearKernel::kSm80;
}

enum class TileSm80 { kTokens16, kTokens32, kTokens64, kTokens128 };

// The narrowest tile that holds all tokens reads each weight once; from 65 tokens on the widest, whose warps share
// their dequantized weights between most tokens. Grouped scales keep two sets of sums, which 128 tokens leave no
// registers for; 32 would gain them little.
inline TileSm80 choose_tile_sm80(int tokens, bool grouped) {
    if (tokens <= 16) return TileSm80::kTokens16;
    if (grouped) return TileSm80::kTokens64;
    if (tokens <= 32) return TileSm80::kTokens32;
    return tokens <= 64 ? TileSm80::kTokens64 : TileSm80::kTokens128;
}

// Blocks worth launching: a piece of a cut tile should hold some steps, or adding it up costs more than it saves.
inline int useful_blocks_sm80(int tiles, int units) {
    constexpr int kLeastSteps = 2;
    const int pieces = units / kLeastSteps;
    return pieces > tiles ? pieces : tiles;
}

}  // namespace cuda
}  // namespace ds_fp6
