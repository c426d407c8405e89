// The emulated twin of csrc/cuda/wgmma_sm90.cuh: operands are read when the operation is waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "dequant.cuh"
#include "emulator.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

inline void pin(uint32_t&) {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::current->groups.emplace_back(); }

template <int kPending>
void wgmma_wait() {
    auto& groups = emulator::current->groups;
    while (groups.size() > kPending + 1) {
        const auto group = std::move(groups.front());
        groups.erase(groups.begin());
        for (const auto& operation : group) operation();
    }
}

inline uint64_t wgmma_descriptor(uint32_t address) { return address; }

template <class T>
inline const std::vector<float> kValues = [] {  // of all 16-bit patterns
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
        const auto raw = static_cast<unsigned short>(i);
        if constexpr (std::is_same_v<T, Half>) values[i] = __half2float(__half(__half_raw{raw}));
        else values[i] = __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{raw}));
    }
    return values;
}();

template <int kTokens>
struct Wgmma {
    template <class T>
    static void issue(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        emulator::current->groups.back().push_back([&d, &a, b, accumulate] { multiply<T>(d, a, b, accumulate); });
    }

private:
    template <class T>
    static void multiply(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        using namespace emulator;
        current->operand = a;
        meet_warp();
        const float* const values = kValues<T>.data();
        const int lane = current->index % 32, first = lane / 4 * 4;
        float rows[2][16];
        for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < 4; ++i) {
                const uint32_t pair = lane_of_warp(first + t).operand[i];
                rows[i % 2][i / 2 * 8 + 2 * t] = values[pair & 0xFFFF];
                rows[i % 2][i / 2 * 8 + 2 * t + 1] = values[pair >> 16];
            }
        }
        for (int j = 0; j < kTokens / 8; ++j) {
            for (int h = 0; h < 2; ++h) {
                const int token = 8 * j + 2 * (lane % 4) + h;
                float column[16];
                for (int k = 0; k < 16; k += 8) {
                    uint32_t at = static_cast<uint32_t>(b & 0x3FFF) * 16 + token / 8 * 1024 + token % 8 * 128 + k * 2;
                    at ^= (at >> 7 & 7) << 4;
                    uint16_t chunk[8];
                    std::memcpy(chunk, memory(at, 16), 16);
                    for (int i = 0; i < 8; ++i) column[k + i] = values[chunk[i]];
                }
                for (int r = 0; r < 2; ++r) {
                    float sum = accumulate ? d[4 * j + 2 * r + h] : 0.f;
                    for (int k = 0; k < 16; ++k) sum += rows[r][k] * column[k];
                    // The worst NaN: what stands where no partial sum is yet.
                    d[4 * j + 2 * r + h] = sum == sum ? sum : __uint_as_float(0xFFFFFFFF);
                }
            }
        }
        meet_warp();
    }
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
