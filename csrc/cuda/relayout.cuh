// Kernels from tiles: to dense weights, and to and from canonical rows.
#pragma once

#include "quantize.cuh"

namespace ds_fp6 {
namespace cuda {
namespace tiles {

// ---- from tiles: a warp takes a block at a time and goes through shared memory to write along the rows ----

constexpr int kBlockWarps = 4;

template <class Fmt, class T, Dtype D>
__global__ void __launch_bounds__(kBlockWarps * 32) dequantize_kernel(const __grid_constant__ DequantizeProblem p) {
    using Type = typename Element<D>::Type;
    constexpr int kPitch = kBlockColumns + 16 / sizeof(Type);  // + 16 bytes spreads the rows over the banks
    __shared__ __align__(16) Type staged[kBlockWarps][kBlockRows * kPitch];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = blockIdx.y, panels = ceil_div(p.k, kPanelColumns);
    const int panel = blockIdx.x * kBlockWarps + warp;
    if (panel >= panels) return;
    const int row = strip * kBlockRows, column = panel * kPanelColumns;

    uint32_t words[Fmt::kBits];
    load_words<Fmt::kBits>(p.tiles + block_offset<Fmt::kBits>(strip, panel, panels), lane, words);
    const int first_group = column / p.group_size, last_column = min(column + kBlockColumns, p.k) - 1;
    const bool one_group = first_group == last_column / p.group_size;
    const int rows[2] = {row + lane / 4, row + lane / 4 + 8};
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        scale[i] = rows[i] < p.n ? __ldg(p.scales + static_cast<size_t>(rows[i]) * p.groups + first_group) : 0.0f;
    auto stage_pair = [&](auto index) {
        constexpr int pair = decltype(index)::value;
        const uint32_t places = extract<Fmt, T, pair>(words);
        Type two[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float s = scale[pair % 2];
            const int c = column + pair_column(lane, pair) + half, r = rows[pair % 2];
            if (!one_group && r < p.n && c < p.k)
                s = __ldg(p.scales + static_cast<size_t>(r) * p.groups + c / p.group_size);
            two[half] = Element<D>::round(value_at<Fmt, T>(places >> (16 * half)) * s);
        }
        Type* to = staged[warp] + pair_row(lane, pair) * kPitch + pair_column(lane, pair);
        *reinterpret_cast<Two<Type>*>(to) = Two<Type>{two[0], two[1]};
    };
    for_each_pair(stage_pair);
    __syncwarp();

    Type* out = static_cast<Type*>(p.out);
    constexpr int kVector = 16 / sizeof(Type), kRowVectors = kBlockColumns / kVector;
    const bool vectors = p.k % kVector == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    for (int i = lane; i < kBlockRows * kRowVectors; i += kLanes) {
        const int r = i / kRowVectors, c = i % kRowVectors * kVector;
        if (row + r >= p.n) break;
        const Type* from = staged[warp] + r * kPitch + c;
        Type* to = out + static_cast<size_t>(row + r) * p.k + column + c;
        if (vectors && column + c < p.k) {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int j = 0; j < kVector && column + c + j < p.k; ++j) to[j] = from[j];
        }
    }
}

// ---- between tiles and canonical rows: codes as bytes in shared memory, moved in runs of 8, `bits` bytes ----

constexpr int kRun = 8, kRowRuns = kBlockColumns / kRun;

template <class Fmt, class T>
__global__ void __launch_bounds__(kBlockWarps * 32) unpack_kernel(const __grid_constant__ RelayoutProblem p) {
    __shared__ __align__(16) uint8_t codes[kBlockWarps][kBlockRows][kBlockColumns];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = blockIdx.y, panels = ceil_div(p.k, kPanelColumns);
    const int panel = blockIdx.x * kBlockWarps + warp;
    if (panel >= panels) return;
    uint32_t words[Fmt::kBits];
    load_words<Fmt::kBits>(p.from + block_offset<Fmt::kBits>(strip, panel, panels), lane, words);
    auto stage_pair = [&](auto index) {
        constexpr int pair = decltype(index)::value;
        const uint32_t places = extract<Fmt, T, pair>(words);
        uint8_t* to = &codes[warp][pair_row(lane, pair)][pair_column(lane, pair)];
        to[0] = static_cast<uint8_t>(code_at<Fmt, T>(places));
        to[1] = static_cast<uint8_t>(code_at<Fmt, T>(places >> 16));
    };
    for_each_pair(stage_pair);
    __syncwarp();
    const long long row_bytes = (static_cast<long long>(p.k) * Fmt::kBits + 7) / 8;
    for (int i = lane; i < kBlockRows * kRowRuns; i += kLanes) {
        const int r = i / kRowRuns, row = strip * kBlockRows + r;
        if (row >= p.n) break;
        unsigned long long run = 0;
#pragma unroll
        for (int j = 0; j < kRun; ++j)
            run |= static_cast<unsigned long long>(codes[warp][r][i % kRowRuns * kRun + j]) << (j * Fmt::kBits);
        const long long at = (static_cast<long long>(panel) * kRowRuns + i % kRowRuns) * Fmt::kBits;
#pragma unroll
        for (int j = 0; j < Fmt::kBits; ++j)
            if (at + j < row_bytes) p.to[row * row_bytes + at + j] = static_cast<uint8_t>(run >> (8 * j));
    }
}

template <class Fmt, class T>
__global__ void __launch_bounds__(kBlockWarps * 32) pack_kernel(const __grid_constant__ RelayoutProblem p) {
    __shared__ __align__(16) uint8_t codes[kBlockWarps][kBlockRows][kBlockColumns];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = blockIdx.y, panels = ceil_div(p.k, kPanelColumns);
    const int panel = blockIdx.x * kBlockWarps + warp;
    if (panel >= panels) return;
    const long long row_bytes = (static_cast<long long>(p.k) * Fmt::kBits + 7) / 8;
    for (int i = lane; i < kBlockRows * kRowRuns; i += kLanes) {
        const int r = i / kRowRuns, row = strip * kBlockRows + r;
        const long long at = (static_cast<long long>(panel) * kRowRuns + i % kRowRuns) * Fmt::kBits;
        unsigned long long run = 0;
#pragma unroll
        for (int j = 0; j < Fmt::kBits; ++j)
            if (row < p.n && at + j < row_bytes)
                run |= static_cast<unsigned long long>(p.from[row * row_bytes + at + j]) << (8 * j);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            const bool inside = panel * kPanelColumns + i % kRowRuns * kRun + j < p.k;  // padding codes are 0
            codes[warp][r][i % kRowRuns * kRun + j] =
                inside ? static_cast<uint8_t>(run >> (j * Fmt::kBits) & (Fmt::kCodes - 1)) : uint8_t(0);
        }
    }
    __syncwarp();
    uint32_t words[Fmt::kBits] = {};
    auto insert_pair = [&](auto index) {
        constexpr int pair = decltype(index)::value;
        const uint8_t* from = &codes[warp][pair_row(lane, pair)][pair_column(lane, pair)];
        insert<Fmt, T, pair>(place_code<Fmt, T>(from[0]) | place_code<Fmt, T>(from[1]) << 16, words);
    };
    for_each_pair(insert_pair);
    store_words<Fmt::kBits>(p.to + block_offset<Fmt::kBits>(strip, panel, panels), lane, words);
}

}  // namespace tiles
}  // namespace cuda
}  // namespace ds_fp6
