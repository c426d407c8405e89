// bf16 activations as fp16 for linear_sm90, whose weights take a third fewer instructions to become fp16 than bf16.
//
// A token's row is multiplied by the power of two that takes its largest magnitude to [2^15, 2^16); the epilogue multiplies
// the token's sums by the inverse. Elements of at least 2^-32 of the row's largest stay exact, smaller ones are off by at
// most 2^-40 of it. Rows in which all are below 2^-110 are multiplied by 2^126, and exact too. An infinity or NaN stays
// one, and spoils its own row only.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "linear.h"
#include "ptx_sm90.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

struct Rows {
    const uint16_t* x;  // [m, k] bf16
    int64_t stride;     // elements from row to row
    int k;
    uint16_t* f16;      // [m, 8 * vectors], 16-byte aligned; zeros past k
    float* scales;      // [m], x = f16 * scale
    int vectors;        // of 8 elements: ceil(k / 8)
};

constexpr int kRowThreads = 512;  // at most
constexpr int kKept = 8;          // vectors of a thread that stay in registers: rows of up to 32768 are read once

// kWhole: every vector is aligned and within k.
template <bool kWhole>
__device__ inline uint4 load_vector(const Rows& p, const uint16_t* row, int index) {
    const uint16_t* first = row + 8 * static_cast<int64_t>(index);
    if constexpr (kWhole) return *reinterpret_cast<const uint4*>(first);
    const int left = p.k - 8 * index;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < left) words[i / 2] |= static_cast<uint32_t>(first[i]) << i % 2 * 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The largest magnitude of a vector and `largest`: bf16 without its sign, in the upper 15 bits.
__device__ inline uint32_t largest_of(uint4 v, uint32_t largest) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (const uint32_t word : words) {
        largest = larger(largest, word << 1);
        largest = larger(largest, word << 17);
    }
    return largest;
}

__device__ inline uint32_t to_f16(uint32_t pair, float factor) {
    const __half2 converted =
        __floats2half2_rn(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xFFFF0000u) * factor);
    return reinterpret_cast<const uint32_t&>(converted);
}

__device__ inline void store_vector(const Rows& p, int64_t row, int index, uint4 v, float factor) {
    *reinterpret_cast<uint4*>(p.f16 + 8 * (row * p.vectors + index)) =
        make_uint4(to_f16(v.x, factor), to_f16(v.y, factor), to_f16(v.z, factor), to_f16(v.w, factor));
}

// The largest value of any thread of the block.
__device__ inline uint32_t block_largest(uint32_t value, uint32_t buffer) {
    const int warps = blockDim.x / 32;
    value = warp_largest(value);
    if (threadIdx.x % 32 == 0) store_shared_4(buffer + threadIdx.x / 32 * 4, value);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return warp_largest(lane < warps ? load_shared_4(buffer + lane * 4) : 0);
}

// One block a row.
template <bool kWhole>
__global__ void __launch_bounds__(kRowThreads) linear_sm90_from_bf16_kernel(const __grid_constant__ Rows p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared[];
    launch_later_grids();
    // NOTE: in every block, also for what it writes: the kernel before may still read its own activations there.
    wait_for_earlier_grids();
    const int64_t row = blockIdx.x;
    const int first = threadIdx.x, step = blockDim.x;
    const auto load = [&](int index) { return load_vector<kWhole>(p, p.x + row * p.stride, index); };

    uint4 kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int index = first + i * step;
        kept[i] = index < p.vectors ? load(index) : make_uint4(0, 0, 0, 0);
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) largest = largest_of(kept[i], largest);
    for (int i = first + kKept * step; i < p.vectors; i += step) largest = largest_of(load(i), largest);

    // NOTE: exponents as fp32 has them, biased by 127; the factor's is at most 253, so that its inverse is normal.
    const uint32_t exponent = larger(block_largest(largest, shared_address(shared)) >> 24, 16);
    const float factor = __uint_as_float((127 + 142 - exponent) << 23);
    if (first == 0) p.scales[row] = __uint_as_float((exponent + 127 - 142) << 23);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int index = first + i * step;
        if (index < p.vectors) store_vector(p, row, index, kept[i], factor);
    }
    for (int i = first + kKept * step; i < p.vectors; i += step) store_vector(p, row, i, load(i), factor);
#endif
}

// Bytes of the fp16 activations, in front of their scales.
inline size_t f16_bytes(const LinearProblem& problem) {
    const size_t bytes = static_cast<size_t>(problem.m) * ((problem.k + 7) / 8) * 16;
    return (bytes + 255) / 256 * 256;
}

// Launches the conversion into `scratch` and makes `problem` that of its result.
inline cudaError_t convert_activations(LinearProblem& problem, void* scratch, cudaStream_t stream) {
    Rows p{};
    p.x = static_cast<const uint16_t*>(problem.x);
    p.stride = problem.x_stride;
    p.k = problem.k;
    p.f16 = static_cast<uint16_t*>(scratch);
    p.scales = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + f16_bytes(problem));
    p.vectors = (problem.k + 7) / 8;

    const bool whole = has_aligned_rows(problem);
    constexpr int kPerThread = 4;  // vectors, where the block is not full
    const int warps = (p.vectors + 32 * kPerThread - 1) / (32 * kPerThread);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(problem.m);
    config.blockDim = dim3(32 * (warps < kRowThreads / 32 ? warps : kRowThreads / 32));
    config.dynamicSmemBytes = kRowThreads / 32 * sizeof(uint32_t);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    problem.x = p.f16;
    problem.x_scales = p.scales;
    problem.k = 8 * p.vectors;
    problem.x_stride = problem.k;
    auto* const kernel = whole ? linear_sm90_from_bf16_kernel<true> : linear_sm90_from_bf16_kernel<false>;
    return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
