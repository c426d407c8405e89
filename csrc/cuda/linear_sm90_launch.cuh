// Host side of linear_sm90_kernel: tensor map, schedule, launch. No torch, no link against libcuda.
#pragma once

#include <cuda_runtime.h>

#include "linear_sm90.cuh"

namespace ds_fp6::cuda::sm90 {

struct LinearArguments {
    const void* x;          // [m, k], 16-byte aligned, k % 8 == 0
    const uint8_t* weight;  // packed tiles
    const float* scale;     // [n]
    const void* bias;       // [n] of x's type, or null
    void* y;                // [m, n], 16-byte aligned
    void* workspace;        // workspace_bytes(), zeroed once; for one stream at a time
    int m, n, k;
    int overlaps;  // may begin under the end of the kernel before it (programmatic dependent launch)
};

constexpr int kMaxBlocks = 256;  // of a grid: SMs of the GPU, times 1
constexpr int kFlagBytes = kMaxBlocks * 4 * static_cast<int>(sizeof(uint32_t));
constexpr size_t kWorkspaceBytes = kFlagBytes + static_cast<size_t>(kMaxBlocks) * 256 * 128 * sizeof(float);

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* pointer = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer)
                                                                            : nullptr;
    }();
    return function;
}

// x [m, k], row-major 16-bit values, as boxes of 64 columns and `rows` rows with the 128-byte swizzle.
template <class Element>
cudaError_t map_activations(CUtensorMap* map, const void* x, int m, int k, int rows) {
    if (encode_tiled() == nullptr) return cudaErrorNotSupported;
    constexpr CUtensorMapDataType kType = std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(m)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(k) * 2};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode_tiled()(
        map, kType, 2, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// blocks: the size of the grid at most, a multiple of the cluster.
template <class T, class Codes>
cudaError_t launch(const LinearArguments& a, int blocks, cudaStream_t stream) {
    using Layout = SharedLayout<T, Codes::kBits>;
    auto* const kernel = linear_sm90_kernel<T, Codes>;
    static const cudaError_t prepared =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes);
    if (prepared != cudaSuccess) return prepared;

    CUtensorMap x_map;
    const cudaError_t mapped = map_activations<typename Codes::Element>(&x_map, a.x, a.m, a.k, T::kSliceRows);
    if (mapped != cudaSuccess) return mapped;

    const auto round_up_div = [](int value, int by) { return (value + by - 1) / by; };
    Problem p{};
    p.weight = a.weight, p.scale = a.scale, p.bias = a.bias, p.y = a.y;
    p.published = static_cast<uint32_t*>(a.workspace);
    p.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(a.workspace) + kFlagBytes);
    p.m = a.m, p.n = a.n, p.overlap = a.overlaps;
    p.panels = round_up_div(a.n, 64);
    p.k_blocks = round_up_div(a.k, 64);
    const int tiles_n = round_up_div(p.panels, T::kPanels * T::kClusterN);
    const int tiles_m = round_up_div(a.m, T::kTokens * T::kClusterM);
    const int steps = round_up_div(p.k_blocks, T::kBlocks);
    constexpr int kTokensTogether = 1024;  // of x, kept in the L2 while the channels go by
    int workers = blocks / T::kCluster;
    if (T::kClusterK > 1) {  // a cluster computes one tile
        if (tiles_n * tiles_m > workers) return cudaErrorInvalidConfiguration;
        workers = tiles_n * tiles_m;
    }
    p.schedule = make_schedule(tiles_n, tiles_m, steps, workers, kTokensTogether / (T::kTokens * T::kClusterM));

    cudaLaunchAttribute attributes[2];
    int count = 0;
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = T::kCluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
    if (a.overlaps) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count].val.programmaticStreamSerializationAllowed = 1;
        ++count;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(p.schedule.workers * T::kCluster);
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = Layout::kBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, x_map, p);
}

}  // namespace ds_fp6::cuda::sm90
