// The CPU kernels as bindings.cpp sees them: plain pointers in, plain pointers out, no torch.
//
// A kernel works on a range of rows or tasks, so that the caller owns the threads. Every instruction set has one
// KernelSet; isa.cpp picks one for the process.
#pragma once

#include <cstdint>
#include <string>

namespace ds_fp6 {
namespace cpu {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The run-time twin of Format<E, M> in csrc/common/format.h.
struct FormatSpec {
    int exponent_bits;
    int mantissa_bits;

    int bits() const { return 1 + exponent_bits + mantissa_bits; }
    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    // The value of each of the 2^bits codes, exact; entries beyond repeat them, so that bits above a code are ignored.
    void values(float table[256]) const;
    float max() const;
};

// A quantized weight [n, k] in the canonical layout: code j of a row is bits [j * bits, (j + 1) * bits) of its bytes.
struct PackedMatrix {
    const uint8_t* packed;  // [n, row_bytes()]
    const float* scales;    // [n, groups()]
    int64_t n;
    int64_t k;
    int64_t group_size;  // weights of a row that share a scale; 0: all of them
    FormatSpec format;

    int64_t row_bytes() const { return ceil_div(k * format.bits(), 8); }
    int64_t groups() const { return group_size ? ceil_div(k, group_size) : 1; }
};

// y[m, n] = x[m, k] . value(codes)[n, k]^T * scale (+ bias[n]), accumulated in fp32 and rounded once.
struct LinearProblem {
    PackedMatrix weight;
    const void* x;  // [m, k] of dtype, contiguous
    int64_t m;
    Dtype dtype;       // of x and y
    const void* bias;  // [n] of bias_dtype, or null
    Dtype bias_dtype;
    void* y;  // [m, n] of dtype, contiguous
};

// How a KernelSet will compute a LinearProblem.
struct LinearPlan {
    bool dot;           // few rows of x: dot products straight from registers; else tiles expanded in cache
    bool bf16;          // multiply pairs of bf16 (AVX512_BF16); else fp32
    bool scale_weights; // groups that do not fit the kernel's chunks: the scale goes into the expanded weights
    bool use_x;         // x can be read where it is; else prepare_x copies it, converted and padded with zeros
    int64_t ldx;        // 4-byte units between rows of the x that is read
    int64_t n_tile;     // rows of the weight in a task
    int64_t m_tile;     // rows of x in a task
    int64_t tasks;
};

struct QuantizeProblem {
    const void* w;  // [n, k] of dtype, row i at w + i * row_stride elements
    Dtype dtype;
    int64_t n;
    int64_t k;
    int64_t row_stride;
    int64_t group_size;
    FormatSpec format;
    const float* given_scales;  // [n, groups], or null: compute them
    uint8_t* packed;            // [n, row_bytes]
    float* scales;              // [n, groups]
};

struct KernelSet {
    const char* name;
    LinearPlan (*plan_linear)(const LinearProblem&, int threads);
    // Rows [m0, m1) of x to `prepared` [m, plan.ldx], 4-byte units of one fp32 or two bf16.
    void (*prepare_x)(const LinearProblem&, const LinearPlan&, uint32_t* prepared, int64_t m0, int64_t m1);
    // Tasks [t0, t1) of plan.tasks; x is `prepared`, or the problem's own x where plan.use_x.
    void (*linear)(const LinearProblem&, const LinearPlan&, const uint32_t* x, int64_t t0, int64_t t1);
    // out[n, k] = value(code) * scale for rows [n0, n1).
    void (*dequantize)(const PackedMatrix&, void* out, Dtype, int64_t n0, int64_t n1);
    // Rows [n0, n1); the first of them that holds a NaN or an infinity, or -1.
    int64_t (*quantize)(const QuantizeProblem&, int64_t n0, int64_t n1);
};

extern const KernelSet kGenericKernels;
#if defined(__x86_64__)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512BaseKernels;  // F, BW, DQ, VL
extern const KernelSet kAvx512VbmiKernels;
extern const KernelSet kAvx512Bf16Kernels;  // VBMI and BF16
#endif

// The kernels in use: what DS_FP6_CPU_ISA names when it is first asked for, else the best this CPU runs.
// Throws std::invalid_argument that lists what there is.
const KernelSet& kernels();
// Forces the kernels by the name that DS_FP6_CPU_ISA would take; an empty name goes back to the best.
void select_kernels(const std::string& name);
// The names this CPU can run, best first, separated by spaces.
std::string available_kernels();

}  // namespace cpu
}  // namespace ds_fp6
