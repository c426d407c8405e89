// torch.ops.ds_fp6.{quantize, dequantize, linear} for CPU tensors: check, allocate, split over threads, call.
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels.h"

namespace {

using namespace ds_fp6::cpu;
using at::Tensor;

FormatSpec check_format(int64_t exponent_bits, int64_t mantissa_bits) {
    const int64_t bits = 1 + exponent_bits + mantissa_bits;
    TORCH_CHECK_VALUE(1 <= exponent_bits && exponent_bits <= 5 && mantissa_bits >= 0 && 3 <= bits && bits <= 8,
                      "a format has 1 to 5 exponent bits and 3 to 8 bits in all, got exponent_bits ", exponent_bits,
                      " and mantissa_bits ", mantissa_bits);
    return {int(exponent_bits), int(mantissa_bits)};
}

Dtype check_dtype(const char* name, at::ScalarType dtype) {
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
                     " must be float32, float16 or bfloat16, got ", dtype);
    return dtype == at::kFloat ? Dtype::kFloat32 : dtype == at::kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
}

void check_cpu(const char* name, const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
}

// The weight that packed and scales hold. A group that covers the row is no group to the kernels.
PackedMatrix check_packed(const Tensor& packed, const Tensor& scales, FormatSpec format, int64_t group_size,
                          int64_t k) {
    check_cpu("packed", packed);
    check_cpu("scales", scales);
    TORCH_CHECK_VALUE(k >= 1, "in_features must be at least 1, got ", k);
    TORCH_CHECK_VALUE(group_size >= 0, "group_size must be 0 (one scale a row) or positive, got ", group_size);
    TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "packed must be uint8, got ", packed.scalar_type());
    TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, "scales must be float32, got ", scales.scalar_type());
    PackedMatrix w{nullptr, nullptr, 0, k, group_size < k ? group_size : 0, format};
    TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(1) == w.groups(), "scales of ", k, " columns in groups of ",
                      group_size, " must be [N, ", w.groups(), "], got ", scales.sizes());
    w.n = scales.size(0);
    TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == w.n && packed.size(1) == w.row_bytes(), "packed rows of ",
                      k, " codes of ", format.bits(), " bits must be [", w.n, ", ", w.row_bytes(), "], got ",
                      packed.sizes());
    return w;
}

// Items [0, count) over the threads, when each takes at least `grain` of them.
template <class Work>
void parallel(int64_t count, int64_t grain, const Work& work) {
    at::parallel_for(0, count, std::max<int64_t>(grain, 1), work);
}

// Rows of k elements that are worth a thread of their own.
int64_t grain_of_rows(int64_t k) { return 16384 / k + 1; }

void check_finite(const Tensor& w, int64_t row) {
    const Tensor values = w.select(0, row).to(at::kFloat).contiguous();
    const float* value = values.const_data_ptr<float>();
    for (int64_t column = 0; column < values.numel(); ++column)
        TORCH_CHECK_VALUE(std::isfinite(value[column]), "weight[", row, ", ", column, "] is ", value[column],
                          "; only finite weights quantize");
}

// The type of the activations, which a GPU lays codes out for, changes nothing here.
std::tuple<Tensor, Tensor> quantize(const Tensor& w, int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size,
                                    const std::optional<Tensor>& scales, std::optional<at::ScalarType>) {
    const FormatSpec format = check_format(exponent_bits, mantissa_bits);
    const Dtype dtype = check_dtype("a weight to quantize", w.scalar_type());
    check_cpu("w", w);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.numel() > 0, "a weight to quantize is [N, K] with N, K >= 1, got ", w.sizes());
    TORCH_CHECK_VALUE(group_size >= 0, "group_size must be 0 (one scale a row) or positive, got ", group_size);
    const Tensor dense = w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
    const int64_t n = w.size(0), k = w.size(1);
    PackedMatrix shape{nullptr, nullptr, n, k, group_size < k ? group_size : 0, format};

    Tensor given;
    if (scales.has_value()) {
        TORCH_CHECK_TYPE(scales->scalar_type() == at::kFloat, "scales must be float32, got ", scales->scalar_type());
        check_cpu("scales", *scales);
        TORCH_CHECK_VALUE(scales->dim() == 2 && scales->size(0) == n && scales->size(1) == shape.groups(),
                          "scales must be [", n, ", ", shape.groups(), "], got ", scales->sizes());
        given = scales->contiguous();
        const float* value = given.const_data_ptr<float>();
        for (int64_t i = 0; i < given.numel(); ++i)
            TORCH_CHECK_VALUE(std::isfinite(value[i]) && value[i] > 0, "scales[", i / shape.groups(), ", ",
                              i % shape.groups(), "] is ", value[i], "; a scale is finite and positive");
    }

    Tensor packed = at::empty({n, shape.row_bytes()}, w.options().dtype(at::kByte));
    Tensor out_scales = at::empty({n, shape.groups()}, w.options().dtype(at::kFloat));
    const QuantizeProblem problem{dense.const_data_ptr(),
                                  dtype,
                                  n,
                                  k,
                                  dense.stride(0),
                                  shape.group_size,
                                  format,
                                  given.defined() ? given.const_data_ptr<float>() : nullptr,
                                  packed.mutable_data_ptr<uint8_t>(),
                                  out_scales.mutable_data_ptr<float>()};
    const KernelSet& kernel = kernels();
    std::atomic<int64_t> first_bad{n};
    parallel(n, grain_of_rows(k), [&](int64_t begin, int64_t end) {
        const int64_t bad = kernel.quantize(problem, begin, end);
        int64_t seen = first_bad.load();
        while (bad >= 0 && bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
        }
    });
    if (first_bad < n) check_finite(w, first_bad);
    return {packed, out_scales};
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, int64_t exponent_bits, int64_t mantissa_bits,
                  int64_t group_size, int64_t in_features, at::ScalarType dtype) {
    const FormatSpec format = check_format(exponent_bits, mantissa_bits);
    const Dtype out_dtype = check_dtype("dtype", dtype);
    PackedMatrix w = check_packed(packed, scales, format, group_size, in_features);
    const Tensor rows = packed.contiguous(), row_scales = scales.contiguous();
    w.packed = rows.const_data_ptr<uint8_t>();
    w.scales = row_scales.const_data_ptr<float>();
    Tensor out = at::empty({w.n, w.k}, scales.options().dtype(dtype));
    void* to = out.mutable_data_ptr();
    const KernelSet& kernel = kernels();
    parallel(w.n, grain_of_rows(w.k),
             [&](int64_t begin, int64_t end) { kernel.dequantize(w, to, out_dtype, begin, end); });
    return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
              int64_t exponent_bits, int64_t mantissa_bits, int64_t group_size) {
    const FormatSpec format = check_format(exponent_bits, mantissa_bits);
    LinearProblem problem{};
    problem.dtype = check_dtype("x", x.scalar_type());
    check_cpu("x", x);
    TORCH_CHECK_VALUE(x.dim() >= 1, "x must be [..., K], got a scalar");
    problem.weight = check_packed(packed, scales, format, group_size, x.size(-1));
    PackedMatrix& w = problem.weight;

    Tensor dense_bias;
    if (bias.has_value()) {
        check_cpu("bias", *bias);
        TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type() || bias->scalar_type() == at::kFloat, "bias must be ",
                         x.scalar_type(), " as x or float32, got ", bias->scalar_type());
        TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == w.n, "bias must be [", w.n, "], got ", bias->sizes());
        problem.bias_dtype = check_dtype("bias", bias->scalar_type());
        dense_bias = bias->contiguous();
        problem.bias = dense_bias.const_data_ptr();
    }

    at::DimVector shape(x.sizes().begin(), x.sizes().end());
    shape.back() = w.n;
    Tensor y = at::empty(shape, x.options());
    if (y.numel() == 0) return y;
    const Tensor dense_x = x.contiguous(), rows = packed.contiguous(), row_scales = scales.contiguous();
    w.packed = rows.const_data_ptr<uint8_t>();
    w.scales = row_scales.const_data_ptr<float>();
    problem.x = dense_x.const_data_ptr();
    problem.m = x.numel() / w.k;
    problem.y = y.mutable_data_ptr();

    const KernelSet& kernel = kernels();
    const LinearPlan plan = kernel.plan_linear(problem, at::get_num_threads());
    Tensor prepared;
    const uint32_t* units = static_cast<const uint32_t*>(problem.x);
    if (!plan.use_x) {
        prepared = at::empty({problem.m, plan.ldx}, x.options().dtype(at::kInt));
        uint32_t* to = reinterpret_cast<uint32_t*>(prepared.mutable_data_ptr<int32_t>());
        parallel(problem.m, grain_of_rows(w.k),
                 [&](int64_t begin, int64_t end) { kernel.prepare_x(problem, plan, to, begin, end); });
        units = to;
    }
    // Threads fetch tasks as they come free: one that the system holds up then delays a few tasks, not its share. A
    // thread is worth waking for 16 KiB of weights times a row of x; going back for tasks, for 64 KiB.
    const int64_t task_work = plan.n_tile * w.row_bytes() * plan.m_tile;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), ceil_div(plan.tasks * task_work, 16384));
    const int64_t fetch = std::max(ceil_div(65536, task_work), plan.tasks / (16 * threads));
    std::atomic<int64_t> next{0};
    parallel(threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(fetch)) < plan.tasks;)
            kernel.linear(problem, plan, units, begin, std::min(begin + fetch, plan.tasks));
    });
    return y;
}

// Chooses the kernels by a name that DS_FP6_CPU_ISA would take ("" for the best) and returns "chosen: all that run".
std::string select_isa(const std::string& name) {
    select_kernels(name);
    return std::string(kernels().name) + ": " + available_kernels();
}

// The kernels in use and all that this CPU runs, as "chosen: best ... generic".
std::string isa() { return std::string(kernels().name) + ": " + available_kernels(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(ds_fp6, m) {
    m.def("cpu_isa() -> str", isa);
    m.def("select_cpu_isa(str name) -> str", select_isa);
}

TORCH_LIBRARY_IMPL(ds_fp6, CPU, m) {
    m.impl("quantize", quantize);
    m.impl("dequantize", dequantize);
    m.impl("linear", linear);
}

// The extension is a Python module only so that it can be imported; loading it registers the operators.
#define DS_FP6_CONCATENATE(a, b) a##b
#define DS_FP6_MODULE_INIT(name) DS_FP6_CONCATENATE(PyInit_, name)
#define DS_FP6_QUOTE(name) #name
#define DS_FP6_NAME_OF(name) DS_FP6_QUOTE(name)

PyMODINIT_FUNC DS_FP6_MODULE_INIT(TORCH_EXTENSION_NAME)() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, DS_FP6_NAME_OF(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
    return PyModule_Create(&module);
}
