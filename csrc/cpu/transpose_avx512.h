// Rows to columns in AVX-512 registers. Included between DS_FP6_TARGET_BEGIN and _END (target.h).
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// 16 rows of 64 codes in natural order: codes[r] of row r becomes codes[t], t = 0..15, which holds the 16 rows' codes of
// pairs 2t and 2t + 1 along K, laid out so that _mm512_unpack{lo,hi}_epi8 of their value bytes give
// 16 x (bf16, bf16) of one pair each, rows in order.
DS_FP6_INLINE void transpose_pairs(__m512i codes[16]) {
    __m512i quads[4][4];  // [which pairs of a lane][rows / 4]: 16-bit pairs of four rows side by side
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i a0 = _mm512_unpacklo_epi16(codes[4 * i], codes[4 * i + 1]);
        const __m512i a1 = _mm512_unpackhi_epi16(codes[4 * i], codes[4 * i + 1]);
        const __m512i b0 = _mm512_unpacklo_epi16(codes[4 * i + 2], codes[4 * i + 3]);
        const __m512i b1 = _mm512_unpackhi_epi16(codes[4 * i + 2], codes[4 * i + 3]);
        quads[0][i] = _mm512_unpacklo_epi32(a0, b0);
        quads[1][i] = _mm512_unpackhi_epi32(a0, b0);
        quads[2][i] = _mm512_unpacklo_epi32(a1, b1);
        quads[3][i] = _mm512_unpackhi_epi32(a1, b1);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // lane l of quads[j] holds pairs 8l + 2j and 8l + 2j + 1
        const __m512i* q = quads[j];
        const __m512i low01 = _mm512_shuffle_i32x4(q[0], q[1], 0x44), high01 = _mm512_shuffle_i32x4(q[0], q[1], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(q[2], q[3], 0x44), high23 = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
        codes[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        codes[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        codes[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        codes[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

// Sixteen rows of sixteen values to sixteen columns.
DS_FP6_INLINE void transpose_floats(__m512 r[16]) {
    __m512 quads[4][4];  // [column of a lane][rows / 4]
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a0 = _mm512_castps_pd(_mm512_unpacklo_ps(r[4 * i], r[4 * i + 1]));
        const __m512d a1 = _mm512_castps_pd(_mm512_unpackhi_ps(r[4 * i], r[4 * i + 1]));
        const __m512d b0 = _mm512_castps_pd(_mm512_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]));
        const __m512d b1 = _mm512_castps_pd(_mm512_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
        quads[0][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, b0));
        quads[1][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, b0));
        quads[2][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a1, b1));
        quads[3][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a1, b1));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // lane l of quads[j] holds column 4l + j
        const __m512* q = quads[j];
        const __m512 low01 = _mm512_shuffle_f32x4(q[0], q[1], 0x44), high01 = _mm512_shuffle_f32x4(q[0], q[1], 0xee);
        const __m512 low23 = _mm512_shuffle_f32x4(q[2], q[3], 0x44), high23 = _mm512_shuffle_f32x4(q[2], q[3], 0xee);
        r[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        r[4 + j] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        r[8 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        r[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
