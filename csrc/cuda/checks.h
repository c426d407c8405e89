// Argument checks that the operators share, and the operators for bindings.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "common/layout.h"
#include "linear.h"

namespace ds_fp6 {
namespace cuda {

// Operators: schemas in ds_fp6/ops.py.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                  const std::optional<at::Tensor>& bias, int64_t exponent_bits, int64_t mantissa_bits,
                  int64_t group_size);
at::Tensor gated_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                        const std::optional<at::Tensor>& bias, int64_t exponent_bits, int64_t mantissa_bits,
                        int64_t group_size, int64_t activation);
std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& w, int64_t exponent_bits, int64_t mantissa_bits,
                                            int64_t group_size, const std::optional<at::Tensor>& scales,
                                            std::optional<at::ScalarType> dtype);
at::Tensor dequantize(const at::Tensor& packed, const at::Tensor& scales, int64_t exponent_bits, int64_t mantissa_bits,
                      int64_t group_size, int64_t in_features, at::ScalarType dtype);
at::Tensor pack(const at::Tensor& rows, int64_t exponent_bits, int64_t mantissa_bits, int64_t in_features,
                at::ScalarType dtype);
at::Tensor unpack(const at::Tensor& tiles, int64_t exponent_bits, int64_t mantissa_bits, int64_t out_features,
                  int64_t in_features);

// Makes `linear` take one kernel always: "sm90", "sm80", "dequantize" or "reference"; empty for the best.
void select_kernel(const std::string& name);

// The name of the kernel that `linear` takes on `device` for x [m, k] and weights [n, k].
std::string kernel_name(int64_t m, int64_t n, int64_t k, int64_t exponent_bits, int64_t mantissa_bits,
                        int64_t group_size, at::Device device);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// bits of the format.
inline int check_format(int64_t exponent_bits, int64_t mantissa_bits) {
    const int64_t bits = 1 + exponent_bits + mantissa_bits;
    TORCH_CHECK_VALUE(1 <= exponent_bits && exponent_bits <= 5 && mantissa_bits >= 0 && 3 <= bits && bits <= 8,
                      "a format has 1 to 5 exponent bits and 3 to 8 bits in all, got exponent_bits ", exponent_bits,
                      " and mantissa_bits ", mantissa_bits);
    return static_cast<int>(bits);
}

inline Dtype check_dtype(const char* name, at::ScalarType dtype) {
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
                     " must be float32, float16 or bfloat16, got ", dtype);
    return dtype == at::kFloat ? Dtype::kFloat32 : dtype == at::kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
}

inline void check_device(const char* name, const at::Tensor& tensor, const char* other_name, at::Device other) {
    TORCH_CHECK_VALUE(tensor.device() == other, name, " is on ", tensor.device(), ", ", other_name, " on ", other);
}

inline int check_size(const char* name, int64_t size) {
    TORCH_CHECK_VALUE(1 <= size && size < (int64_t(1) << 30), name, " must be 1 to 2^30 - 1, got ", size);
    return static_cast<int>(size);
}

// Scales in a row; a group that covers the row is no group.
inline int64_t check_groups(int64_t group_size, int64_t k) {
    TORCH_CHECK_VALUE(group_size >= 0, "group_size must be 0 (one scale a row) or positive, got ", group_size);
    return group_size ? ceil_div(k, group_size) : 1;
}

inline void check_scales(const at::Tensor& scales, int64_t n, int64_t groups) {
    TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, "scales must be float32, got ", scales.scalar_type());
    TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == n && scales.size(1) == groups, "scales must be [", n, ", ",
                      groups, "], got ", scales.sizes());
}

// What tiles may be laid out for.
inline Dtype check_layout(at::ScalarType dtype) {
    TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16,
                     "weights on a GPU are laid out for float16 or bfloat16, got ", dtype);
    return dtype == at::kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// A tensor of tiles says by its shape which activations it is laid out for: a panel's bytes are one dimension for fp16,
// and for bf16 two, of its blocks and of their bytes.
inline at::DimVector tiles_shape(Dtype layout, int bits, int64_t n, int64_t k) {
    const int64_t block_bytes = int64_t(kBlockRows) * kBlockColumns * bits / 8;
    at::DimVector shape{ceil_div(n, kPanelRows), ceil_div(k, kPanelColumns)};
    if (layout == Dtype::kBFloat16) shape.append({kPanelBlocks, block_bytes});
    else shape.push_back(kPanelBlocks * block_bytes);
    return shape;
}

// What `tiles` is laid out for.
inline Dtype check_tiles(const at::Tensor& tiles, int bits, int64_t n, int64_t k) {
    TORCH_CHECK_TYPE(tiles.scalar_type() == at::kByte, "packed must be uint8, got ", tiles.scalar_type());
    const at::DimVector for_f16 = tiles_shape(Dtype::kFloat16, bits, n, k);
    const at::DimVector for_bf16 = tiles_shape(Dtype::kBFloat16, bits, n, k);
    TORCH_CHECK_VALUE(tiles.sizes() == for_f16 || tiles.sizes() == for_bf16, "tiles of ", n, " x ", k, " codes of ",
                      bits, " bits must be ", at::IntArrayRef(for_f16), ", or for bfloat16 ",
                      at::IntArrayRef(for_bf16), ", got ", tiles.sizes());
    return tiles.sizes() == for_f16 ? Dtype::kFloat16 : Dtype::kBFloat16;
}

}  // namespace cuda
}  // namespace ds_fp6
