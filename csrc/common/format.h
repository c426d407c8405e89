// A signed minifloat, the C++ twin of ds_fp6/formats.py: sign, E exponent bits, M mantissa bits; every code is a number.
#pragma once

namespace ds_fp6 {

template <int E, int M>
struct Format {
    static_assert(1 <= E && E <= 5, "1 to 5 exponent bits");
    static_assert(0 <= M && 3 <= 1 + E + M && 1 + E + M <= 8, "3 to 8 bits");

    static constexpr int kExponentBits = E;
    static constexpr int kMantissaBits = M;
    static constexpr int kBits = 1 + E + M;
    static constexpr int kCodes = 1 << kBits;
    static constexpr int kBias = (1 << (E - 1)) - 1;
    // Exponent of the largest value, 2^kMaxExponent * (2 - 2^-M), and of the subnormals' leading place.
    static constexpr int kMaxExponent = 1 << (E - 1);
    static constexpr int kMinExponent = 1 - kBias;
};

}  // namespace ds_fp6
