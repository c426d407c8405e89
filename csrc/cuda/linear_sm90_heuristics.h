// Which tile of the sm_90 kernel for which problem.
#pragma once

#include "linear.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

enum class TileChoice { k8, k16, k32, k32Wide, k64, k64Cut, k128, k128Cut };

// The narrowest tile that holds all tokens reads and dequantizes each weight once. Then:
//
//   tokens  condition               tile   reason
//   <= 32   >= 2^27 weights         wide   four panels share the activations; below that, a tile cut in four along K
//                                          costs more than their traffic
//   > 32    tiles <= 2/3 of SMs     cut    pairs of blocks add up through shared memory what would else be twice as
//                                          many partial sums through the L2
inline TileChoice choose_tile(const LinearProblem& p, const Device& device) {
    const bool grouped = p.groups > 1;
    if (p.m <= 8) return TileChoice::k8;
    if (p.m <= 16) return TileChoice::k16;
    if (p.m <= 32) {
        return !grouped && static_cast<int64_t>(p.n) * p.k >= 1 << 27 ? TileChoice::k32Wide : TileChoice::k32;
    }
    if (grouped) return TileChoice::k64;  // two sets of sums leave no registers for 128 tokens
    const int tokens = p.m <= 64 ? 64 : 128;
    const int64_t tiles = static_cast<int64_t>((p.n + 255) / 256) * ((p.m + tokens - 1) / tokens);
    const bool cut = 3 * tiles <= 2 * device.sms;
    if (tokens == 64) return cut ? TileChoice::k64Cut : TileChoice::k64;
    return cut ? TileChoice::k128Cut : TileChoice::k128;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
