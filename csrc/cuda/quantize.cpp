// torch.ops.ds_fp6.{quantize, dequantize, pack, unpack} for CUDA tensors: check, allocate, launch.
#include "quantize.h"

#include <cmath>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"

namespace ds_fp6 {
namespace cuda {

using at::Tensor;

namespace {

Tensor empty_tiles(Dtype layout, int bits, int64_t n, int64_t k, const at::TensorOptions& options) {
    return at::empty(tiles_shape(layout, bits, n, k), options.dtype(at::kByte));
}

// One element of a tensor on the GPU.
float read_element(const Tensor& t, int64_t row, int64_t column, cudaStream_t stream) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    const char* from = static_cast<const char*>(t.const_data_ptr()) + (row * t.stride(0) + column * t.stride(1)) * size;
    alignas(8) char bytes[8] = {};
    C10_CUDA_CHECK(cudaMemcpyAsync(bytes, from, size, cudaMemcpyDeviceToHost, stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    switch (t.scalar_type()) {
        case at::kHalf: return *reinterpret_cast<const c10::Half*>(bytes);
        case at::kBFloat16: return *reinterpret_cast<const c10::BFloat16*>(bytes);
        default: return *reinterpret_cast<const float*>(bytes);
    }
}

// Where a kernel writes what it refuses: memory of the host, which costs neither a launch before the kernel nor a copy after
// it.
Tensor nothing_refused() {
    const Tensor refused = at::empty({2}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    *reinterpret_cast<Refused*>(refused.mutable_data_ptr<int64_t>()) = {Refused::kNone, Refused::kNone};
    return refused;
}

// What the kernel refused: the one synchronization of quantization.
void check_refused(const Tensor& refused, const Tensor& w, const Tensor& scales, cudaStream_t stream) {
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    const Refused found = *reinterpret_cast<const Refused*>(refused.const_data_ptr<int64_t>());
    if (found.weight != Refused::kNone) {
        const int64_t row = found.weight / w.size(1), column = found.weight % w.size(1);
        TORCH_CHECK_VALUE(false, "weight[", row, ", ", column, "] is ", read_element(w, row, column, stream),
                          "; only finite weights quantize");
    }
    if (found.scale != Refused::kNone) {
        const int64_t row = found.scale / scales.size(1), group = found.scale % scales.size(1);
        TORCH_CHECK_VALUE(false, "scales[", row, ", ", group, "] is ", read_element(scales, row, group, stream),
                          "; a scale is finite and positive");
    }
}

}  // namespace

std::tuple<Tensor, Tensor> quantize(const Tensor& w, int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size,
                                    const std::optional<Tensor>& scales, std::optional<at::ScalarType> dtype) {
    const int bits = check_format(exponent_bits, mantissa_bits);
    const Dtype w_dtype = check_dtype("a weight to quantize", w.scalar_type());
    const Dtype layout = check_layout(dtype.value_or(w_dtype == Dtype::kBFloat16 ? at::kBFloat16 : at::kHalf));
    TORCH_CHECK_VALUE(w.is_cuda(), "w must be on a CUDA device, got ", w.device());
    TORCH_CHECK_VALUE(w.dim() == 2 && w.numel() > 0, "a weight to quantize is [N, K] with N, K >= 1, got ", w.sizes());
    const int n = check_size("N", w.size(0)), k = check_size("K", w.size(1));
    const int64_t groups = check_groups(group_size, k);
    Tensor given;
    if (scales.has_value()) {
        check_device("scales", *scales, "w", w.device());
        check_scales(*scales, n, groups);
        given = scales->contiguous();
    }

    const c10::cuda::CUDAGuard guard(w.device());
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Tensor dense = w.stride(1) == 1 || k == 1 ? w : w.contiguous();
    Tensor packed = empty_tiles(layout, bits, n, k, w.options());
    Tensor out_scales = at::empty({n, groups}, w.options().dtype(at::kFloat));
    const Tensor refused = nothing_refused();

    QuantizeProblem p{};
    p.exponent_bits = static_cast<int>(exponent_bits), p.mantissa_bits = static_cast<int>(mantissa_bits);
    p.w = dense.const_data_ptr(), p.dtype = w_dtype, p.row_stride = dense.stride(0);
    p.n = n, p.k = k;
    p.groups = static_cast<int>(groups), p.group_size = groups == 1 ? k : static_cast<int>(group_size);
    p.given = given.defined() ? given.const_data_ptr<float>() : nullptr;
    p.tiles = packed.mutable_data_ptr<uint8_t>(), p.layout = layout;
    p.scales = out_scales.mutable_data_ptr<float>();
    p.refused = reinterpret_cast<Refused*>(refused.mutable_data_ptr<int64_t>());
    C10_CUDA_CHECK(quantize(p, stream));
    check_refused(refused, w, out_scales, stream);
    return {packed, out_scales};
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, int64_t exponent_bits, int64_t mantissa_bits,
                  int64_t group_size, int64_t in_features, at::ScalarType dtype) {
    const int bits = check_format(exponent_bits, mantissa_bits);
    const Dtype out_dtype = check_dtype("dtype", dtype);
    TORCH_CHECK_VALUE(packed.is_cuda(), "packed must be on a CUDA device, got ", packed.device());
    check_device("scales", scales, "packed", packed.device());
    const int k = check_size("in_features", in_features);
    const int64_t groups = check_groups(group_size, k);
    TORCH_CHECK_VALUE(scales.dim() == 2, "scales must be [N, ", groups, "], got ", scales.sizes());
    const int n = check_size("N", scales.size(0));
    check_scales(scales, n, groups);
    const Dtype layout = check_tiles(packed, bits, n, k);

    const c10::cuda::CUDAGuard guard(packed.device());
    const Tensor tiles = packed.contiguous(), row_scales = scales.contiguous();
    Tensor out = at::empty({n, k}, scales.options().dtype(dtype));
    DequantizeProblem p{};
    p.exponent_bits = static_cast<int>(exponent_bits), p.mantissa_bits = static_cast<int>(mantissa_bits);
    p.tiles = tiles.const_data_ptr<uint8_t>(), p.layout = layout;
    p.scales = row_scales.const_data_ptr<float>();
    p.n = n, p.k = k;
    p.groups = static_cast<int>(groups), p.group_size = groups == 1 ? k : static_cast<int>(group_size);
    p.out = out.mutable_data_ptr(), p.dtype = out_dtype;
    C10_CUDA_CHECK(dequantize(p, c10::cuda::getCurrentCUDAStream()));
    return out;
}

Tensor pack(const Tensor& rows, int64_t exponent_bits, int64_t mantissa_bits, int64_t in_features,
            at::ScalarType dtype) {
    const int bits = check_format(exponent_bits, mantissa_bits);
    const Dtype layout = check_layout(dtype);
    TORCH_CHECK_VALUE(rows.is_cuda(), "rows must be on a CUDA device, got ", rows.device());
    TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, "rows must be uint8, got ", rows.scalar_type());
    const int k = check_size("in_features", in_features);
    const int64_t row_bytes = ceil_div(int64_t(k) * bits, 8);
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == row_bytes, "rows of ", k, " codes of ", bits,
                      " bits must be [N, ", row_bytes, "], got ", rows.sizes());
    const int n = check_size("N", rows.size(0));

    const c10::cuda::CUDAGuard guard(rows.device());
    const Tensor dense = rows.contiguous();
    Tensor tiles = empty_tiles(layout, bits, n, k, rows.options());
    const RelayoutProblem p{static_cast<int>(exponent_bits), static_cast<int>(mantissa_bits),
                            dense.const_data_ptr<uint8_t>(), tiles.mutable_data_ptr<uint8_t>(), layout, n, k};
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(pack(p, stream));
    // NOTE: the sm_90 linear reads weights before it waits for the kernel that precedes it, so they must be there.
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    return tiles;
}

Tensor unpack(const Tensor& tiles, int64_t exponent_bits, int64_t mantissa_bits, int64_t out_features,
              int64_t in_features) {
    const int bits = check_format(exponent_bits, mantissa_bits);
    TORCH_CHECK_VALUE(tiles.is_cuda(), "tiles must be on a CUDA device, got ", tiles.device());
    const int n = check_size("out_features", out_features), k = check_size("in_features", in_features);
    const Dtype layout = check_tiles(tiles, bits, n, k);

    const c10::cuda::CUDAGuard guard(tiles.device());
    const Tensor dense = tiles.contiguous();
    Tensor rows = at::empty({n, ceil_div(int64_t(k) * bits, 8)}, tiles.options());
    const RelayoutProblem p{static_cast<int>(exponent_bits), static_cast<int>(mantissa_bits),
                            dense.const_data_ptr<uint8_t>(), rows.mutable_data_ptr<uint8_t>(), layout, n, k};
    C10_CUDA_CHECK(unpack(p, c10::cuda::getCurrentCUDAStream()));
    return rows;
}

}  // namespace cuda
}  // namespace ds_fp6
