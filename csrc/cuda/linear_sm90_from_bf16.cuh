// bf16 activations as fp16 for linear_sm90, by a kernel in front of it: each token's row is scaled as a whole.
#pragma once

#include <cuda_runtime.h>

#include "linear.h"
#include "linear_sm90_token_scale.cuh"

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
    int blocks;         // that share out a row: a cluster
};

constexpr int kRowThreads = 512;  // of a block, at most
constexpr int kRowBlocks = 4;     // at most
constexpr int kPartWarps = 8;     // of a block, where several share a row
static_assert(kRowThreads <= 1024 && kRowBlocks * kPartWarps <= 32, "row_largest");
// Vectors of a thread that stay in registers: aligned rows of up to 32768 are read once.
template <bool kWhole>
constexpr int kKeptVectors = kWhole ? 8 : 6;

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

__device__ inline void store_vector(const Rows& p, int64_t row, int index, uint4 v, float factor) {
    *reinterpret_cast<uint4*>(p.f16 + 8 * (row * p.vectors + index)) = to_f16(v, factor);
}

// The largest value of any thread of the row's blocks, which together have 32 warps at most.
__device__ inline uint32_t row_largest(const Rows& p, uint32_t value, uint32_t buffer) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = warp_largest(value);
    if (p.blocks == 1) {
        if (lane == 0) store_shared_4(buffer + warp * 4, value);
        __syncthreads();
    } else {
        cluster_sync();  // all blocks are there
        const uint32_t target = buffer + (blockIdx.x % p.blocks * warps + warp) * 4;
        if (lane < p.blocks) store_cluster_4(map_to_rank(target, lane), value);
        cluster_sync_writes();
    }
    return warp_largest(lane < warps * p.blocks ? load_shared_4(buffer + lane * 4) : 0);
}

template <bool kWhole>
__global__ void __launch_bounds__(kRowThreads, 2) linear_sm90_from_bf16_kernel(const __grid_constant__ Rows p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared[];
    launch_later_grids();
    // NOTE: in every block, also for what it writes: the kernel before may still read its own activations there.
    wait_for_earlier_grids();
    const int64_t row = blockIdx.x / p.blocks;
    const int first = blockIdx.x % p.blocks * blockDim.x + threadIdx.x, step = p.blocks * blockDim.x;
    const auto load = [&](int index) { return load_vector<kWhole>(p, p.x + row * p.stride, index); };

    constexpr int kKept = kKeptVectors<kWhole>;
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

    TokenScale scale;
    scale.set(row_largest(p, larger_half(largest), shared_address(shared)), 0);
    if (first == 0) p.scales[row] = scale.inverse();
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int index = first + i * step;
        if (index < p.vectors) store_vector(p, row, index, kept[i], scale.factor);
    }
    for (int i = first + kKept * step; i < p.vectors; i += step) store_vector(p, row, i, load(i), scale.factor);
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
    constexpr int kPerThread = 4;  // vectors, where there are enough threads
    const int warps = (p.vectors + 32 * kPerThread - 1) / (32 * kPerThread);
    // Few rows are waited for: where they are long, several blocks take a part of each. Many fill the GPU as they are.
    constexpr int kFewRows = 128;
    const int parts = (warps + kPartWarps - 1) / kPartWarps;
    p.blocks = problem.m > kFewRows ? 1 : parts < kRowBlocks ? parts : kRowBlocks;
    const int most = p.blocks > 1 ? kPartWarps : kRowThreads / 32;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = p.blocks;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(problem.m * p.blocks);
    config.blockDim = dim3(32 * (warps < most ? warps : most));
    config.dynamicSmemBytes = 32 * sizeof(uint32_t);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = p.blocks > 1 ? 2 : 1;
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
