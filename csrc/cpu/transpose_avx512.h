// Rows to columns in AVX-512 registers. Included between DS_FP6_TARGET_BEGIN and _END (target.h).
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// A register of each of four rows to its four lanes: out[l] = lane l of q[0], q[1], q[2], q[3].
DS_FP6_INLINE void transpose_lanes(const __m512i q[4], __m512i out[4]) {
    const __m512i low01 = _mm512_shuffle_i32x4(q[0], q[1], 0x44), high01 = _mm512_shuffle_i32x4(q[0], q[1], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(q[2], q[3], 0x44), high23 = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
    out[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[1] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[3] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}

// 16 rows of 64 codes in natural order: brings the 16 rows' codes of pairs 2t and 2t + 1 along K together, such that
// _mm512_unpack{lo,hi}_epi8 of their value bytes give 16 x (bf16, bf16) of one pair each, rows in order.
//
// quads[j] = interleave_rows; transpose_lanes(quads[j], out) then gives out[l] for t = 4l + j.
DS_FP6_INLINE void interleave_rows(const __m512i codes[16], __m512i quads[4][4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // four rows, their pairs side by side: a lane of quads[j][i] has two pairs of them
        const __m512i a0 = _mm512_unpacklo_epi16(codes[4 * i], codes[4 * i + 1]);
        const __m512i a1 = _mm512_unpackhi_epi16(codes[4 * i], codes[4 * i + 1]);
        const __m512i b0 = _mm512_unpacklo_epi16(codes[4 * i + 2], codes[4 * i + 3]);
        const __m512i b1 = _mm512_unpackhi_epi16(codes[4 * i + 2], codes[4 * i + 3]);
        quads[0][i] = _mm512_unpacklo_epi32(a0, b0);
        quads[1][i] = _mm512_unpackhi_epi32(a0, b0);
        quads[2][i] = _mm512_unpacklo_epi32(a1, b1);
        quads[3][i] = _mm512_unpackhi_epi32(a1, b1);
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
        __m512i rows[4], columns[4];
        for (int i = 0; i < 4; ++i) rows[i] = _mm512_castps_si512(quads[j][i]);
        transpose_lanes(rows, columns);
        for (int l = 0; l < 4; ++l) r[4 * l + j] = _mm512_castsi512_ps(columns[l]);
    }
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
