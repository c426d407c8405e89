// Kernels between dense weights and tiles. A warp works on 16 x 64 blocks, whose words it keeps in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pack.cuh"
#include "quantize.h"

namespace ds_fp6 {
namespace cuda {
namespace tiles {

// ---- dense elements as fp32 ----

template <Dtype D>
struct Element;
template <>
struct Element<Dtype::kFloat32> {
    using Type = float;
    static DS_FP6_DEVICE float widen(float v) { return v; }
    static DS_FP6_DEVICE float round(float v) { return v; }
};
template <>
struct Element<Dtype::kFloat16> {
    using Type = __half;
    static DS_FP6_DEVICE float widen(__half v) { return __half2float(v); }
    static DS_FP6_DEVICE __half round(float v) { return __float2half_rn(v); }
};
template <>
struct Element<Dtype::kBFloat16> {
    using Type = __nv_bfloat16;
    static DS_FP6_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
    static DS_FP6_DEVICE __nv_bfloat16 round(float v) { return __float2bfloat16_rn(v); }
};

// Two neighbours in one access.
template <class Type>
struct alignas(2 * sizeof(Type)) Two {
    Type low, high;
};

// ---- rounding ----

// Place (pack.cuh) of the code nearest to t: ties away from zero, saturating, never -0.
//
// Above the smallest normal, adding half a unit to the fp32 bits and cutting them off rounds the magnitude; a carry
// moves into the exponent by itself. Below it, units of the smallest value are counted; halves are found by
// comparison, because adding 0.5 would round a second time.
template <class Fmt>
DS_FP6_DEVICE uint32_t encode(float t) {
    constexpr int drop = 23 - Fmt::kMantissaBits;
    constexpr uint32_t rebias = uint32_t(127 - Fmt::kBias) << Fmt::kMantissaBits;
    constexpr uint32_t most = (1u << (Fmt::kBits - 1)) - 1;
    constexpr uint32_t normal = uint32_t(127 + Fmt::kMinExponent) << 23;
    constexpr uint32_t unit = uint32_t(127 - Fmt::kMinExponent + Fmt::kMantissaBits) << 23;  // 1 / smallest value
    const uint32_t bits = __float_as_uint(t), magnitude = bits & 0x7FFFFFFFu;
    uint32_t code = ((magnitude + (1u << (drop - 1))) >> drop) - rebias;
    if (magnitude < normal) {
        const float units = __uint_as_float(magnitude) * __uint_as_float(unit);
        const float whole = truncf(units);
        code = static_cast<uint32_t>(whole) + (units - whole >= 0.5f);
    }
    code = min(code, most);
    const uint32_t sign = code == 0 ? 0 : bits >> 16 & 0x8000u;
    return sign | code << BitMapOf<Fmt>::kShift;
}

template <class Fmt>
DS_FP6_DEVICE float scale_of(uint32_t largest) {
    // 2^kMaxExponent * (2 - 2^-M)
    constexpr float most = static_cast<float>(1u << Fmt::kMaxExponent) * (2.0f - 1.0f / (1u << Fmt::kMantissaBits));
    constexpr float smallest = 1.17549435e-38f;  // 2^-126: scales stay out of fp32's subnormals
    return largest == 0 ? 1.0f : fmaxf(__fdiv_rn(__uint_as_float(largest), most), smallest);
}

// ---- a block of tiles ----

template <int Bits>
DS_FP6_DEVICE void store_words(uint8_t* block, int lane, const uint32_t (&words)[Bits]) {
    using Layout = Tiles<Bits>;
#pragma unroll
    for (int i = 0; i < Layout::kVectors16; ++i)
        *reinterpret_cast<uint4*>(block + i * kLanes * 16 + lane * 16) =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    if constexpr (Layout::kVector8)
        *reinterpret_cast<uint2*>(block + Layout::kOffset8 + lane * 8) =
            make_uint2(words[4 * Layout::kVectors16], words[4 * Layout::kVectors16 + 1]);
    if constexpr (Layout::kVector4)
        *reinterpret_cast<uint32_t*>(block + Layout::kOffset4 + lane * 4) = words[Bits - 1];
}

template <int Bits>
DS_FP6_DEVICE void load_words(const uint8_t* block, int lane, uint32_t (&words)[Bits]) {
#pragma unroll
    for (int i = 0; i < Bits; ++i)
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(block + Tiles<Bits>::word_offset(lane, i)));
}

// The block that holds rows 16 * strip ... and columns 64 * panel ...
template <int Bits>
DS_FP6_DEVICE size_t block_offset(int strip, int panel, int panels) {
    return (static_cast<size_t>(strip / kPanelBlocks) * panels + panel) * Tiles<Bits>::kPanelBytes +
           strip % kPanelBlocks * Tiles<Bits>::kBlockBytes;
}

DS_FP6_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- quantize: a block of 16 warps works on 16 rows, first for their scales, then, out of the cache, for their codes ----

constexpr int kQuantizeWarps = 16;
static_assert(kQuantizeWarps == kBlockRows, "a warp finds the scales of a row");

// Largest magnitude, as fp32 bits, of row[begin, end), of which `lanes` lanes each take a share; 0x7F800000 or more for
// NaN and infinity.
template <Dtype D>
DS_FP6_DEVICE uint32_t largest_magnitude(const typename Element<D>::Type* row, int begin, int end, int lane, int lanes) {
    using Type = typename Element<D>::Type;
    uint32_t largest = 0;
    const auto take = [&](Type v) {
        largest = max(largest, __float_as_uint(Element<D>::widen(v)) & 0x7FFFFFFFu);
    };
    constexpr int kVector = 16 / sizeof(Type), kUnroll = 4;
    int at = begin;
    if (reinterpret_cast<uintptr_t>(row + begin) % 16 == 0) {
        for (; at + kUnroll * lanes * kVector <= end; at += kUnroll * lanes * kVector) {
            uint4 v[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) v[i] = __ldg(reinterpret_cast<const uint4*>(row + at) + i * lanes + lane);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const Type* element = reinterpret_cast<const Type*>(&v[i]);
#pragma unroll
                for (int j = 0; j < kVector; ++j) take(element[j]);
            }
        }
    }
    for (int i = at + lane; i < end; i += lanes) take(row[i]);
    return largest;
}

// Checks and writes the scale of one group of a row.
template <class Fmt, Dtype D>
DS_FP6_DEVICE void settle_scale(const QuantizeProblem& p, const typename Element<D>::Type* from, int row, int group,
                                uint32_t largest) {
    if (largest >= 0x7F800000u) {
        int column = group * p.group_size;
        while (isfinite(Element<D>::widen(from[column]))) ++column;
        atomicMin(&p.refused->weight, static_cast<unsigned long long>(row) * p.k + column);
    }
    const size_t at = static_cast<size_t>(row) * p.groups + group;
    const float scale = p.given == nullptr ? scale_of<Fmt>(largest) : p.given[at];
    if (p.given != nullptr && !(scale > 0.0f && isfinite(scale)))
        atomicMin(&p.refused->scale, static_cast<unsigned long long>(at));
    p.scales[at] = scale;
}

// The scales of a row, by one warp: a lane takes short groups each, all lanes a long one together.
template <class Fmt, Dtype D>
DS_FP6_DEVICE void find_scales(const QuantizeProblem& p, int row, int lane) {
    constexpr int kShort = 512;
    const auto* from = static_cast<const typename Element<D>::Type*>(p.w) + row * p.row_stride;
    const bool alone = p.group_size <= kShort;
    const int step = alone ? kLanes : 1;
    for (int first = 0; first < p.groups; first += step) {
        const int group = alone ? first + lane : first;
        if (group >= p.groups) break;
        const int begin = group * p.group_size, end = min(p.k, begin + p.group_size);
        uint32_t largest = largest_magnitude<D>(from, begin, end, alone ? 0 : lane, alone ? 1 : kLanes);
        if (!alone) largest = __reduce_max_sync(0xFFFFFFFFu, largest);
        if (alone || lane == 0) settle_scale<Fmt, D>(p, from, row, group, largest);
    }
}

// Codes of the 16 x 64 block at (row, column).
template <class Fmt, Dtype D>
DS_FP6_DEVICE void encode_block(const QuantizeProblem& p, int row, int column, int lane, bool in_pairs, uint8_t* block) {
    using Type = typename Element<D>::Type;
    const Type* from = static_cast<const Type*>(p.w);
    const int rows[2] = {row + lane / 4, row + lane / 4 + 8};
    // One scale a row of the block, unless a group ends inside it.
    const int first_group = column / p.group_size, last_column = min(column + kBlockColumns, p.k) - 1;
    const bool one_group = first_group == last_column / p.group_size;
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        scale[i] = rows[i] < p.n ? p.scales[static_cast<size_t>(rows[i]) * p.groups + first_group] : 1.0f;

    float values[kPairs][2];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
        const int r = rows[pair % 2], c = column + pair_column(lane, pair);
        const Type* at = from + r * p.row_stride + c;
        values[pair][0] = values[pair][1] = 0.0f;
        if (r >= p.n) continue;
        if (in_pairs && c + 1 < p.k) {
            const Two<Type> two = *reinterpret_cast<const Two<Type>*>(at);
            values[pair][0] = Element<D>::widen(two.low), values[pair][1] = Element<D>::widen(two.high);
        } else {
            if (c < p.k) values[pair][0] = Element<D>::widen(at[0]);
            if (c + 1 < p.k) values[pair][1] = Element<D>::widen(at[1]);
        }
    }
    uint32_t words[Fmt::kBits] = {};
    auto insert_pair = [&](auto index) {
        constexpr int pair = decltype(index)::value;
        uint32_t place[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float s = scale[pair % 2];
            const int c = column + pair_column(lane, pair) + half, r = rows[pair % 2];
            if (!one_group && r < p.n && c < p.k) s = p.scales[static_cast<size_t>(r) * p.groups + c / p.group_size];
            place[half] = encode<Fmt>(__fdiv_rn(values[pair][half], s));
        }
        insert<Fmt, pair>(place[0] | place[1] << 16, words);
    };
    for_each_pair(insert_pair);
    store_words<Fmt::kBits>(block, lane, words);
}

template <class Fmt, Dtype D>
__global__ void __launch_bounds__(kQuantizeWarps * 32) quantize_kernel(const __grid_constant__ QuantizeProblem p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = blockIdx.x, row = strip * kBlockRows;
    if (row + warp < p.n) find_scales<Fmt, D>(p, row + warp, lane);
    __syncthreads();
    const int panels = ceil_div(p.k, kPanelColumns);
    using Pair = Two<typename Element<D>::Type>;
    const bool in_pairs = reinterpret_cast<uintptr_t>(p.w) % sizeof(Pair) == 0 && p.row_stride % 2 == 0;
    for (int panel = warp; panel < panels; panel += kQuantizeWarps)
        encode_block<Fmt, D>(p, row, panel * kPanelColumns, lane, in_pairs,
                             p.tiles + block_offset<Fmt::kBits>(strip, panel, panels));
}

// ---- from tiles: a warp takes a block at a time and goes through shared memory to write along the rows ----

constexpr int kBlockWarps = 4;

template <class Fmt, Dtype D>
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
        const uint32_t places = extract<Fmt, pair, 0>(words);
        Type two[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float s = scale[pair % 2];
            const int c = column + pair_column(lane, pair) + half, r = rows[pair % 2];
            if (!one_group && r < p.n && c < p.k)
                s = __ldg(p.scales + static_cast<size_t>(r) * p.groups + c / p.group_size);
            two[half] = Element<D>::round(value_at<Fmt>(places >> (16 * half)) * s);
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

// ---- between tiles and canonical rows: blocks as bytes of codes in shared memory, in runs of 8 codes, `bits` bytes ----

constexpr int kRun = 8, kRowRuns = kBlockColumns / kRun;

template <class Fmt>
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
        const uint32_t places = extract<Fmt, pair, 0>(words);
        uint8_t* to = &codes[warp][pair_row(lane, pair)][pair_column(lane, pair)];
        to[0] = static_cast<uint8_t>(code_at<Fmt>(places));
        to[1] = static_cast<uint8_t>(code_at<Fmt>(places >> 16));
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

template <class Fmt>
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
        insert<Fmt, pair>(place_code<Fmt>(from[0]) | place_code<Fmt>(from[1]) << 16, words);
    };
    for_each_pair(insert_pair);
    store_words<Fmt::kBits>(p.to + block_offset<Fmt::kBits>(strip, panel, panels), lane, words);
}

// ---- launches ----

// Strips of 16 rows, those that only pad the last panel included.
inline int strips(int n) { return ceil_div(n, kPanelRows) * kPanelBlocks; }

inline dim3 block_grid(int n, int k) {
    return dim3(ceil_div(ceil_div(k, kPanelColumns), kBlockWarps), strips(n));
}

template <class Fmt>
cudaError_t launch_quantize(const QuantizeProblem& p, cudaStream_t stream) {
    const int grid = strips(p.n), threads = kQuantizeWarps * 32;
    switch (p.dtype) {
        case Dtype::kFloat32: quantize_kernel<Fmt, Dtype::kFloat32><<<grid, threads, 0, stream>>>(p); break;
        case Dtype::kFloat16: quantize_kernel<Fmt, Dtype::kFloat16><<<grid, threads, 0, stream>>>(p); break;
        case Dtype::kBFloat16: quantize_kernel<Fmt, Dtype::kBFloat16><<<grid, threads, 0, stream>>>(p); break;
    }
    return cudaGetLastError();
}

template <class Fmt>
cudaError_t launch_dequantize(const DequantizeProblem& p, cudaStream_t stream) {
    const dim3 grid = block_grid(p.n, p.k);
    const int threads = kBlockWarps * 32;
    switch (p.dtype) {
        case Dtype::kFloat32: dequantize_kernel<Fmt, Dtype::kFloat32><<<grid, threads, 0, stream>>>(p); break;
        case Dtype::kFloat16: dequantize_kernel<Fmt, Dtype::kFloat16><<<grid, threads, 0, stream>>>(p); break;
        case Dtype::kBFloat16: dequantize_kernel<Fmt, Dtype::kBFloat16><<<grid, threads, 0, stream>>>(p); break;
    }
    return cudaGetLastError();
}

template <class Fmt>
cudaError_t launch_pack(const RelayoutProblem& p, cudaStream_t stream) {
    pack_kernel<Fmt><<<block_grid(p.n, p.k), kBlockWarps * 32, 0, stream>>>(p);
    return cudaGetLastError();
}

template <class Fmt>
cudaError_t launch_unpack(const RelayoutProblem& p, cudaStream_t stream) {
    unpack_kernel<Fmt><<<block_grid(p.n, p.k), kBlockWarps * 32, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace tiles
}  // namespace cuda
}  // namespace ds_fp6

#define DS_FP6_INSTANTIATE_TILES(E, M)                                                                               \
    namespace ds_fp6 {                                                                                               \
    namespace cuda {                                                                                                 \
    namespace tiles {                                                                                                \
    template cudaError_t launch_quantize<Format<E, M>>(const QuantizeProblem&, cudaStream_t);                        \
    template cudaError_t launch_dequantize<Format<E, M>>(const DequantizeProblem&, cudaStream_t);                    \
    template cudaError_t launch_pack<Format<E, M>>(const RelayoutProblem&, cudaStream_t);                            \
    template cudaError_t launch_unpack<Format<E, M>>(const RelayoutProblem&, cudaStream_t);                          \
    }                                                                                                                \
    }                                                                                                                \
    }
