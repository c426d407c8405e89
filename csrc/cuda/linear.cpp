// torch.ops.ds_fp6.linear for CUDA tensors: check, return early, choose, launch.
#include "linear.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <string>

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "heuristics.h"
#include "workspace.h"

namespace ds_fp6 {
namespace cuda {

using at::Tensor;

namespace {

constexpr int kMaxDevices = 64;

// Asked for once a device.
const Device& device_of(int index) {
    static std::array<Device, kMaxDevices> devices{};
    static std::array<std::once_flag, kMaxDevices> asked;
    TORCH_CHECK(index < kMaxDevices, "at most ", kMaxDevices, " GPUs, got cuda:", index);
    std::call_once(asked[index], [index] {
        const auto ask = [index](cudaDeviceAttr attribute) {
            int value = 0;
            C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
            return value;
        };
        // kHz, twice a clock, and bits.
        const double bandwidth = 2e3 * ask(cudaDevAttrMemoryClockRate) * ask(cudaDevAttrGlobalMemoryBusWidth) / 8;
        devices[index] = {index, ask(cudaDevAttrComputeCapabilityMajor), ask(cudaDevAttrComputeCapabilityMinor),
                          ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), bandwidth};
    });
    return devices[index];
}

constexpr std::array<const char*, 4> kKernelNames = {"sm90", "sm80", "dequantize", "reference"};

// What select_kernel asked for; -1 leaves it to the heuristics.
std::atomic<int> forced_kernel{-1};

LinearKernel kernel_for(const LinearProblem& p, const Device& device) {
    const int forced = forced_kernel.load(std::memory_order_relaxed);
    if (forced < 0) return choose_kernel(p, device);
    const auto kernel = static_cast<LinearKernel>(forced);
    const bool supported = kernel == LinearKernel::kSm90   ? device.major == 9 && linear_sm90_supports(p)
                           : kernel == LinearKernel::kSm80 ? linear_sm80_supports(p)
                                                           : true;
    TORCH_CHECK(supported, "the forced kernel ", kKernelNames[forced], " does not compute ", p.m, " x ", p.n, " x ", p.k,
                " in e", p.exponent_bits, "m", p.mantissa_bits, " with ", p.groups, " scales a row on cuda:",
                device.index);
    return kernel;
}

// Makes p's x of x: [m, k], where need be a copy, which is returned and is to live on, with k a multiple of 8.
Tensor take_x(LinearProblem& p, const Tensor& x, int64_t m, int64_t k, bool contiguous) {
    Tensor rows = x.reshape({m, k});
    const auto take = [&] {
        p.x = rows.const_data_ptr(), p.k = static_cast<int>(rows.size(1));
        p.x_stride = m == 1 ? p.k : rows.stride(0);
    };
    take();
    const bool in_rows = (k == 1 || rows.stride(1) == 1) && p.x_stride >= k && (p.x_stride == k || !contiguous);
    if (in_rows && has_aligned_rows(p)) return rows;
    if (k % 8 != 0) rows = at::constant_pad_nd(rows, {0, 8 - k % 8});
    else rows = rows.clone(at::MemoryFormat::Contiguous);
    take();
    return rows;
}

// Weights of some panels at a time to `dtype`, then torch's product, y rounded once.
//
// In x's type the scaled weights are rounded as well; in fp32 nothing is rounded before y.
void multiply_dequantized(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& bias, Tensor& y,
                          int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size, at::ScalarType dtype) {
    constexpr int64_t kElementsAtOnce = int64_t(128) << 20;
    const int64_t n = scales.size(0), k = x.size(1);
    const int64_t panels = std::max<int64_t>(1, kElementsAtOnce / (k * kPanelRows));
    const Tensor dense_x = x.to(dtype);
    for (int64_t panel = 0; panel < packed.size(0); panel += panels) {
        const int64_t row = panel * kPanelRows, rows = std::min(n - row, panels * kPanelRows);
        const Tensor w = dequantize(packed.narrow(0, panel, std::min(panels, packed.size(0) - panel)),
                                    scales.narrow(0, row, rows), exponent_bits, mantissa_bits, group_size, k, dtype);
        Tensor product = at::matmul(dense_x, w.t());
        if (bias.defined()) product = product.to(at::kFloat).add_(bias.narrow(0, row, rows));
        y.narrow(1, row, rows).copy_(product);
    }
}

}  // namespace

void select_kernel(const std::string& name) {
    if (name.empty()) {
        forced_kernel = -1;
        return;
    }
    const auto found = std::find(kKernelNames.begin(), kKernelNames.end(), name);
    TORCH_CHECK_VALUE(found != kKernelNames.end(), "a CUDA kernel is one of sm90, sm80, dequantize, reference, or empty "
                      "for the best, got '", name, "'");
    forced_kernel = static_cast<int>(found - kKernelNames.begin());
}

std::string kernel_name(int64_t m, int64_t n, int64_t k, int64_t exponent_bits, int64_t mantissa_bits,
                        int64_t group_size, at::Device device) {
    check_format(exponent_bits, mantissa_bits);
    TORCH_CHECK_VALUE(device.is_cuda(), "a CUDA kernel runs on a CUDA device, not on ", device);
    const int64_t groups = check_groups(group_size, check_size("K", k));
    LinearProblem p{};
    p.exponent_bits = static_cast<int>(exponent_bits), p.mantissa_bits = static_cast<int>(mantissa_bits);
    p.groups = static_cast<int>(groups), p.group_size = groups == 1 ? 0 : static_cast<int>(group_size);
    p.m = check_size("M", m), p.n = check_size("N", n), p.k = static_cast<int>(k);
    const int index = device.has_index() ? device.index() : c10::cuda::current_device();
    return kKernelNames[static_cast<size_t>(kernel_for(p, device_of(index)))];
}

namespace {

Tensor linear_with_gate(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                        int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size, Gate gate) {
    const int bits = check_format(exponent_bits, mantissa_bits);
    TORCH_CHECK_VALUE(packed.is_cuda(), "packed must be on a CUDA device, got ", packed.device());
    check_device("x", x, "packed", packed.device());
    check_device("scales", scales, "packed", packed.device());
    TORCH_CHECK_TYPE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
                     "x must be float16 or bfloat16 on a GPU, got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.dim() >= 1, "x must be [..., K], got a scalar");
    const int k = check_size("K", x.size(-1));
    const int64_t groups = check_groups(group_size, k);
    TORCH_CHECK_VALUE(scales.dim() == 2, "scales must be [N, ", groups, "], got ", scales.sizes());
    const int n = check_size("N", scales.size(0));
    check_scales(scales, n, groups);
    const Dtype layout = check_tiles(packed, bits, n, k), dtype = check_layout(x.scalar_type());
    TORCH_CHECK_TYPE(dtype == layout, "x is ", x.scalar_type(), ", packed is laid out for ",
                     layout == Dtype::kFloat16 ? at::kHalf : at::kBFloat16);
    Tensor dense_bias;
    if (bias.has_value()) {
        check_device("bias", *bias, "packed", packed.device());
        TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type() || bias->scalar_type() == at::kFloat, "bias must be ",
                         x.scalar_type(), " as x or float32, got ", bias->scalar_type());
        TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, "bias must be [", n, "], got ", bias->sizes());
        dense_bias = bias->contiguous();
    }
    const Device& device = device_of(packed.device().index());
    TORCH_CHECK(device.major >= 8, "FP6 kernels need compute capability 8.0 or newer; cuda:", device.index, " has ",
                device.major, ".", device.minor);

    const c10::cuda::CUDAGuard guard(packed.device());
    at::DimVector shape(x.sizes().begin(), x.sizes().end());
    shape.back() = gate == Gate::kNone ? n : n / 2;
    Tensor y = at::empty(shape, x.options());
    const int64_t m = x.numel() / k;
    if (m == 0) return y;
    TORCH_CHECK_VALUE(m < (int64_t(1) << 30), "x must have fewer than 2^30 rows, got ", m);

    const Tensor tiles = packed.contiguous(), row_scales = scales.contiguous();
    LinearProblem p{};
    p.exponent_bits = static_cast<int>(exponent_bits), p.mantissa_bits = static_cast<int>(mantissa_bits);
    p.dtype = dtype;
    p.tiles = tiles.const_data_ptr<uint8_t>();
    p.scales = row_scales.const_data_ptr<float>();
    p.groups = static_cast<int>(groups), p.group_size = groups == 1 ? 0 : static_cast<int>(group_size);
    p.bias = dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr;
    p.bias_dtype = dense_bias.defined() && dense_bias.scalar_type() == at::kFloat ? Dtype::kFloat32 : p.dtype;
    p.gate = gate;
    p.y = y.mutable_data_ptr();
    p.m = static_cast<int>(m), p.n = n;

    const LinearKernel kernel = kernel_for(p, device);
    TORCH_CHECK(gate == Gate::kNone || kernel == LinearKernel::kSm90, "only the kernel sm90 has gates; ", m, " x ", n,
                " x ", k, " runs the kernel ", kKernelNames[static_cast<size_t>(kernel)]);
    if (kernel == LinearKernel::kDequantize || kernel == LinearKernel::kReference) {
        Tensor flat = y.view({m, n});
        multiply_dequantized(x.reshape({m, k}), tiles, row_scales, dense_bias, flat, exponent_bits, mantissa_bits,
                             group_size, kernel == LinearKernel::kDequantize ? x.scalar_type() : at::kFloat);
        return y;
    }
    const Tensor rows = take_x(p, x, m, k, kernel != LinearKernel::kSm90);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    void* workspace = nullptr;
    C10_CUDA_CHECK(workspace_of(device.index, stream, &workspace));
    C10_CUDA_CHECK(kernel == LinearKernel::kSm90 ? linear_sm90(p, device, workspace, stream)
                                                 : linear_sm80(p, device, workspace, stream));
    return y;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
              int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size) {
    return linear_with_gate(x, packed, scales, bias, exponent_bits, mantissa_bits, group_size, Gate::kNone);
}

Tensor gated_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                    int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size, int64_t activation) {
    const auto gate = static_cast<Gate>(activation);
    TORCH_CHECK_VALUE(gate == Gate::kGeglu || gate == Gate::kReglu || gate == Gate::kSiglu,
                      "a gated activation is 3 (GELU), 4 (ReLU) or 5 (SiLU), got ", activation);
    TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) % 2 == 0,
                      "gates need scales [N, groups] with an even N, got ", scales.sizes());
    return linear_with_gate(x, packed, scales, bias, exponent_bits, mantissa_bits, group_size, gate);
}

}  // namespace cuda
}  // namespace ds_fp6
