// Which tile of the sm_90 kernel for which problem.
#pragma once

#include "linear.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

enum class TileChoice { k8, k16, k32, k32Wide, k64, k64Cut, k128, k128Cut };

// The narrowest tile that holds all tokens reads and dequantizes each weight once. Then:
//
//   tokens  condition             tile   reason
//   <= 32   >= 2^27 weights       wide   four panels share the activations; below that, adding up tiles that are cut in
//                                        four along K costs more than the activations' traffic
//   <= 64   < 2^27 weights        cut    likewise: two panels, and pairs of blocks that add up through shared memory
//   > 64    tiles <= 2/3 of SMs   cut    pairs halve the partial sums that go through the L2
inline TileChoice choose_tile(const LinearProblem& p, const Device& device) {
    const bool grouped = p.groups > 1;
    if (p.m <= 8) return TileChoice::k8;
    if (p.m <= 16) return TileChoice::k16;
    const bool large = static_cast<int64_t>(p.n) * p.k >= 1 << 27;
    if (p.m <= 32) return large && !grouped ? TileChoice::k32Wide : TileChoice::k32;
    if (grouped) return TileChoice::k64;  // two sets of sums leave no registers for 128 tokens
    if (p.m <= 64) return large ? TileChoice::k64 : TileChoice::k64Cut;
    const int64_t tiles = static_cast<int64_t>((p.n + 255) / 256) * ((p.m + 127) / 128);
    return 3 * tiles <= 2 * device.sms ? TileChoice::k128Cut : TileChoice::k128;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
