// Holds csrc/common/layout.h and the dequantization to their definitions, for every code of every format, on a CPU.
// Prints one line a format; returns 1 and says where at the first mismatch.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

#include "common/layout.h"
#include "cuda/dequant.cuh"
#include "cuda/pack.cuh"

using namespace ds_fp6;

namespace {

std::mt19937 random_bits(12345);

[[noreturn]] void fail(const char* what, int e, int m, int pair, int half, unsigned code, double got, double want) {
    std::printf("e%dm%d: %s of code %u in pair %d, half %d is %.17g, not %.17g\n", e, m, what, code, pair, half, got, want);
    std::exit(1);
}

double value_of_code(int e, int m, unsigned code) {
    const int exponent = code >> m & ((1 << e) - 1), bias = (1 << (e - 1)) - 1;
    const double fraction = double(code & ((1u << m) - 1)) / (1 << m);
    const double magnitude = exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias);
    return code >> (e + m) ? -magnitude : magnitude;
}

// Width of the exponent and mantissa fields: 5 and 10 for fp16, 8 and 7 for bf16.
double value_of_bits(uint32_t bits, int exponent_width, int mantissa_width) {
    const int exponent = bits >> mantissa_width & ((1 << exponent_width) - 1), bias = (1 << (exponent_width - 1)) - 1;
    if (exponent == (1 << exponent_width) - 1) return std::nan("");
    const double fraction = double(bits & ((1u << mantissa_width) - 1)) / (1 << mantissa_width);
    const double magnitude = exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias);
    return bits >> 15 ? -magnitude : magnitude;
}

bool same(double a, double b) { return a == b && std::signbit(a) == std::signbit(b); }

// Of T: fp16 has 5 and 10 bits, bf16 8 and 7.
template <class T>
double value_as(uint32_t bits) {
    return value_of_bits(bits, 15 - T::kExponentAt, T::kExponentAt);
}

// Pair P of words for T: every code in each half, the rest of the words random, through insert, extract and
// dequantization.
template <class Fmt, class T, int P>
void check_pair() {
    constexpr int e = Fmt::kExponentBits, m = Fmt::kMantissaBits;
    for (unsigned code = 0; code < unsigned(Fmt::kCodes); ++code) {
        for (int half = 0; half < 2; ++half) {
            uint32_t words[Fmt::kBits];
            for (uint32_t& word : words) word = random_bits();
            // Clears the pair's bits: what extraction finds, inserted into zeros, is where they are.
            uint32_t mask[Fmt::kBits] = {};
            cuda::insert<Fmt, T, P>(0xFFFFFFFFu, mask);
            for (int i = 0; i < Fmt::kBits; ++i) words[i] &= ~mask[i];
            const unsigned other = random_bits() % Fmt::kCodes;
            const unsigned codes[2] = {half ? other : code, half ? code : other};
            cuda::insert<Fmt, T, P>(cuda::place_code<Fmt, T>(codes[0]) | cuda::place_code<Fmt, T>(codes[1]) << 16, words);

            const uint32_t raw = cuda::extract<Fmt, T, P>(words);
            const uint32_t operand = cuda::Dequant<Fmt, T>::template pair<P>(words);
            for (int h = 0; h < 2; ++h) {
                const double want = value_of_code(e, m, codes[h]);
                const uint32_t place = raw >> (16 * h) & 0xFFFF;
                if (cuda::code_at<Fmt, T>(place) != codes[h])
                    fail("the code", e, m, P, h, codes[h], cuda::code_at<Fmt, T>(place), codes[h]);
                const double value =
                    std::ldexp(value_as<T>(operand >> (16 * h) & 0xFFFF), cuda::Dequant<Fmt, T>::kScaleExponent);
                if (!same(value, want))
                    fail(T::kExponentAt == 10 ? "the fp16 value" : "the bf16 value", e, m, P, h, codes[h], value, want);
                const double as_f32 = cuda::value_at<Fmt, T>(place);
                if (!same(as_f32, want)) fail("the fp32 value", e, m, P, h, codes[h], as_f32, want);
            }
        }
    }
}

template <class Fmt, class T, int P = 0>
void check_pairs() {
    if constexpr (P < kPairs) {
        check_pair<Fmt, T, P>();
        check_pairs<Fmt, T, P + 1>();
    }
}

// The fragments of the four steps are the pairs in order.
template <class Fmt, class T, int Step>
void check_fragment(const uint32_t (&words)[Fmt::kBits]) {
    uint32_t a[4];
    cuda::Dequant<Fmt, T>::template fragment<Step>(words, a);
    const uint32_t want[4] = {
        cuda::Dequant<Fmt, T>::template pair<4 * Step>(words), cuda::Dequant<Fmt, T>::template pair<4 * Step + 1>(words),
        cuda::Dequant<Fmt, T>::template pair<4 * Step + 2>(words),
        cuda::Dequant<Fmt, T>::template pair<4 * Step + 3>(words)};
    for (int i = 0; i < 4; ++i)
        if (a[i] != want[i]) fail("a fragment", Fmt::kExponentBits, Fmt::kMantissaBits, 4 * Step + i, 0, 0, a[i], want[i]);
}

template <int E, int M>
void check_format() {
    using Fmt = Format<E, M>;
    check_pairs<Fmt, Half>();
    check_pairs<Fmt, BFloat16>();
    uint32_t words[Fmt::kBits];
    for (uint32_t& word : words) word = random_bits();
    check_fragment<Fmt, Half, 0>(words), check_fragment<Fmt, Half, 1>(words);
    check_fragment<Fmt, Half, 2>(words), check_fragment<Fmt, Half, 3>(words);
    check_fragment<Fmt, BFloat16, 0>(words), check_fragment<Fmt, BFloat16, 3>(words);
    std::printf("e%dm%d\n", E, M);
}

// The eight pairs of each half of a lane's words, as fragments' registers.
template <class T>
std::array<uint32_t, 16> fragments(const uint32_t (&w)[6]) {
    using Dequantize = cuda::Dequant<Format<3, 2>, T>;
    uint32_t a[4][4];
    Dequantize::template fragment<0>(w, a[0]), Dequantize::template fragment<1>(w, a[1]);
    Dequantize::template fragment<2>(w, a[2]), Dequantize::template fragment<3>(w, a[3]);
    std::array<uint32_t, 16> all;
    for (int i = 0; i < 16; ++i) all[i] = a[i / 4][i % 4];
    return all;
}

// e3m2's words as the layouts define them, written out by hand.
void check_e3m2_by_hand() {
    for (int round = 0; round < 1000; ++round) {
        uint32_t w[6];
        for (uint32_t& word : w) word = random_bits();
        const std::array<uint32_t, 16> f16 = fragments<Half>(w), bf16 = fragments<BFloat16>(w);
        for (int group = 0; group < 2; ++group) {
            const uint32_t a = w[3 * group], b = w[3 * group + 1], c = w[3 * group + 2];
            const uint32_t v = ((a << 2 | a >> 30) & 0x81818181u) | (b >> 2 & 0x18181818u) | (c >> 4 & 0x06060606u);
            const uint32_t u = ((a << 4 | a >> 28) & 0x80078007u) | (b >> 4 & 0x07800780u) | (c >> 8 & 0x00780078u);
            const uint32_t for_f16[4] = {a, b, c, v}, for_bf16[4] = {a, b, c, u};
            for (int i = 0; i < 8; ++i) {
                const int pair = 8 * group + i;
                const uint32_t want = (i % 2 ? for_f16[i / 2] << 8 : for_f16[i / 2]) & 0x9F009F00u;
                if (f16[pair] != want) fail("the layout for fp16", 3, 2, pair, 0, 0, f16[pair], want);
                const uint32_t bits = (i % 2 ? for_bf16[i / 2] << 5 : for_bf16[i / 2]) & 0x83E083E0u;
                const uint32_t scaled = cuda::scale_bf16x2<127 - 3 - 20>(bits);
                if (bf16[pair] != scaled) fail("the layout for bf16", 3, 2, pair, 0, 0, bf16[pair], scaled);
            }
        }
    }
}

template <int Bits>
void check_block() {
    std::set<int> offsets;
    for (int lane = 0; lane < kLanes; ++lane)
        for (int word = 0; word < Bits; ++word) offsets.insert(Tiles<Bits>::word_offset(lane, word));
    bool whole = int(offsets.size()) * 4 == Tiles<Bits>::kBlockBytes;
    for (int offset : offsets) whole = whole && offset % 4 == 0 && 0 <= offset && offset < Tiles<Bits>::kBlockBytes;
    // Vectors: words 0 ... 3 and 4 ... 7 are 16 bytes in a row, two more 8 bytes.
    for (int lane = 0; lane < kLanes; ++lane)
        for (int word = 0; word < Bits; ++word) {
            const int in_vector = word < Bits / 4 * 4 ? word % 4 : (word - Bits / 4 * 4) % 2;
            const int size = word < Bits / 4 * 4 ? 16 : Bits % 4 >= 2 && word < Bits / 4 * 4 + 2 ? 8 : 4;
            const int offset = Tiles<Bits>::word_offset(lane, word);
            whole = whole && (offset - 4 * in_vector) % size == 0;
            if (in_vector) whole = whole && offset == Tiles<Bits>::word_offset(lane, word - 1) + 4;
        }
    if (!whole) {
        std::printf("%d bits: the words of 32 lanes do not fill a block of %d bytes\n", Bits, Tiles<Bits>::kBlockBytes);
        std::exit(1);
    }
    if constexpr (Bits < 8) check_block<Bits + 1>();
}

void check_coordinates() {
    std::set<int> seen;
    for (int lane = 0; lane < kLanes; ++lane)
        for (int pair = 0; pair < kPairs; ++pair)
            for (int half = 0; half < 2; ++half)
                seen.insert(pair_row(lane, pair) * kBlockColumns + pair_column(lane, pair) + half);
    if (int(seen.size()) != kBlockRows * kBlockColumns || *seen.begin() != 0 ||
        *seen.rbegin() != kBlockRows * kBlockColumns - 1) {
        std::printf("pairs do not cover the block: %d of %d places\n", int(seen.size()), kBlockRows * kBlockColumns);
        std::exit(1);
    }
}

}  // namespace

int main() {
    check_block<3>();
    check_coordinates();
    check_e3m2_by_hand();
    check_format<1, 1>(), check_format<2, 0>();
    check_format<1, 2>(), check_format<2, 1>(), check_format<3, 0>();
    check_format<1, 3>(), check_format<2, 2>(), check_format<3, 1>(), check_format<4, 0>();
    check_format<1, 4>(), check_format<2, 3>(), check_format<3, 2>(), check_format<4, 1>(), check_format<5, 0>();
    check_format<1, 5>(), check_format<2, 4>(), check_format<3, 3>(), check_format<4, 2>(), check_format<5, 1>();
    check_format<1, 6>(), check_format<2, 5>(), check_format<3, 4>(), check_format<4, 3>(), check_format<5, 2>();
}
