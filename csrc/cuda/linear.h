// What linear.cpp hands to a linear kernel, and what it asks of one. No torch.
//
// The seam: an architecture's launcher implements `bool linear_smXX_supports(problem)` and `linear_smXX(...)` below;
// choose_kernel (heuristics.h) says where which is used. A launcher neither allocates nor synchronizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace ds_fp6 {
namespace cuda {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// What becomes of each two channels: y[i] = act(sum[2i]) * sum[2i + 1], both rounded to y's type first; DeepSpeed's
// numbers. GELU is the one by tanh.
enum class Gate { kNone = 0, kGeglu = 3, kReglu = 4, kSiglu = 5 };

// y[m, n] = x[m, k] . value(codes)[n, k]^T * scale (+ bias[n]), accumulated in fp32, rounded once. m, n, k >= 1.
struct LinearProblem {
    int exponent_bits;
    int mantissa_bits;
    Dtype dtype;           // of x and y: fp16 or bf16
    const void* x;         // [m, k], rows x_stride apart, has_aligned_rows (linear.cpp copies and pads what has not)
    int64_t x_stride;      // elements from row to row, at least k; k for linear_sm80
    const uint8_t* tiles;  // [ceil(n / 64), ceil(k / 64), 512 * bits], laid out for dtype: common/layout.h, bit_map.h;
                           // codes beyond n or k are 0
    const float* scales;   // [n, groups]
    int groups;            // 1: one scale a row
    int group_size;        // of k; 0 where groups == 1
    const void* bias;      // [n] of bias_dtype, or null
    Dtype bias_dtype;      // dtype or fp32
    Gate gate;             // other than none for linear_sm90 only, where n is even
    void* y;               // [m, n], with a gate [m, n / 2]; contiguous, 16-byte aligned
    int m, n, k;

    int bits() const { return 1 + exponent_bits + mantissa_bits; }
};

// Whether every row of x begins and ends between two 16-byte vectors.
inline bool has_aligned_rows(const LinearProblem& p) {
    return p.k % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.x_stride % 8 == 0 || p.m == 1);
}

struct Device {
    int index;
    int major, minor;         // compute capability
    int sms;
    int shared_bytes;         // that a block may ask for
    double bytes_per_second;  // that the memory's bus can carry
};

// Scratch memory of a (device, stream), allocated once and kept. Its parts, in this order, hold when a kernel starts, and
// must hold again when it ends:
//   kWorkspaceFlagBytes    zeros
//   kWorkspaceSumBytes     kAbsentSum in every word: fp32 sums that blocks hand to each other, where no sum is yet
//   kWorkspacePieceBytes   anything
constexpr size_t kWorkspaceFlagBytes = 4096;
constexpr size_t kWorkspaceSumBytes = size_t(18) << 20;
constexpr size_t kWorkspacePieceBytes = size_t(34) << 20;
constexpr size_t kWorkspaceBytes = kWorkspaceFlagBytes + kWorkspaceSumBytes + kWorkspacePieceBytes;
// A NaN that no arithmetic returns: all its bytes are alike, too.
constexpr uint32_t kAbsentSum = 0xFFFFFFFF;

// Whether the kernel computes this problem (format, groups, bias, alignment); says nothing about speed. False where the
// extension was not compiled for the kernel's architecture.
bool linear_sm80_supports(const LinearProblem& problem);
bool linear_sm90_supports(const LinearProblem& problem);

cudaError_t linear_sm80(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);
// Only where device is 9.0.
cudaError_t linear_sm90(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace ds_fp6
