// The "tiles" layout, in which GPUs keep packed weights: codes in the order in which the threads of an MMA consume them.
//
// Block: 16 (N) x 64 (K) weights, 128 * bits bytes. Lane l of a warp owns the 32 weights that it holds of the A
//   operand of four mma.m16n8k16 (or, warp by warp, of four wgmma k16 steps): exactly `bits` 32-bit words, no padding.
//   The words are stored as 16-byte vectors of all lanes, then 8-byte, then 4-byte ones, so that a warp's loads are
//   contiguous and free of bank conflicts: 8 words = 16 B + 16 B, 7 = 16 + 8 + 4, 6 = 16 + 8, 5 = 16 + 4, 3 = 8 + 4.
// Panel: 64 x 64 weights, four blocks one below the other, 512 * bits bytes.
// Matrix [N, K]: panels [ceil(N / 64)][ceil(K / 64)], row-major; codes beyond N or K are 0.
//
// Where a code's bits lie in its lane's words is the format's BitMap. It is written down as the way to extract them:
// rotate a word, mask it, and what is left stands in fp16's places, both halves of the register alike:
//   sign at bit 15, exponent and mantissa as one run whose last exponent bit is bit 10.
// Read as fp16 that is w * 2^(bias - 15) exactly, subnormals included, with no multiplication (dequant.cuh).
//
// One layout serves fp16 and bf16 activations, so that a packed weight does not depend on what it is multiplied with.
// bf16 wants the same run three bits lower, under the same sign. Extracting sign and run by separate rotations costs
// it about 1.5 logic operations a pair of weights more than fp16 (counted in dequant.cuh), which is the price of one
// layout; the multiplication that bf16 needs besides is due in any layout. linear_sm90 does without both: it makes fp16
// of bf16 activations instead.
#pragma once

#include <cstdint>

#include "format.h"

#if defined(__CUDACC__)
#define DS_FP6_HD __host__ __device__ __forceinline__
#else
#define DS_FP6_HD inline
#endif

namespace ds_fp6 {

constexpr int kLanes = 32;
constexpr int kBlockRows = 16, kBlockColumns = 64;
constexpr int kPanelRows = 64, kPanelColumns = 64;
constexpr int kPanelBlocks = kPanelRows / kBlockRows;
// k16 steps of a block, registers of an A fragment in each, and both: pairs of weights (32-bit registers) of a lane.
constexpr int kSteps = 4, kStepPairs = 4, kPairs = kSteps * kStepPairs;

template <int Bits>
struct Tiles {
    static_assert(3 <= Bits && Bits <= 8, "3 to 8 bits");

    static constexpr int kWords = Bits;  // of 32 bits, per lane and block: exactly `Bits` bits a weight
    static constexpr int kBlockBytes = kBlockRows * kBlockColumns * Bits / 8;
    static constexpr int kPanelBytes = kPanelRows * kPanelColumns * Bits / 8;

    // Vectors of 16 bytes a lane, then at most one of 8 bytes and one of 4, with their offsets in the block.
    static constexpr int kVectors16 = Bits / 4;
    static constexpr bool kVector8 = (Bits & 2) != 0, kVector4 = (Bits & 1) != 0;
    static constexpr int kOffset8 = kVectors16 * kLanes * 16;
    static constexpr int kOffset4 = kOffset8 + (kVector8 ? kLanes * 8 : 0);

    // Byte offset in the block of a lane's word.
    static DS_FP6_HD constexpr int word_offset(int lane, int word) {
        return word < 4 * kVectors16               ? word / 4 * kLanes * 16 + lane * 16 + word % 4 * 4
               : kVector8 && word < 4 * kVectors16 + 2 ? kOffset8 + lane * 8 + word % 2 * 4
                                                       : kOffset4 + lane * 4;
    }

    static_assert(kBlockBytes == kLanes * kWords * 4, "a lane's words are all there is in a block");
    static_assert(kPanelBytes == kPanelBlocks * kBlockBytes, "blocks fill a panel");
    static_assert(kOffset4 + (kVector4 ? kLanes * 4 : 0) == kBlockBytes, "vectors fill a block");
    static_assert(kBlockBytes % 128 == 0, "blocks are aligned for 16-byte and bulk copies");
};

// Which weight of a 16 x 64 block is in a lane's pair: column `pair_column` is in the low half, the next in the high one.
DS_FP6_HD constexpr int pair_row(int lane, int pair) { return lane / 4 + pair % 2 * 8; }
DS_FP6_HD constexpr int pair_column(int lane, int pair) {
    return pair / kStepPairs * 16 + pair % kStepPairs / 2 * 8 + lane % 4 * 2;
}

// One step of an extraction: the bits `mask` of rotate_left(source, rotate). Sources 0 ... bits-1 are the lane's words,
// bits, bits+1 ... its virtual words.
struct Term {
    int source;
    int rotate;  // 0 ... 31
    uint32_t mask;
};

struct Terms {
    int count;
    Term term[4];
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

// A byte of a source is a code whose sign is bit 7: pair `pair` from the upper byte of each half, the next from the lower.
constexpr void add_bytes(BitMap& map, int pair, int source, uint32_t code_bits) {
    add(map.pair[pair], source, 0, both_halves(code_bits << 8));
    add(map.pair[pair + 1], source, 8, both_halves(code_bits << 8));
}

// e3m2: bytes s..eeemm. The spare bits 6, 5 of three words are a virtual word's four codes; the rotation by 2 takes
// bit 6 into the next byte's bit 0.
constexpr BitMap e3m2() {
    BitMap map{};
    map.virtual_words = 2;
    for (int group = 0; group < 2; ++group) {
        const int word = 3 * group;
        Terms& spare = map.virtual_word[group];
        add(spare, word, 2, all_bytes(0x81));
        add(spare, word + 1, -2, all_bytes(0x18));
        add(spare, word + 2, -4, all_bytes(0x06));
        for (int i = 0; i < 3; ++i) add_bytes(map, 8 * group + 2 * i, word + i, 0x9F);
        add_bytes(map, 8 * group + 6, 6 + group, 0x9F);
    }
    return map;
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

constexpr BitMap segments(int exponent_bits, int mantissa_bits) {
    Segments s{};
    int low = 10 - mantissa_bits, high = 10 + exponent_bits;  // the run is [low, high)
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

constexpr BitMap make(int exponent_bits, int mantissa_bits) {
    switch (exponent_bits * 10 + mantissa_bits) {
        case 32: return e3m2();
        case 22: return e2m2();
        case 31: return e3m1();
        case 21: return e2m1();
        case 52: return e5m2();
        case 43: return e4m3();
        default: return segments(exponent_bits, mantissa_bits);
    }
}

// Whether the pairs take every bit of the lane's words exactly once, in the places of the format's codes.
constexpr bool is_exact(const BitMap& map, int exponent_bits, int mantissa_bits) {
    const int bits = 1 + exponent_bits + mantissa_bits;
    uint32_t taken[8] = {};
    const uint32_t code = both_halves(0x8000u | ((1u << (bits - 1)) - 1) << (10 - mantissa_bits));
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

template <class Fmt>
struct BitMapOf {
    static constexpr BitMap kMap = bit_map::make(Fmt::kExponentBits, Fmt::kMantissaBits);
    static_assert(bit_map::is_exact(kMap, Fmt::kExponentBits, Fmt::kMantissaBits),
                  "pairs must take each bit of a lane's words once");

    // A code's place in each half of a pair: the sign is bit 15, the other bits are shifted to kShift.
    static constexpr int kShift = 10 - Fmt::kMantissaBits;
    static constexpr uint32_t kMagnitude = bit_map::both_halves(((1u << (Fmt::kBits - 1)) - 1) << kShift);
    static constexpr uint32_t kSign = bit_map::both_halves(0x8000u);
};

}  // namespace ds_fp6
