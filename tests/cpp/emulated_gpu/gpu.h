// A GPU block on a CPU, so that kernels can be tested where there is no GPU: every thread is a fiber, barriers and warp
// collectives are points where fibers take turns. One block runs at a time. Memory is never stale here and copies are
// never late, so races and missing waits go unseen; indexing, arithmetic and control flow are the kernel's own.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "fiber.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static

using std::isfinite;

struct Dim3 {
    int x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
auto min(A a, B b) -> std::common_type_t<A, B> { return a < b ? a : b; }
template <class A, class B>
auto max(A a, B b) -> std::common_type_t<A, B> { return a > b ? a : b; }

inline uint32_t __float_as_uint(float v) { uint32_t bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rz(float a, float b) {
    std::fesetround(FE_TOWARDZERO);
    volatile float x = a, y = b;
    volatile float product = x * y;
    std::fesetround(FE_TONEAREST);
    return product;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline void __threadfence() {}
template <class T> T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
template <class T> T atomicMin(T* p, T v) { T old = *p; *p = std::min(old, v); return old; }

namespace emulated {

constexpr int kStack = 128 * 1024;

struct Barrier {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
};

// The block that runs.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    Barrier all;
    int current = 0;
    std::function<void()> kernel;
    // What a warp's lanes show one another in a collective.
    struct Shown { uint32_t word[8]; };
    std::vector<Shown> shown;
};
inline Block block;
inline uint8_t* shared_memory = nullptr;  // dynamic shared memory, for addresses

// The scheduler sets block.current and threadIdx before it comes back.
inline void yield() { Fiber::yield(); }

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline void run_thread() { block.kernel(); }

// Runs one block of `threads`; reports a deadlock (a barrier that some threads never reach) and exits.
inline void run_block(int threads, const std::function<void()>& kernel) {
    block.kernel = kernel;
    block.fibers.resize(threads);
    block.shown.resize(threads);
    block.warps.assign(threads / 32, Barrier{32, 0, 0});
    block.all = Barrier{threads, 0, 0};
    blockDim.x = threads;
    for (Fiber& fiber : block.fibers) fiber.begin(run_thread, kStack);
    int left = threads;
    long idle_rounds = 0;
    while (left > 0) {
        const unsigned before = block.all.generation;
        unsigned warp_before = 0, warp_after = 0;
        for (Barrier& warp : block.warps) warp_before += warp.generation;
        const int left_before = left;
        for (int i = 0; i < threads; ++i) {
            if (block.fibers[i].ended()) continue;
            block.current = i;
            threadIdx.x = i;
            block.fibers[i].resume();
            if (block.fibers[i].ended()) --left;
        }
        for (Barrier& warp : block.warps) warp_after += warp.generation;
        const bool moved = left != left_before || block.all.generation != before || warp_after != warp_before;
        idle_rounds = moved ? 0 : idle_rounds + 1;
        if (idle_rounds > 2) {
            std::printf("deadlock: %d threads wait at a barrier that others do not reach\n", left);
            std::exit(1);
        }
    }
}

// The words of all lanes of this thread's warp, valid until the next collective.
struct WarpView {
    const Block::Shown* lanes;
    const uint32_t* operator[](int lane) const { return lanes[lane].word; }
};

template <class F>
auto collective(const uint32_t* words, int count, F&& use) {
    const int warp = threadIdx.x / 32;
    std::memcpy(block.shown[block.current].word, words, count * 4);
    wait(block.warps[warp]);
    const auto result = use(WarpView{&block.shown[warp * 32]});
    wait(block.warps[warp]);
    return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block.all); }
inline void __syncwarp() { emulated::wait(emulated::block.warps[emulated::block.current / 32]); }
inline int __syncthreads_or(int value) {
    static int any;
    if (emulated::block.current == 0) any = 0;
    __syncthreads();
    if (value) any = 1;
    __syncthreads();
    const int result = any;
    __syncthreads();
    return result;
}
inline int __syncthreads_and(int value) { return !__syncthreads_or(!value); }
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    return emulated::collective(&value, 1, [](const emulated::WarpView& warp) {
        uint32_t largest = 0;
        for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, warp[lane][0]);
        return largest;
    });
}
inline uint32_t __cvta_generic_to_shared(const void* p) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulated::shared_memory);
}
