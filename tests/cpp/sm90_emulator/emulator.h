// Runs sm_90 kernels on a CPU, a fiber a thread, to check their logic where there is no GPU.
//
// Asynchronous work is done as late as a kernel may rely on: a wgmma reads its operands when it is waited for, a copy
// lands after a random delay. So a register or a slot that is given away too early shows as a wrong result, a wait that
// is missing too, and a wait that nothing ends as a deadlock, which is reported. So is a thread that touches what earlier
// grids may still use before it has waited for them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"

namespace emulator {

constexpr int kSharedBytes = 227 * 1024;
constexpr int kMostIdle = 400;  // turns of all threads in which nothing changes: reading sums word by word takes some
constexpr size_t kStackBytes = 256 << 10;

struct Barrier {  // an mbarrier
    uint32_t count = 0, pending = 0, phase = 0;
    int64_t bytes = 0;

    void settle() {
        if (pending != 0 || bytes != 0) return;
        ++phase;
        pending = count;
    }
    void arrive() { --pending, settle(); }
    void expect(int64_t more) { bytes += more, arrive(); }
    void complete(int64_t landed) { bytes -= landed, settle(); }
};

// Threads that meet; data of each is seen by all between two meetings.
struct Meeting {
    int arrived = 0;
    uint64_t generation = 0;
};

struct Block;

struct Thread {
    Fiber fiber;
    Block* block;
    int index;
    bool earlier_grids_ended = false;
    uint64_t cluster_generation = 0;  // in which it has arrived at its cluster's barrier
    // What this thread has issued to the tensor cores: groups of operations, the newest last.
    std::vector<std::vector<std::function<void()>>> groups{1};
    // What it shows to the other threads of its warp.
    uint32_t shown[6];
    const uint32_t* operand;
};

struct Block {
    int index, rank, threads;
    std::vector<uint8_t> shared;
    std::map<uint32_t, Barrier> barriers;
    std::map<int, Meeting> meetings;  // named barriers, then warps
    std::vector<Thread> thread;
    std::vector<Block*> cluster;
    Meeting* cluster_meeting;
};

inline Thread* current = nullptr;
inline std::mt19937 random_source{1};
inline std::vector<std::pair<int, std::function<void()>>> in_flight;  // turns left, what lands then
inline uint64_t progress = 0;                                         // counts whatever changes

inline void yield() { Fiber::yield(); }

inline void later(std::function<void()> land) {
    in_flight.emplace_back(1 + random_source() % 40, std::move(land));
}

// Returns the generation that ends when all have arrived.
inline uint64_t arrive(Meeting& meeting, int threads) {
    const uint64_t generation = meeting.generation;
    ++progress;
    if (++meeting.arrived == threads) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    return generation;
}

inline void meet(Meeting& meeting, int threads) {
    const uint64_t generation = arrive(meeting, threads);
    while (meeting.generation == generation) yield();
}

inline void meet_warp() { meet(current->block->meetings[1000 + current->index / 32], 32); }
inline Thread& lane_of_warp(int lane) { return current->block->thread[current->index / 32 * 32 + lane]; }

// Shared addresses: of the own block, or, from map_to_rank, with the block's rank + 1 in the upper byte.
inline Block& block_of(uint32_t address) {
    const uint32_t mapped = address >> 24;
    return mapped == 0 ? *current->block : *current->block->cluster[mapped - 1];
}
inline uint8_t* memory(uint32_t address, size_t bytes) {
    const uint32_t at = address & 0xFFFFFF;
    if (at + bytes > kSharedBytes || at % (bytes < 16 ? bytes : 16) != 0) {
        std::printf("bad shared address %u for %zu bytes\n", at, bytes);
        std::exit(3);
    }
    return block_of(address).shared.data() + at;
}
inline Barrier& barrier(uint32_t address) { return block_of(address).barriers.at(address & 0xFFFFFF); }

// For what depends on earlier grids.
inline void need_earlier_grids(const char* what) {
    if (current->earlier_grids_ended) return;
    std::printf("thread %d %s before earlier grids have ended\n", current->index, what);
    std::exit(3);
}

inline std::function<void()> kernel_body;

inline void run_thread() {
    kernel_body();
    ++progress;
}

// All blocks at once, in random order. Returns false on a deadlock.
inline bool launch(int grid, int threads, int cluster) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Meeting>> cluster_meetings;
    for (int b = 0; b < grid; ++b) {
        auto block = std::make_unique<Block>();
        block->index = b, block->rank = b % cluster, block->threads = threads;
        block->shared.resize(kSharedBytes);
        for (auto& byte : block->shared) byte = static_cast<uint8_t>(random_source());
        block->thread.resize(threads);
        if (b % cluster == 0) cluster_meetings.push_back(std::make_unique<Meeting>());
        block->cluster_meeting = cluster_meetings.back().get();
        blocks.push_back(std::move(block));
    }
    std::vector<Thread*> alive;
    for (auto& block : blocks) {
        for (int r = 0; r < cluster; ++r) block->cluster.push_back(blocks[block->index / cluster * cluster + r].get());
        for (int t = 0; t < threads; ++t) {
            Thread& thread = block->thread[t];
            thread.block = block.get(), thread.index = t;
            thread.fiber.begin(run_thread, kStackBytes);
            alive.push_back(&thread);
        }
    }
    in_flight.clear();
    int idle = 0;
    while (!alive.empty()) {
        const uint64_t before = progress;
        for (size_t i = alive.size(); i-- > 0;) {
            const size_t other = random_source() % (i + 1);
            std::swap(alive[i], alive[other]);
            current = alive[i];
            current->fiber.resume();
            if (current->fiber.ended()) alive[i] = alive.back(), alive.pop_back();
        }
        for (size_t i = 0; i < in_flight.size();) {
            ++progress;
            if (--in_flight[i].first > 0) {
                ++i;
                continue;
            }
            const auto land = std::move(in_flight[i].second);
            in_flight[i] = std::move(in_flight.back());
            in_flight.pop_back();
            land();
        }
        idle = progress == before ? idle + 1 : 0;
        if (idle > kMostIdle) return false;
    }
    return in_flight.empty();
}

}  // namespace emulator

// ---- CUDA's words for a C++ compiler --------------------------------------------------------------------------------

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    using namespace emulator;
    static_assert(sizeof(T) == 4, "a register");
    std::memcpy(&current->shown[0], &value, 4);
    meet_warp();
    std::memcpy(&value, &lane_of_warp(lane).shown[0], 4);
    meet_warp();
    return value;
}
inline void __syncwarp() { emulator::meet_warp(); }
inline void __syncthreads() { emulator::meet(emulator::current->block->meetings[0], emulator::current->block->threads); }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return emulator::need_earlier_grids("reads"), *p; }
template <class T>
void __stcg(T* p, T value) { emulator::need_earlier_grids("writes"), *p = value; }
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
