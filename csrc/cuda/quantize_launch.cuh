// Host side of the kernels of quantize.cuh and relayout.cuh for one format.
#pragma once

#include <type_traits>

#include "quantize.cuh"
#include "relayout.cuh"

namespace ds_fp6 {
namespace cuda {
namespace tiles {

// Strips of 16 rows, those that only pad the last panel included.
inline int strips(int n) { return ceil_div(n, kPanelRows) * kPanelBlocks; }

inline dim3 block_grid(int n, int k) {
    return dim3(ceil_div(ceil_div(k, kPanelColumns), kBlockWarps), strips(n));
}

// launch(Half() or BFloat16()), then what the launch said.
template <class Launch>
cudaError_t for_layout(Dtype layout, Launch launch) {
    if (layout == Dtype::kFloat16) launch(Half());
    else if (layout == Dtype::kBFloat16) launch(BFloat16());
    else return cudaErrorInvalidValue;
    return cudaGetLastError();
}

// launch(the type as a compile-time constant).
template <class Launch>
void for_dtype(Dtype dtype, Launch launch) {
    switch (dtype) {
        case Dtype::kFloat32: launch(std::integral_constant<Dtype, Dtype::kFloat32>()); break;
        case Dtype::kFloat16: launch(std::integral_constant<Dtype, Dtype::kFloat16>()); break;
        case Dtype::kBFloat16: launch(std::integral_constant<Dtype, Dtype::kBFloat16>()); break;
    }
}

template <class Fmt>
cudaError_t launch_quantize(const QuantizeProblem& p, cudaStream_t stream) {
    return for_layout(p.layout, [&](auto layout) {
        for_dtype(p.dtype, [&](auto dtype) {
            quantize_kernel<Fmt, decltype(layout), dtype><<<strips(p.n), kQuantizeWarps * 32, 0, stream>>>(p);
        });
    });
}

template <class Fmt>
cudaError_t launch_dequantize(const DequantizeProblem& p, cudaStream_t stream) {
    return for_layout(p.layout, [&](auto layout) {
        for_dtype(p.dtype, [&](auto dtype) {
            dequantize_kernel<Fmt, decltype(layout), dtype>
                <<<block_grid(p.n, p.k), kBlockWarps * 32, 0, stream>>>(p);
        });
    });
}

template <class Fmt>
cudaError_t launch_pack(const RelayoutProblem& p, cudaStream_t stream) {
    return for_layout(p.layout, [&](auto layout) {
        pack_kernel<Fmt, decltype(layout)><<<block_grid(p.n, p.k), kBlockWarps * 32, 0, stream>>>(p);
    });
}

template <class Fmt>
cudaError_t launch_unpack(const RelayoutProblem& p, cudaStream_t stream) {
    return for_layout(p.layout, [&](auto layout) {
        unpack_kernel<Fmt, decltype(layout)><<<block_grid(p.n, p.k), kBlockWarps * 32, 0, stream>>>(p);
    });
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
