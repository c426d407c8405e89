// csrc/cuda/ptx.cuh for gpu.h: a test puts this file in its place.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "gpu.h"

#define DS_FP6_DEVICE inline

namespace ds_fp6 {
namespace cuda {
namespace ptx {

inline uint32_t shared_address(const void* p) { return __cvta_generic_to_shared(p); }

// Of positive numbers, whose bits are ordered as they are; NaN is the largest.
inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
    return std::max(a & 0xFFFF, b & 0xFFFF) | std::max(a >> 16, b >> 16) << 16;
}
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) { return max_f16x2(a, b); }

inline void cp_async_16(uint32_t shared, const void* global, int bytes) {
    uint8_t* to = emulated::shared_memory + shared;
    std::memcpy(to, global, bytes);
    std::memset(to + bytes, 0, 16 - bytes);
}
inline void cp_async_commit() {}
template <int Pending>
void cp_async_wait() {}

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
    const int lane = emulated::block.current % 32;
    emulated::collective(&shared, 1, [&](const emulated::WarpView& warp) {
        for (int matrix = 0; matrix < 4; ++matrix)
            std::memcpy(&d[matrix], emulated::shared_memory + warp[matrix * 8 + lane / 4][0] + lane % 4 * 4, 4);
        return 0;
    });
}

template <class Widen>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen&& widen) {
    const int lane = emulated::block.current % 32;
    const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulated::collective(own, 6, [&](const emulated::WarpView& warp) {
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            for (int k = 0; k < 16; ++k) {
                const uint32_t wa = warp[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                const uint32_t wb = warp[column * 4 + k % 8 / 2][4 + k / 8];
                d[e] += widen(uint16_t(wa >> (k % 2 * 16))) * widen(uint16_t(wb >> (k % 2 * 16)));
            }
        }
        return 0;
    });
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16(d, a, b0, b1, [](uint16_t v) { return __half2float({v}); });
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16(d, a, b0, b1, [](uint16_t v) { return __bfloat162float({v}); });
}

}  // namespace ptx
}  // namespace cuda
}  // namespace ds_fp6
