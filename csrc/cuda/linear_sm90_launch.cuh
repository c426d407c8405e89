// Host side of linear_sm90_kernel for one format: tensor map, schedule, launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "linear.h"
#include "linear_sm90.cuh"
#include "linear_sm90_heuristics.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

constexpr int kMaxDevices = 64;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking against it; null where it has none.
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

// x [m, k] of 16-bit values, rows `stride` elements apart, with the 128-byte swizzle. A box is `blocks` times 64 columns of
// `rows` rows: of [k / 64, m, 64], or, if it is one, of [1, m, k], where k need not be a multiple of 64.
inline cudaError_t map_activations(CUtensorMap* map, const LinearProblem& problem, int rows, int blocks) {
    if (encode_tiled() == nullptr) return cudaErrorNotSupported;
    const cuuint64_t k = problem.k, m = problem.m, row_bytes = 2 * (m == 1 ? problem.k : problem.x_stride);
    const cuuint64_t sizes[3] = {blocks > 1 ? 64 : k, m, blocks > 1 ? k / 64 : 1};
    const cuuint64_t strides[2] = {row_bytes, 128};
    const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(blocks)};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode_tiled()(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(problem.x), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The packed weights as boxes of kBlocks blocks of kPanels panels, a panel's blocks after each other.
//
// NOTE: without promotion in the L2: with 256 bytes the memory delivers less (docs/kernels.md, version 38).
template <class T, int kBits>
cudaError_t map_weights(CUtensorMap* map, const LinearProblem& problem) {
    if (encode_tiled() == nullptr) return cudaErrorNotSupported;
    constexpr int kRowBytes = kMapRowBytes<kBits>, kRows = Tiles<kBits>::kPanelBytes / kRowBytes;  // of a block
    const cuuint64_t rows = static_cast<cuuint64_t>(ceil_div(problem.k, 64)) * kRows;
    const cuuint64_t sizes[3] = {kRowBytes / 8, rows, static_cast<cuuint64_t>(ceil_div(problem.n, 64))};
    const cuuint64_t strides[2] = {kRowBytes, rows * kRowBytes};
    const cuuint32_t box[3] = {kRowBytes / 8, T::kBlocks * kRows, T::kPanels};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode_tiled()(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 3, const_cast<uint8_t*>(problem.tiles), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Raises the kernel's limit of shared memory, once a device.
template <class T, class C, bool kGrouped>
cudaError_t prepare(int device) {
    static std::atomic<bool> prepared[kMaxDevices];
    if (prepared[device].load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t status =
        cudaFuncSetAttribute(linear_sm90_kernel<T, C, kGrouped>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             SharedLayout<T, C::kBits>::kBytes);
    if (status == cudaSuccess) prepared[device].store(true, std::memory_order_relaxed);
    return status;
}

// Tokens whose activations stay in the L2 while the channels go by.
constexpr int kTokensTogether = 1024;

// `split`: how to share out the tiles; without workers, cut_split's choice.
template <class T, class C, bool kGrouped>
cudaError_t launch_tile(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream,
                        Split split = {}) {
    cudaError_t status = prepare<T, C, kGrouped>(device.index);
    if (status != cudaSuccess) return status;
    CUtensorMap x_map, weights_map{};
    const int x_blocks = problem.k % 64 == 0 ? T::kCopiedBlocks : 1;
    status = map_activations(&x_map, problem, T::kTokens, x_blocks);
    if (status == cudaSuccess && T::kMapsWeights) status = map_weights<T, C::kBits>(&weights_map, problem);
    if (status != cudaSuccess) return status;

    Problem p{};
    p.tiles = problem.tiles;
    p.scales = problem.scales;
    p.bias = problem.bias;
    p.bias_is_fp32 = problem.bias != nullptr && problem.bias_dtype == Dtype::kFloat32;
    p.gate = problem.gate;
    p.y = problem.y;
    p.x_blocks = x_blocks;
    p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + kWorkspaceFlagBytes);
    p.m = problem.m, p.n = problem.n;
    p.groups = problem.groups, p.group_blocks = kGrouped ? problem.group_size / 64 : 1;
    p.panels = ceil_div(problem.n, 64), p.k_blocks = ceil_div(problem.k, 64);
    const Tiling tiling = Tiling::of<T>(problem, device);
    if (split.workers == 0) split = tiling.cut();
    p.schedule = make_schedule(tiling.tiles_n, tiling.tiles_m, tiling.steps, split, kTokensTogether / T::kTokens);
    const size_t consumers = static_cast<size_t>(p.schedule.workers) * T::kClusterK * T::kGroups;  // that send
    if (consumers * T::kOwnPanels * T::kOwnSums * 128 * sizeof(float) > kWorkspaceSumBytes) {
        return cudaErrorInvalidConfiguration;
    }

    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = T::kClusterK;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(p.schedule.workers * T::kClusterK);
    config.blockDim = dim3(Threads<T, kGrouped>::kCount);
    config.dynamicSmemBytes = SharedLayout<T, C::kBits>::kBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = T::kClusterK > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, linear_sm90_kernel<T, C, kGrouped>, x_map, p, weights_map);
}

// T: Half or BFloat16, the activations.
template <class Fmt, class T>
cudaError_t launch(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream) {
    using C = Codes<Fmt, T>;
    const Plan plan = choose_plan(problem, device);
    const auto run = [&](auto tile, auto grouped) {
        return launch_tile<decltype(tile), C, decltype(grouped)::value>(problem, device, workspace, stream, plan.split);
    };
    if (problem.groups > 1) {
        return GroupedTiles::with(plan.tile, [&](auto tile) { return run(tile, std::true_type()); });
    }
    return UngroupedTiles::with(plan.tile, [&](auto tile) { return run(tile, std::false_type()); });
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6

#define DS_FP6_INSTANTIATE_SM90(E, M, T)                                                                          \
    template cudaError_t ds_fp6::cuda::sm90::launch<ds_fp6::Format<E, M>, T>(                                     \
        const ds_fp6::cuda::LinearProblem&, const ds_fp6::cuda::Device&, void*, cudaStream_t);
