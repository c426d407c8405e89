// Where a code's bits lie in its lane's words (layout.h).
//
// That is a BitMap, of the format and of the type of the activations, for which the words are laid out. It is written
// down as the way to extract them: rotate a word, mask it, and what is left stands in that type's places, both halves of
// the register alike:
//   sign at bit 15, exponent and mantissa as one run whose last exponent bit is the type's: bit 10 in fp16, 7 in bf16.
// Read as fp16 that is w * 2^(bias - 15) exactly, subnormals included, with no multiplication; as bf16 it is
// w * 2^(bias - 127), which one multiplication takes away from the end of fp32's range (dequant.cuh).
//
// A map for both types would cost bf16, which has the same run three bits lower under the same sign, about 1.5 logic
// operations a pair of weights, and 3 to 15 % of the time (docs/kernels.md, version 57).
#pragma once

#include "layout.h"

namespace ds_fp6 {

// The types of activations, and so of the MMA's operands; kExponentAt is the last bit of the exponent.
struct Half {
    static constexpr int kExponentAt = 10;
};
struct BFloat16 {
    static constexpr int kExponentAt = 7;
};

// One step of an extraction: the bits `mask` of rotate_left(source, rotate). Sources 0 ... bits-1 are the lane's words,
// bits, bits+1 ... its virtual words.
struct Term {
    int source;
    int rotate;  // 0 ... 31
    uint32_t mask;
};

struct Terms {
    int count;
    Term term[5];
};

// How a lane's 16 pairs come out of its words. A pair is the union of its terms. A virtual word is put together from
// spare bits of words; like a word it yields two pairs, both in one k16 step.
struct BitMap {
    int virtual_words;
    Terms virtual_word[4];
    Terms pair[kPairs];
};

namespace bit_map {

DS_FP6_HD constexpr uint32_t both_halves(uint32_t mask) { return mask << 16 | mask; }
constexpr uint32_t all_bytes(uint32_t mask) { return mask * 0x01010101u; }

constexpr void add(Terms& terms, int source, int rotate, uint32_t mask) {
    terms.term[terms.count++] = Term{source, (rotate + 32) % 32, mask};
}

// Bits of a word: `mask` of it, rotated to the left, or, below 0, to the right.
struct Bits {
    int rotate;
    uint32_t mask;
};

// Six words, of which each three have spare bits for a virtual word, as `spare` says of the first, the second and the
// third; add_codes(map, pair, source) adds a source's two codes.
template <class AddCodes>
constexpr BitMap with_spare_bits_of_three(const Bits (&spare)[3], AddCodes add_codes) {
    BitMap map{};
    map.virtual_words = 2;
    for (int group = 0; group < 2; ++group) {
        for (int i = 0; i < 3; ++i) {
            add(map.virtual_word[group], 3 * group + i, spare[i].rotate, spare[i].mask);
            add_codes(map, 8 * group + 2 * i, 3 * group + i);
        }
        add_codes(map, 8 * group + 6, 6 + group);
    }
    return map;
}

// ---- for fp16: bit 15 and below it a run whose last exponent bit is bit 10 ----

namespace f16 {

// A byte of a source is a code whose sign is bit 7: pair `pair` from the upper byte of each half, the next from the
// lower.
constexpr void add_bytes(BitMap& map, int pair, int source, uint32_t code_bits) {
    add(map.pair[pair], source, 0, both_halves(code_bits << 8));
    add(map.pair[pair + 1], source, 8, both_halves(code_bits << 8));
}

// e3m2: bytes s..eeemm. The spare bits 6, 5 of three words are a virtual word's four codes; the rotation by 2 takes
// bit 6 into the next byte's bit 0.
constexpr BitMap e3m2() {
    return with_spare_bits_of_three({{2, all_bytes(0x81)}, {-2, all_bytes(0x18)}, {-4, all_bytes(0x06)}},
                                    [](BitMap& map, int pair, int source) { add_bytes(map, pair, source, 0x9F); });
}

// e2m2: bytes s...eemm, spare bits 6 ... 4 of five words make three virtual words.
constexpr BitMap e2m2() {
    BitMap map{};
    map.virtual_words = 3;
    for (int i = 0; i < 2; ++i) {
        add(map.virtual_word[i], 2 * i, -3, all_bytes(0x0E));
        add(map.virtual_word[i], 2 * i + 1, 3, all_bytes(0x81));
    }
    add(map.virtual_word[2], 4, -3, all_bytes(0x0E));
    add(map.virtual_word[2], 3, -6, all_bytes(0x01));
    add(map.virtual_word[2], 1, 1, all_bytes(0x80));
    for (int source = 0; source < 8; ++source) add_bytes(map, 2 * source, source, 0x8F);
    return map;
}

// e3m1: bytes s..eeem., spare bits 6, 5 and 0 of five words make three virtual words.
constexpr BitMap e3m1() {
    BitMap map{};
    map.virtual_words = 3;
    for (int i = 0; i < 2; ++i) {
        add(map.virtual_word[i], 2 * i, -2, all_bytes(0x18));
        add(map.virtual_word[i], 2 * i + 1, -4, all_bytes(0x06));
        add(map.virtual_word[i], 2 * i, 7, all_bytes(0x80));
    }
    add(map.virtual_word[2], 4, -2, all_bytes(0x18));
    add(map.virtual_word[2], 4, 7, all_bytes(0x80));
    add(map.virtual_word[2], 3, 2, all_bytes(0x04));
    add(map.virtual_word[2], 1, 1, all_bytes(0x02));
    for (int source = 0; source < 8; ++source) add_bytes(map, 2 * source, source, 0x9E);
    return map;
}

// e2m1: bytes s...eem., the spare bits of each word are a virtual word.
constexpr BitMap e2m1() {
    BitMap map{};
    map.virtual_words = 4;
    for (int word = 0; word < 4; ++word) {
        add(map.virtual_word[word], word, -3, all_bytes(0x0E));
        add(map.virtual_word[word], word, 7, all_bytes(0x80));
        add_bytes(map, 4 * word, word, 0x8E);
        add_bytes(map, 4 * word + 2, 4 + word, 0x8E);
    }
    return map;
}

constexpr BitMap e5m2() {
    BitMap map{};
    for (int word = 0; word < 8; ++word) add_bytes(map, 2 * word, word, 0xFF);
    return map;
}

// e4m3: one code in place; the other's run in bits 6 ... 0 and its sign at bit 14.
constexpr BitMap e4m3() {
    BitMap map{};
    for (int word = 0; word < 8; ++word) {
        add(map.pair[2 * word], word, 0, both_halves(0xBF80));
        add(map.pair[2 * word + 1], word, 7, both_halves(0x3F80));
        add(map.pair[2 * word + 1], word, 1, both_halves(0x8000));
    }
    return map;
}

}  // namespace f16

// ---- for bf16: bit 15 and below it a run whose last exponent bit is bit 7 ----

namespace bf16 {

// Each half of a source holds two codes: pair `pair` in place, the next five bits lower.
constexpr void add_two(BitMap& map, int pair, int source, uint32_t code_bits) {
    add(map.pair[pair], source, 0, both_halves(code_bits));
    add(map.pair[pair + 1], source, 5, both_halves(code_bits));
}

// e3m2: halves s.....eeemm..... and .....s.....eeemm. The spare bits 14 ... 11 of three words are a virtual word's four
// codes; the rotation by 4 takes bits 14 ... 12 into the next half's 2 ... 0.
constexpr BitMap e3m2() {
    return with_spare_bits_of_three({{4, both_halves(0x8007)}, {-4, both_halves(0x0780)}, {-8, both_halves(0x0078)}},
                                    [](BitMap& map, int pair, int source) { add_two(map, pair, source, 0x83E0); });
}

// e2m2, low = 5, spare = 9, and e3m1, low = 6, spare = 5: a sign and four bits from `low` on, twice. Bits 14 ... 11,
// `spare` and `spare` - 5 of five words are spare and make three virtual words.
constexpr BitMap five_bits(int low, int spare) {
    BitMap map{};
    map.virtual_words = 3;
    const auto run_of = [&](Terms& terms, int word, int to, uint32_t bits) {  // of 14 ... 11, `bits` to `to` and above
        add(terms, word, to - 11, both_halves((bits << to) & 0xFFFF));
    };
    const auto two_of = [&](Terms& terms, int word, int to) {  // `spare` and `spare` - 5
        add(terms, word, to - spare, both_halves(1u << to | 1u << (to - 5)));
    };
    for (int i = 0; i < 2; ++i) {
        run_of(map.virtual_word[i], 2 * i, low, 0xF);
        run_of(map.virtual_word[i], 2 * i + 1, low - 5, 0xF);
        two_of(map.virtual_word[i], 2 * i, 15);
    }
    two_of(map.virtual_word[2], 1, low + 3);
    two_of(map.virtual_word[2], 3, low + 2);
    run_of(map.virtual_word[2], 4, low - 2, 0xC);
    run_of(map.virtual_word[2], 4, low - 5, 0x3);
    two_of(map.virtual_word[2], 4, 15);
    for (int source = 0; source < 8; ++source) add_two(map, 2 * source, source, 0x8000u | 0xFu << low);
    return map;
}

// e2m1: three codes three bits apart; the fourth's sign is bit 14, its run 13, 11 and 10.
constexpr BitMap e2m1() {
    BitMap map{};
    for (int word = 0; word < 4; ++word) {
        for (int i = 0; i < 3; ++i) add(map.pair[4 * word + i], word, 3 * i, both_halves(0x81C0));
        add(map.pair[4 * word + 3], word, 1, both_halves(0x8000));
        add(map.pair[4 * word + 3], word, -5, both_halves(0x0100));
        add(map.pair[4 * word + 3], word, -4, both_halves(0x00C0));
    }
    return map;
}

// e2m3: one code in place, the next one's sign bit 14, its run 13 ... 9. Bits 3 ... 0 of three words are a virtual
// word.
constexpr BitMap e2m3() {
    return with_spare_bits_of_three({{4, both_halves(0x00F0)}, {8, both_halves(0x0F00)}, {12, both_halves(0xF000)}},
                                    [](BitMap& map, int pair, int source) {
                                        add(map.pair[pair], source, 0, both_halves(0x81F0));
                                        add(map.pair[pair + 1], source, 1, both_halves(0x8000));
                                        add(map.pair[pair + 1], source, -5, both_halves(0x01F0));
                                    });
}

// Eight bits: one code in place, its run from `low` on; the other's sign is bit 14, its run's upper bits are the lowest
// of the half, the others follow that sign.
constexpr BitMap eight_bits(int low) {
    BitMap map{};
    const uint32_t run = 0x7Fu << low, upper = run & ~0x7Fu;
    for (int word = 0; word < 8; ++word) {
        add(map.pair[2 * word], word, 0, both_halves(0x8000u | run));
        add(map.pair[2 * word + 1], word, 1, both_halves(0x8000));
        add(map.pair[2 * word + 1], word, 7, both_halves(upper));
        add(map.pair[2 * word + 1], word, -7, both_halves(run & ~upper));
    }
    return map;
}

}  // namespace bf16

// Any other format: a code is split into segments of 4, 2 and 1 bits, each of which fills 4, 2 or 1 words of its own.
struct Segments {
    BitMap map;
    int words;

    // Bits [low, low + size) of the pairs.
    constexpr void add_run(int low, int size) {
        const int per_word = 16 / size;
        for (int pair = 0; pair < kPairs; ++pair)
            add(map.pair[pair], words + pair / per_word, low - pair % per_word * size,
                both_halves(((1u << size) - 1) << low));
        words += size;
    }

    // The sign and the bit `distance` (1, 2, 4 or 8) below it.
    constexpr void add_sign_and(int distance) {
        for (int pair = 0; pair < kPairs; ++pair) {
            const int slot = pair % 8;
            const int low = slot / distance * 2 * distance + slot % distance;
            add(map.pair[pair], words + pair / 8, 15 - distance - low, both_halves(0x8000u | 0x8000u >> distance));
        }
        words += 2;
    }
};

constexpr BitMap segments(int exponent_at, int exponent_bits, int mantissa_bits) {
    Segments s{};
    int low = exponent_at - mantissa_bits, high = exponent_at + exponent_bits;  // the run is [low, high)
    const int above = 16 - high, below = 15 - low;            // distances of its ends from the sign
    const bool odd_run = (high - low) % 2 != 0 && high - low > 3;  // is left even when an end of it joins the sign
    bool sign = true;
    if (odd_run && (above == 1 || above == 2 || above == 4)) {
        s.add_sign_and(above);
        --high;
        sign = false;
    } else if (odd_run && below == 8) {
        s.add_sign_and(below);
        ++low;
        sign = false;
    }
    for (int size = 4; size >= 1; size /= 2) {
        if (high - low < size) continue;
        high -= size;
        s.add_run(high, size);
    }
    if (sign) s.add_run(15, 1);
    return s.map;
}

template <class T>
constexpr BitMap make(int exponent_bits, int mantissa_bits);

template <>
constexpr BitMap make<Half>(int exponent_bits, int mantissa_bits) {
    switch (exponent_bits * 10 + mantissa_bits) {
        case 32: return f16::e3m2();
        case 22: return f16::e2m2();
        case 31: return f16::e3m1();
        case 21: return f16::e2m1();
        case 52: return f16::e5m2();
        case 43: return f16::e4m3();
        default: return segments(Half::kExponentAt, exponent_bits, mantissa_bits);
    }
}

template <>
constexpr BitMap make<BFloat16>(int exponent_bits, int mantissa_bits) {
    switch (exponent_bits * 10 + mantissa_bits) {
        case 32: return bf16::e3m2();
        case 22: return bf16::five_bits(5, 9);
        case 31: return bf16::five_bits(6, 5);
        case 21: return bf16::e2m1();
        case 23: return bf16::e2m3();
        case 52: return bf16::eight_bits(5);
        case 43: return bf16::eight_bits(4);
        default: return segments(BFloat16::kExponentAt, exponent_bits, mantissa_bits);
    }
}

// Whether the pairs take every bit of the lane's words exactly once, in the places of the format's codes.
constexpr bool is_exact(const BitMap& map, int exponent_at, int exponent_bits, int mantissa_bits) {
    const int bits = 1 + exponent_bits + mantissa_bits;
    uint32_t taken[8] = {};
    const uint32_t code = both_halves(0x8000u | ((1u << (bits - 1)) - 1) << (exponent_at - mantissa_bits));
    for (const Terms& pair : map.pair) {
        uint32_t found = 0;
        for (int i = 0; i < pair.count; ++i) {
            const Term& term = pair.term[i];
            if (found & term.mask) return false;
            found |= term.mask;
            for (int bit = 0; bit < 32; ++bit) {
                if (!(term.mask >> bit & 1)) continue;
                int source = term.source, at = (bit + 32 - term.rotate) % 32;
                if (source >= bits) {
                    const Terms& spare = map.virtual_word[source - bits];
                    int j = 0;
                    while (j < spare.count && !(spare.term[j].mask >> at & 1)) ++j;
                    if (j == spare.count) return false;
                    source = spare.term[j].source;
                    at = (at + 32 - spare.term[j].rotate) % 32;
                }
                if (taken[source] >> at & 1) return false;
                taken[source] |= 1u << at;
            }
        }
        if (found != code) return false;
    }
    for (int word = 0; word < bits; ++word)
        if (taken[word] != 0xFFFFFFFFu) return false;
    return true;
}

}  // namespace bit_map

// T: Half or BFloat16.
template <class Fmt, class T>
struct BitMapOf {
    static constexpr BitMap kMap = bit_map::make<T>(Fmt::kExponentBits, Fmt::kMantissaBits);
    static_assert(bit_map::is_exact(kMap, T::kExponentAt, Fmt::kExponentBits, Fmt::kMantissaBits),
                  "pairs must take each bit of a lane's words once");

    // A code's place in each half of a pair: the sign is bit 15, the other bits are shifted to kShift.
    static constexpr int kShift = T::kExponentAt - Fmt::kMantissaBits;
    static constexpr uint32_t kMagnitude = bit_map::both_halves(((1u << (Fmt::kBits - 1)) - 1) << kShift);
};

}  // namespace ds_fp6
