// wgmma with the weights as A from registers and the activations as B from 128-byte-swizzled shared memory.
//
// D[64 channels, n tokens] += A[64, 16] . B[16, n], fp16 or bf16, fp32 accumulation. Per warp w of the warpgroup, g = lane / 4, t = lane % 4:
//   a[0..3]      channels 16w + g, g + 8, g, g + 8; k = 2t, 2t + 1 (a[0], a[1]) and 8 + 2t, 9 + 2t (a[2], a[3])
//   d[4j .. +3]  channels 16w + g (first two) and g + 8; tokens 8j + 2t and 8j + 2t + 1
#pragma once

#include <cstdint>
#include <type_traits>

#include "dequant.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// Orders the registers' last writes before the wgmmas that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once all but the newest kPending groups have finished.
template <int kPending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the computation of a register above this point.
// NOTE: without it the compiler sinks the dequantization below the fence, then serializes every wgmma (C7519).
__device__ inline void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

// Descriptor of B: rows of 64 16-bit values (128 bytes, 128-byte swizzle, 1024 bytes per 8 rows), k contiguous.
// `address` counts 16 bytes, up to 256 KB; it is that of a 1024-byte aligned atom, plus 2 for each step of 16 along k.
__device__ inline uint64_t wgmma_descriptor(uint32_t address) {
    constexpr uint32_t kSwizzle128 = 1u << 30, kBytesBetweenAtoms = 1024;
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(address), "r"(kSwizzle128 | kBytesBetweenAtoms >> 4));
    return descriptor;
}

// Adds a step's product to the sums; `accumulate` 0: sets them. T: Half or BFloat16.
template <int kTokens>
struct Wgmma;

// Placeholders and operands of eight sums more.
#define DS_FP6_F8(d, i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define DS_FP6_F16(d, i) DS_FP6_F8(d, i), DS_FP6_F8(d, i + 8)
#define DS_FP6_F32(d, i) DS_FP6_F16(d, i), DS_FP6_F16(d, i + 16)
#define DS_FP6_F64(d, i) DS_FP6_F32(d, i), DS_FP6_F32(d, i + 32)

// One instruction: shape, the sums' placeholders, those of A, B and the predicate, then the sums as operands.
#define DS_FP6_WGMMA_OF(type, shape, sums, a0_to_b, predicate, ...)                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " predicate ", 0;\nwgmma.mma_async.sync.aligned." shape \
                 ".f32." type "." type " {" sums "}, " a0_to_b ", p, 1, 1, 0;\n}"                           \
                 : __VA_ARGS__                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define DS_FP6_WGMMA(shape, sums, a0_to_b, predicate, ...)                           \
    if constexpr (std::is_same_v<T, Half>) {                                         \
        DS_FP6_WGMMA_OF("f16", shape, sums, a0_to_b, predicate, __VA_ARGS__);        \
    } else {                                                                         \
        DS_FP6_WGMMA_OF("bf16", shape, sums, a0_to_b, predicate, __VA_ARGS__);       \
    }

template <>
struct Wgmma<8> {
    template <class T>
    __device__ static void issue(float (&d)[4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n8k16",
                     "%0, %1, %2, %3",
                     "{%4, %5, %6, %7}, %8", "%9", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]))
    }
};

template <>
struct Wgmma<16> {
    template <class T>
    __device__ static void issue(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n16k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7",
                     "{%8, %9, %10, %11}, %12", "%13", DS_FP6_F8(d, 0))
    }
};

template <>
struct Wgmma<32> {
    template <class T>
    __device__ static void issue(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n32k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
                     "{%16, %17, %18, %19}, %20", "%21", DS_FP6_F16(d, 0))
    }
};

template <>
struct Wgmma<48> {
    template <class T>
    __device__ static void issue(float (&d)[24], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n48k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23",
                     "{%24, %25, %26, %27}, %28", "%29", DS_FP6_F16(d, 0), DS_FP6_F8(d, 16))
    }
};

template <>
struct Wgmma<64> {
    template <class T>
    __device__ static void issue(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n64k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "{%32, %33, %34, %35}, %36", "%37", DS_FP6_F32(d, 0))
    }
};

template <>
struct Wgmma<96> {
    template <class T>
    __device__ static void issue(float (&d)[48], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n96k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47",
                     "{%48, %49, %50, %51}, %52", "%53", DS_FP6_F32(d, 0), DS_FP6_F16(d, 32))
    }
};

template <>
struct Wgmma<128> {
    template <class T>
    __device__ static void issue(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        DS_FP6_WGMMA("m64n128k16",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",
                     "{%64, %65, %66, %67}, %68", "%69", DS_FP6_F64(d, 0))
    }
};

#undef DS_FP6_WGMMA
#undef DS_FP6_WGMMA_OF
#undef DS_FP6_F8
#undef DS_FP6_F16
#undef DS_FP6_F32
#undef DS_FP6_F64

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
