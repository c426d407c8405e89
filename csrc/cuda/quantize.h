// Quantization, dequantization and changes of layout on the GPU, without torch. All of it is asynchronous on `stream`.
#pragma once

#include "linear.h"

namespace ds_fp6 {
namespace cuda {

// Where a weight or a scale was refused; kNone where none was. Row-major positions, the first of each.
struct Refused {
    static constexpr unsigned long long kNone = ~0ull;
    unsigned long long weight;  // row * k + column of a NaN or infinity
    unsigned long long scale;   // row * groups + group of a given scale that is not positive and finite
};

struct QuantizeProblem {
    int exponent_bits;
    int mantissa_bits;
    const void* w;  // [n, k] of dtype, row i at w + i * row_stride elements
    Dtype dtype;
    long long row_stride;
    int n, k;
    int groups;              // 1: one scale a row
    int group_size;          // of k; k where groups == 1
    const float* given;      // [n, groups], or null: scales are computed
    uint8_t* tiles;          // [ceil(n / 64), ceil(k / 64), 512 * bits]
    Dtype layout;            // fp16 or bf16: the activations that tiles are for
    float* scales;           // [n, groups]
    Refused* refused;        // both kNone before; may be memory of the host
};

struct DequantizeProblem {
    int exponent_bits;
    int mantissa_bits;
    const uint8_t* tiles;
    Dtype layout;         // fp16 or bf16: the activations that tiles are for
    const float* scales;  // [n, groups]
    int n, k;
    int groups;
    int group_size;  // k where groups == 1
    void* out;       // [n, k] of dtype, contiguous
    Dtype dtype;
};

// Codes between the canonical rows uint8 [n, ceil(k * bits / 8)] and tiles.
struct RelayoutProblem {
    int exponent_bits;
    int mantissa_bits;
    const uint8_t* from;
    uint8_t* to;
    Dtype layout;  // fp16 or bf16: the activations that tiles are for
    int n, k;
};

cudaError_t quantize(const QuantizeProblem& problem, cudaStream_t stream);
cudaError_t dequantize(const DequantizeProblem& problem, cudaStream_t stream);
cudaError_t pack(const RelayoutProblem& problem, cudaStream_t stream);    // rows to tiles
cudaError_t unpack(const RelayoutProblem& problem, cudaStream_t stream);  // tiles to rows

}  // namespace cuda
}  // namespace ds_fp6
