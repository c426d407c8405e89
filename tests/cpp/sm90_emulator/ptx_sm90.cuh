// The emulated twin of csrc/cuda/ptx_sm90.cuh.
#pragma once

#include "emulator.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

using namespace emulator;

inline uint8_t shared[1];  // the kernel asks for its address only
inline uint32_t shared_address(const void*) { return 0; }

inline void barrier_init(uint32_t address, uint32_t arrivals) {
    Barrier& b = current->block->barriers[address];
    b = Barrier();
    b.count = b.pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint32_t address, uint32_t bytes) { ++progress, barrier(address).expect(bytes); }
inline void barrier_arrive(uint32_t address) { ++progress, barrier(address).arrive(); }
inline uint32_t map_to_rank(uint32_t address, uint32_t rank) { return address | (rank + 1) << 24; }
inline void barrier_arrive_cluster(uint32_t address) {
    Barrier* b = &barrier(address);
    later([b] { b->arrive(); });
}
inline bool barrier_try_wait(uint32_t address, uint32_t parity) {
    yield();
    return (barrier(address).phase & 1) != parity;
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
    while (!barrier_try_wait(address, parity)) {
    }
}

inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_last() { return 0; }

inline void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t address, uint64_t) {
    if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) std::printf("bad bulk copy\n"), std::exit(3);
    uint8_t* to = memory(target, 16);
    Barrier* b = &barrier(address);
    later([=] { std::memcpy(to, source, bytes), b->complete(bytes); });
}

// What the launcher's tensor maps hold here: sizes and box in elements, strides of rows and planes in bytes.
struct EmulatedMap {
    const uint8_t* memory;
    int element;
    int64_t sizes[3], strides[2];
    int box[3];

    // An element within the box at `at`; zeros past the end.
    void read(uint8_t* target, const int (&at)[3], int column, int row, int plane) const {
        const int64_t c = at[0] + column, r = at[1] + row, p = at[2] + plane;
        std::memset(target, 0, element);
        if (c >= sizes[0] || r >= sizes[1] || p >= sizes[2]) return;
        std::memcpy(target, memory + p * strides[1] + r * strides[0] + c * element, element);
    }
    int bytes() const { return element * box[0] * box[1] * box[2]; }
};
inline void tensor_prefetch(const CUtensorMap*) {}
// Weights, in 8-byte elements, are dense; activations are rows of 128 bytes whose 16-byte chunks are swizzled.
inline void tensor_copy(uint32_t target, const CUtensorMap* map, int column, int row, int plane, uint32_t address,
                        uint64_t) {
    EmulatedMap m;
    std::memcpy(&m, map, sizeof(m));
    const bool swizzled = m.element == 2;
    if (target % (swizzled ? 1024 : 128) != 0 || (swizzled && m.box[0] != 64)) std::printf("bad tensor copy\n"), std::exit(3);
    if (swizzled) need_earlier_grids("copies activations");
    uint8_t* to = memory(target, 16);
    Barrier* b = &barrier(address);
    later([=] {
        int at = 0;
        for (int p = 0; p < m.box[2]; ++p) {
            for (int r = 0; r < m.box[1]; ++r) {
                for (int c = 0; c < m.box[0]; ++c, at += m.element) {
                    m.read(to + (swizzled ? at ^ at / 128 % 8 * 16 : at), {column, row, plane}, c, r, p);
                }
            }
        }
        b->complete(m.bytes());
    });
}

inline uint4 load_shared_16(uint32_t address) {
    uint4 v;
    std::memcpy(&v, memory(address, 16), 16);
    return v;
}
inline uint2 load_shared_8(uint32_t address) {
    uint2 v;
    std::memcpy(&v, memory(address, 8), 8);
    return v;
}
inline uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    std::memcpy(&v, memory(address, 4), 4);
    return v;
}
inline float4 load_shared_float4(uint32_t address) {
    float4 v;
    std::memcpy(&v, memory(address, 16), 16);
    return v;
}
inline void store_shared_16(uint32_t address, float4 v) { std::memcpy(memory(address, 16), &v, 16); }
inline void store_shared_16(uint32_t address, uint4 v) { std::memcpy(memory(address, 16), &v, 16); }
inline void store_async_16(uint32_t address, float4 v, uint32_t signal) {
    uint8_t* to = memory(address, 16);
    Barrier* b = &barrier(signal);
    later([=] { std::memcpy(to, &v, 16), b->complete(16); });
}

// Lane l holds, of matrix q, row l / 4, columns 2 (l % 4) and the next; lane 8q + r the address of row r.
template <int kMatrices>
void store_matrices(uint32_t row, const uint32_t (&q)[kMatrices]) {
    const int lane = current->index % 32;
    current->shown[0] = row;
    meet_warp();
    for (int i = 0; i < kMatrices; ++i) {
        for (int h = 0; h < 2; ++h) {
            const uint16_t value = static_cast<uint16_t>(q[i] >> (16 * h));
            const uint32_t target = lane_of_warp(8 * i + 2 * (lane % 4) + h).shown[0];
            std::memcpy(memory(target, 16) + lane / 4 * 2, &value, 2);
        }
    }
    meet_warp();
}
inline void store_matrix_transposed_4(uint32_t row, uint32_t q0, uint32_t q1, uint32_t q2, uint32_t q3) {
    store_matrices<4>(row, {q0, q1, q2, q3});
}
inline void store_matrix_transposed_2(uint32_t row, uint32_t q0, uint32_t q1) { store_matrices<2>(row, {q0, q1}); }

template <int>
void registers_increase() {}
template <int>
void registers_decrease() {}

inline void named_sync(int id, int threads) { meet(current->block->meetings[id], threads); }
inline void named_arrive(int id, int threads) { arrive(current->block->meetings[id], threads); }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <int kLanes>
uint32_t lanes_largest(uint32_t value, int lane) {
    current->shown[0] = value;
    meet_warp();
    for (int i = 0; i < kLanes; ++i) value = larger(value, lane_of_warp(lane / kLanes * kLanes + i).shown[0]);
    meet_warp();
    return value;
}

inline uint32_t cluster_rank() { return current->block->rank; }
inline void cluster_arrive() {
    const int threads = current->block->threads * static_cast<int>(current->block->cluster.size());
    current->cluster_generation = arrive(*current->block->cluster_meeting, threads);
}
inline void cluster_wait() {
    while (current->block->cluster_meeting->generation == current->cluster_generation) yield();
}
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
inline void wait_for_earlier_grids() { current->earlier_grids_ended = true; }
inline void launch_later_grids() {}

// Word by word, each of them for the other threads to see before the next.
inline float4 load_relaxed_16(const float4* address) {
    need_earlier_grids("reads sums");
    float words[4];
    for (int i = 0; i < 4; ++i) {
        yield();
        std::memcpy(&words[i], reinterpret_cast<const uint8_t*>(address) + 4 * i, 4);
    }
    return {words[0], words[1], words[2], words[3]};
}
inline void store_relaxed_16(float4* address, float4 v) {
    need_earlier_grids("writes sums");
    const int first = static_cast<int>(random_source() % 4);
    for (int i = 0; i < 4; ++i) {
        const int word = (first + i) % 4 * 4;
        ++progress;
        std::memcpy(reinterpret_cast<uint8_t*>(address) + word, reinterpret_cast<const uint8_t*>(&v) + word, 4);
        yield();
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
