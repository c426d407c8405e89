// What works on one token at a time: rotary embeddings with the cache's writing, norms, activations, and the product
// of a few rows with a dense weight. Included after ragged_vector.h.
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// Heads of `from` rotated by halves to `to`, head h at h * to_stride; channels beyond 2 * half are copied.
template <class Native>
void rotate_heads(const void* from, int64_t offset, void* to, int64_t to_offset, int64_t to_stride, int64_t heads,
                  int64_t size, Dtype dtype, const float* cos, const float* sin, int64_t half, float* row) {
    for (int64_t h = 0; h < heads; ++h) {
        load_floats<Native>(from, dtype, offset + h * size, size, row);
        float *first = row, *second = row + half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
        store_floats<Native>(row, dtype, to_offset + h * to_stride, size, to);
    }
}

template <class Native>
void rotary(const RotaryProblem& p, int64_t token0, int64_t token1) {
    const int64_t size = p.keys.size, kv_heads = p.keys.heads, block_size = p.keys.block_size;
    float* row = static_cast<float*>(scratch(Scratch::kRow, size_t(size) * sizeof(float)));
    for (int64_t t = token0; t < token1; ++t) {
        const int32_t* sequence = p.sequences + 4 * p.token_sequence[t];
        const int64_t position = t - sequence[0] + sequence[2];
        const int32_t* blocks = reinterpret_cast<const int32_t*>(p.block_lists[p.token_sequence[t]]);
        const int64_t block = blocks[position / block_size], token = position % block_size;
        const float *cos = p.cos + position * p.half, *sin = p.sin + position * p.half;
        if (p.half)
            rotate_heads<Native>(p.q, t * p.q_stride, p.q, t * p.q_stride, size, p.heads, size, p.dtype, cos, sin,
                                 p.half, row);
        rotate_heads<Native>(p.k, t * p.k_stride, p.keys.data,
                             block * p.keys.block_stride + token * p.keys.token_stride, p.keys.head_stride, kv_heads,
                             size, p.dtype, cos, sin, p.half, row);
        rotate_heads<Native>(p.v, t * p.v_stride, p.values.data,
                             block * p.values.block_stride + token * p.values.token_stride, p.values.head_stride,
                             kv_heads, size, p.dtype, nullptr, nullptr, 0, row);
    }
}

template <class Native>
void norm(const NormProblem& p, int64_t row0, int64_t row1) {
    const int64_t n = p.width;
    float* row = static_cast<float*>(scratch(Scratch::kRow, size_t(4 * n) * sizeof(float)));
    float *other = row + n, *gamma = other + n, *beta = gamma + n;
    load_floats<Native>(p.gamma, p.dtype, 0, n, gamma);
    if (p.beta) load_floats<Native>(p.beta, p.dtype, 0, n, beta);
    for (int64_t r = row0; r < row1; ++r) {
        load_floats<Native>(p.x, p.dtype, r * n, n, row);
        if (p.residual) {
            load_floats<Native>(p.residual, p.dtype, r * n, n, other);
            for (int64_t i = 0; i < n; ++i) row[i] += other[i];
        }
        if (p.sum) {
            store_floats<Native>(row, p.dtype, r * n, n, p.sum);
            load_floats<Native>(p.sum, p.dtype, r * n, n, row);
        }
        float mean = 0.0f, squares = 0.0f;
        if (p.beta) {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < n; ++i) mean += row[i];
            mean /= float(n);
        }
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += (row[i] - mean) * (row[i] - mean);
        const float scale = 1.0f / __builtin_sqrtf(squares / float(n) + p.epsilon);
        if (p.beta)
            for (int64_t i = 0; i < n; ++i) row[i] = (row[i] - mean) * scale * gamma[i] + beta[i];
        else
            for (int64_t i = 0; i < n; ++i) row[i] = row[i] * scale * gamma[i];
        store_floats<Native>(row, p.dtype, r * n, n, p.out);
    }
}

template <Activation kActivation>
DS_FP6_INLINE float activate(float x) {
    if (kActivation == Activation::kRelu) return x > 0.0f ? x : 0.0f;
    if (kActivation == Activation::kSilu) return x / (1.0f + exponential(-x));
    // 0.5 x (1 + tanh(y)) = x / (1 + e^-2y), y = sqrt(2 / pi) (x + 0.044715 x^3)
    if (kActivation == Activation::kGelu)
        return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    return x;
}

template <class Native, Activation kActivation>
void activation_rows(const ActivationProblem& p, int64_t row0, int64_t row1) {
    const int64_t in = p.gated ? 2 * p.width : p.width;
    float* row = static_cast<float*>(scratch(Scratch::kRow, size_t(2 * in) * sizeof(float)));
    float* bias = row + in;
    if (p.bias) load_floats<Native>(p.bias, p.dtype, 0, in, bias);
    for (int64_t r = row0; r < row1; ++r) {
        load_floats<Native>(p.x, p.dtype, r * in, in, row);
        if (p.bias)
            for (int64_t i = 0; i < in; ++i) row[i] += bias[i];
        if (p.gated)
            for (int64_t i = 0; i < p.width; ++i) row[i] = activate<kActivation>(row[2 * i]) * row[2 * i + 1];
        else
            for (int64_t i = 0; i < in; ++i) row[i] = activate<kActivation>(row[i]);
        store_floats<Native>(row, p.dtype, r * p.width, p.width, p.out);
    }
}

template <class Native>
void activation(const ActivationProblem& p, int64_t row0, int64_t row1) {
    switch (p.activation) {
        case Activation::kGelu: return activation_rows<Native, Activation::kGelu>(p, row0, row1);
        case Activation::kRelu: return activation_rows<Native, Activation::kRelu>(p, row0, row1);
        case Activation::kSilu: return activation_rows<Native, Activation::kSilu>(p, row0, row1);
        case Activation::kIdentity: return activation_rows<Native, Activation::kIdentity>(p, row0, row1);
    }
}

// kRows rows of w, expanded to fp32 in registers, times kColumns rows of x.
template <class Native, int kRows, int kColumns>
void dense_block(const DenseProblem& p, int64_t n, int64_t m) {
    const uint16_t* w = static_cast<const uint16_t*>(p.w) + n * p.w_stride;
    const float* x = p.x + m * p.k;
    Vector sums[kRows][kColumns] = {};
    int64_t k = 0;
    for (; k + kWidth <= p.k; k += kWidth) {
        Vector weights[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) weights[r] = Native::load_half(w + r * p.w_stride + k);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            const Vector column = load(x + c * p.k + k);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sums[r][c] += weights[r] * column;
        }
    }
    for (int r = 0; r < kRows; ++r) {
        float rest[kWidth] = {};
        Native::to_floats(w + r * p.w_stride + k, p.k - k, rest);
        for (int c = 0; c < kColumns; ++c) {
            float sum = 0.0f;
            for (int i = 0; i < kWidth; ++i) sum += sums[r][c][i];
            for (int64_t i = 0; i < p.k - k; ++i) sum += rest[i] * x[c * p.k + k + i];
            Native::from_floats(&sum, 1, static_cast<uint16_t*>(p.y) + (m + c) * p.y_stride + n + r);
        }
    }
}

template <class Native, int kRows>
void dense_rows(const DenseProblem& p, int64_t n) {
    int64_t m = 0;
    for (; m + 4 <= p.m; m += 4) dense_block<Native, kRows, 4>(p, n, m);
    for (; m < p.m; ++m) dense_block<Native, kRows, 1>(p, n, m);
}

template <class Native>
void dense(const DenseProblem& p, int64_t n0, int64_t n1) {
    int64_t n = n0;
    for (; n + 4 <= n1; n += 4) dense_rows<Native, 4>(p, n);
    for (; n < n1; ++n) dense_rows<Native, 1>(p, n);
}

template <class Native>
constexpr RaggedKernels ragged_kernels() {
    return {attention<Native>, rotary<Native>, norm<Native>, activation<Native>, dense<Native>};
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
