// Packed codes to values in AVX-512 registers. Included between DS_FP6_TARGET_BEGIN and _END (target.h).
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// The order in which 64 codes leave CodeReader::read. In all of them half a qword holds four neighbours.
enum class CodeOrder {
    kNatural,  // byte i is code i
    kBf16,     // _mm512_unpack{lo,hi}_epi8 of two bytes of each give codes 0..31 and 32..63
    kFp32,     // and _mm512_unpack{lo,hi}_epi16 of each of those give codes 0..15, 16..31, 32..47, 48..63
};

// Cuts 64 codes of any width out of 8 * bits bytes: VPERMB brings to each qword the bytes of its eight codes,
// VPMULTISHIFTQB aligns each code with a byte. The bits above a code are the next code's.
struct CodeReader {
    __m512i bytes, shifts;
    int64_t size;

    CodeReader(int bits, CodeOrder order) : size(8 * bits) {
        alignas(64) uint8_t byte[64], shift[64];
        for (int i = 0; i < 64; i += 4) {
            const int qword = i / 8, half = i / 4 % 2, lane = qword / 2, upper = qword % 2;
            int code = i;
            if (order == CodeOrder::kBf16) code = upper * 32 + lane * 8 + half * 4;
            if (order == CodeOrder::kFp32) code = (upper * 2 + half) * 16 + lane * 4;
            for (int j = 0; j < 4; ++j) {
                const int source = code * bits / 8 + j;
                byte[i + j] = uint8_t(source < 64 ? source : 63);
                shift[i + j] = uint8_t(32 * half + code * bits % 8 + j * bits);
            }
        }
        bytes = _mm512_load_si512(byte);
        shifts = _mm512_load_si512(shift);
    }

    // The bytes to read of a chunk when the row has so many left.
    DS_FP6_INLINE __mmask64 window(int64_t left) const { return first_lanes(left < size ? left : size); }

    DS_FP6_INLINE __m512i read(const uint8_t* codes, __mmask64 window) const {
        const __m512i run = _mm512_maskz_loadu_epi8(window, codes);
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, run));
    }
};

// The upper and the lower byte of each code's value as bf16, which holds every format of up to 8 bits exactly.
//
// kTableBits: 6 for codes of up to 6 bits, in one register per table; 7, in two; 8, where two hold the magnitudes and
// the sign, which is bit 7 of the code as of the upper byte, is copied.
template <int kTableBits>
struct ByteTables {
    __m512i upper[2], lower[2];

    explicit ByteTables(const FormatSpec& format) {
        float values[256];
        format.values(values);
        alignas(64) uint8_t byte[2][128];
        for (int i = 0; i < 128; ++i) {
            const uint32_t bits = float_to_bits(values[i]);
            byte[0][i] = uint8_t(bits >> 24);
            byte[1][i] = uint8_t(bits >> 16);
        }
        for (int i = 0; i < 2; ++i) {
            upper[i] = _mm512_load_si512(byte[0] + 64 * i);
            lower[i] = _mm512_load_si512(byte[1] + 64 * i);
        }
    }

    DS_FP6_INLINE __m512i look_up(__m512i codes, const __m512i table[2]) const {
        return kTableBits == 6 ? _mm512_permutexvar_epi8(codes, table[0])
                               : _mm512_permutex2var_epi8(table[0], codes, table[1]);
    }
    DS_FP6_INLINE __m512i upper_bytes(__m512i codes) const {
        const __m512i bytes = look_up(codes, upper);
        constexpr int kOrWithAnd = 0xf8;  // a | (b & c)
        return kTableBits < 8 ? bytes : _mm512_ternarylogic_epi64(bytes, codes, _mm512_set1_epi8(-128), kOrWithAnd);
    }
    DS_FP6_INLINE __m512i lower_bytes(__m512i codes) const { return look_up(codes, lower); }
};

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
