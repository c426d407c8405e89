// Registers the CUDA operators; an otherwise empty Python module, so that loading it is an import.
#include <Python.h>

#include <torch/library.h>

#include "checks.h"

TORCH_LIBRARY_FRAGMENT(ds_fp6, m) {
    m.def("select_cuda_kernel(str name) -> ()", ds_fp6::cuda::select_kernel);
    m.def(
        "cuda_kernel_name(int m, int n, int k, int exponent_bits, int mantissa_bits, int group_size, Device device) "
        "-> str",
        ds_fp6::cuda::kernel_name);
}

TORCH_LIBRARY_IMPL(ds_fp6, CUDA, m) {
    m.impl("quantize", ds_fp6::cuda::quantize);
    m.impl("dequantize", ds_fp6::cuda::dequantize);
    m.impl("linear", ds_fp6::cuda::linear);
    m.impl("gated_linear", ds_fp6::cuda::gated_linear);
    m.impl("pack", ds_fp6::cuda::pack);
    m.impl("unpack", ds_fp6::cuda::unpack);
}

#define DS_FP6_CONCATENATE(a, b) a##b
#define DS_FP6_MODULE_INIT(name) DS_FP6_CONCATENATE(PyInit_, name)
#define DS_FP6_QUOTE(name) #name
#define DS_FP6_NAME_OF(name) DS_FP6_QUOTE(name)

PyMODINIT_FUNC DS_FP6_MODULE_INIT(TORCH_EXTENSION_NAME)() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, DS_FP6_NAME_OF(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
    return PyModule_Create(&module);
}
