// Vectors of kWidth floats, transposition, small matrix products and exp(). Included between DS_FP6_TARGET_BEGIN and
// _END (target.h) with DS_FP6_VECTOR_WIDTH set to the floats in a register.
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

constexpr int kWidth = DS_FP6_VECTOR_WIDTH;
typedef float Vector __attribute__((vector_size(4 * DS_FP6_VECTOR_WIDTH)));
typedef float UnalignedVector __attribute__((vector_size(4 * DS_FP6_VECTOR_WIDTH), aligned(4), may_alias));

DS_FP6_INLINE Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
DS_FP6_INLINE void store(float* to, Vector v) { *reinterpret_cast<UnalignedVector*>(to) = v; }

// The first, and the second, halves of a and b with their elements taking turns.
#if DS_FP6_VECTOR_WIDTH == 16
DS_FP6_INLINE Vector interleave_low(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
DS_FP6_INLINE Vector interleave_high(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif DS_FP6_VECTOR_WIDTH == 8
DS_FP6_INLINE Vector interleave_low(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
DS_FP6_INLINE Vector interleave_high(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
DS_FP6_INLINE Vector interleave_low(Vector a, Vector b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
DS_FP6_INLINE Vector interleave_high(Vector a, Vector b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// out[j][i] = in[i][j] for kWidth x kWidth. Each round of interleaving moves one bit of the row index to the column.
DS_FP6_INLINE void transpose_square(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    Vector rows[kWidth], next[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = load(in + i * in_stride);
    for (int span = 1; span < kWidth; span *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kWidth / 2; ++i) {
            next[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2]);
            next[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(out + i * out_stride, rows[i]);
}

// c[kRows][kVectors * kWidth] (+)= a[kRows][depth] * b[depth][...], all fp32, strides in floats.
template <int kRows, int kVectors>
DS_FP6_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                  int64_t c_stride, int64_t depth, bool add) {
    Vector sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? load(c + r * c_stride + v * kWidth) : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * a_stride + k] * row[v];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kWidth, sum[r][v]);
}

template <int kRows>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                   int64_t columns, int64_t depth, bool add) {
    // Four rows of four vectors fill half of AVX-512's registers; the others have half as many.
    constexpr int kVectors = kWidth == 16 ? 4 : 2;
    int64_t n = 0;
    for (; n + kVectors * kWidth <= columns; n += kVectors * kWidth)
        multiply_block<kRows, kVectors>(a, a_stride, b + n, b_stride, c + n, c_stride, depth, add);
    for (; n < columns; n += kWidth)
        multiply_block<kRows, 1>(a, a_stride, b + n, b_stride, c + n, c_stride, depth, add);
}

// c[rows][columns] (+)= a[rows][depth] * b[depth][columns]; columns is a multiple of kWidth.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              int64_t rows, int64_t columns, int64_t depth, bool add) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        multiply_rows<4>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, columns, depth, add);
    for (; r < rows; ++r)
        multiply_rows<1>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, columns, depth, add);
}

// e^x to about 1 unit in the last place, without a branch, so that loops over it vectorize. Beyond +-87, the value at
// +-87. x / ln 2 is split into an integer and a rest in +-1/2; the rest's power of two is a polynomial.
DS_FP6_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    // Adding 1.5 * 2^23 leaves an fp32 sum no fraction, and the integer in its low bits.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float whole = shifted - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * rest + 1.3981999e-3f;
    p = p * rest + 8.3334519e-3f;
    p = p * rest + 4.1665796e-2f;
    p = p * rest + 1.6666665e-1f;
    p = p * rest + 5.0000001e-1f;
    p = p * rest * rest + rest + 1.0f;
    return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
