// Host side of linear_sm80_kernel for one format and activation type: tile, grid, launch.
#pragma once

#include <atomic>

#include "heuristics.h"
#include "linear.h"
#include "linear_sm80.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm80 {

constexpr int kMaxDevices = 64;

// Blocks that fit an SM; raises the kernel's limit of shared memory on the way. Asked for once a device.
template <class Fmt, class T, class Tile, bool Grouped>
cudaError_t resident_blocks(int device, int& blocks) {
    static std::atomic<int> known[kMaxDevices];
    blocks = known[device].load(std::memory_order_relaxed);
    if (blocks > 0) return cudaSuccess;
    constexpr int shared = SharedLayout<Tile, Fmt::kBits>::kBytes;
    auto* const kernel = linear_sm80_kernel<Fmt, T, Tile, Grouped>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared);
    if (status != cudaSuccess) return status;
    if (blocks < 1) return cudaErrorLaunchOutOfResources;
    known[device].store(blocks, std::memory_order_relaxed);
    return cudaSuccess;
}

template <class Fmt, class T, class Tile, bool Grouped>
cudaError_t launch_tile(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream) {
    int resident = 0;
    const cudaError_t status = resident_blocks<Fmt, T, Tile, Grouped>(device.index, resident);
    if (status != cudaSuccess) return status;

    const auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
    Problem p{};
    p.tiles = problem.tiles;
    p.x = static_cast<const uint16_t*>(problem.x);
    p.scales = problem.scales;
    p.bias = problem.bias;
    p.bias_is_fp32 = problem.bias_dtype == Dtype::kFloat32;
    p.y = static_cast<uint16_t*>(problem.y);
    p.arrived = static_cast<uint32_t*>(workspace);
    p.partials = reinterpret_cast<float4*>(static_cast<uint8_t*>(workspace) + kWorkspaceFlagBytes +
                                            kWorkspaceSumBytes);
    p.m = problem.m, p.n = problem.n, p.k = problem.k;
    p.groups = problem.groups, p.group_size = problem.group_size;
    p.panels_n = ceil_div(p.n, kPanelRows), p.panels_k = ceil_div(p.k, kPanelColumns);
    p.tiles_m = ceil_div(p.m, Tile::kTokens);
    p.steps = ceil_div(p.panels_k, Tile::kWarpsK);
    const long long tiles = static_cast<long long>(ceil_div(p.panels_n, kPanels)) * p.tiles_m;
    if (tiles * p.steps > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    const int units = static_cast<int>(tiles * p.steps);

    constexpr int kMostBlocks = kWorkspaceFlagBytes / sizeof(uint32_t);
    constexpr int kMostPartials = kWorkspacePieceBytes / (2 * Tile::kPartialBytes);
    int grid = device.sms * resident;
    grid = grid < kMostBlocks ? grid : kMostBlocks;
    grid = grid < kMostPartials ? grid : kMostPartials;
    const int useful = useful_blocks_sm80(static_cast<int>(tiles), units);
    grid = grid < useful ? grid : useful;
    p.range_least = units / grid, p.range_more = units % grid;
    linear_sm80_kernel<Fmt, T, Tile, Grouped>
        <<<grid, kThreads, SharedLayout<Tile, Fmt::kBits>::kBytes, stream>>>(p);
    return cudaGetLastError();
}

template <class Fmt, class T>
cudaError_t launch(const LinearProblem& problem, const Device& device, void* workspace, cudaStream_t stream) {
    if (problem.groups > 1) {
        return choose_tile_sm80(problem.m, true) == TileSm80::kTokens16
                   ? launch_tile<Fmt, T, Tile<16, 2, 4>, true>(problem, device, workspace, stream)
                   : launch_tile<Fmt, T, Tile<64, 2, 3>, true>(problem, device, workspace, stream);
    }
    switch (choose_tile_sm80(problem.m, false)) {
        case TileSm80::kTokens16: return launch_tile<Fmt, T, Tile<16, 2, 4>, false>(problem, device, workspace, stream);
        case TileSm80::kTokens32: return launch_tile<Fmt, T, Tile<32, 2, 4>, false>(problem, device, workspace, stream);
        case TileSm80::kTokens64: return launch_tile<Fmt, T, Tile<64, 2, 3>, false>(problem, device, workspace, stream);
        default: return launch_tile<Fmt, T, Tile<128, 1, 4>, false>(problem, device, workspace, stream);
    }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace ds_fp6

#define DS_FP6_INSTANTIATE_SM80(E, M, T)                                                                          \
    template cudaError_t ds_fp6::cuda::sm80::launch<ds_fp6::Format<E, M>, T>(                                     \
        const ds_fp6::cuda::LinearProblem&, const ds_fp6::cuda::Device&, void*, cudaStream_t);
