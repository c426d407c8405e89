// Sums of a tile that several workers share, through global memory to the worker that owns it.
//
// No flag says that sums are there, they do so themselves: a word is kAbsentSum, a NaN that no sum is, before it is sent and
// again once it has been taken. That spares the owner two trips to the L2 and the sender a fence.
#pragma once

#include "linear_sm90_exchange.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

template <class T>
class Handover {
public:
    using Sums = float[T::kOwnPanels][T::kOwnSums];

    __device__ Handover(const Problem& p, int worker, int rank, int warpgroup, int thread)
        : p_(p), worker_(worker), rank_(rank), group_(warpgroup / T::kSplit), thread_(thread) {}

    // For a piece whose tile an earlier worker owns.
    __device__ void send(Sums& sums) const {
        float4* target = partial(worker_);
        visit4(sums, [&](float4 sum, int i) {
            store_relaxed_16(&target[i * 128], present(sum));
            return sum;
        });
    }

    // For a piece that has the first step of its tile but not the last: adds the later pieces, in the order of K.
    __device__ void collect(Sums& sums, const Piece& piece) const {
        const Schedule& s = p_.schedule;
        int other = worker_;
        for (int done = piece.end; done < s.steps;) {
            ++other;
            done += s.range_begin(other + 1) - s.range_begin(other);
            take(sums, partial(other));
        }
    }

private:
    static constexpr int kVectors = T::kOwnPanels * T::kOwnSums / 4;  // of a thread's sums
    static constexpr int kVectorsAtOnce = kVectors < 16 ? kVectors : 8;
    static_assert(kVectors % kVectorsAtOnce == 0, "parts of one size");

    __device__ float4* partial(int worker) const {
        const int consumer = (worker * T::kClusterK + rank_) * T::kGroups + group_;
        // Fits 32 bits: the workspace does.
        return reinterpret_cast<float4*>(p_.partials) + (consumer * (kVectors * 128) + thread_);
    }

    // sums += what is at `source`, as soon as it is there.
    __device__ void take(Sums& sums, float4* source) const {
#pragma unroll
        for (int first = 0; first < kVectors; first += kVectorsAtOnce) {
            float4 taken[kVectorsAtOnce];
            bool all;
            do {
                all = true;
#pragma unroll
                for (int i = 0; i < kVectorsAtOnce; ++i) taken[i] = load_relaxed_16(&source[(first + i) * 128]);
#pragma unroll
                for (int i = 0; i < kVectorsAtOnce; ++i) all &= is_present(taken[i]);
            } while (!all);
#pragma unroll
            for (int i = 0; i < kVectorsAtOnce; ++i) {
                const float absent = __uint_as_float(kAbsentSum);
                store_relaxed_16(&source[(first + i) * 128], make_float4(absent, absent, absent, absent));
                float* s = &sums[(first + i) * 4 / T::kOwnSums][(first + i) * 4 % T::kOwnSums];
                s[0] += taken[i].x, s[1] += taken[i].y, s[2] += taken[i].z, s[3] += taken[i].w;
            }
        }
    }

    __device__ static bool is_present(float4 v) {
        return __float_as_uint(v.x) != kAbsentSum && __float_as_uint(v.y) != kAbsentSum &&
               __float_as_uint(v.z) != kAbsentSum && __float_as_uint(v.w) != kAbsentSum;
    }
    __device__ static float4 present(float4 v) {
        return make_float4(present(v.x), present(v.y), present(v.z), present(v.w));
    }
    __device__ static float present(float sum) {
        return __float_as_uint(sum) == kAbsentSum ? __uint_as_float(0x7FFFFFFF) : sum;
    }

    const Problem& p_;
    int worker_, rank_, group_, thread_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
