// y[m, n] = x[m, k] . weights[n, k]^T * scale[n] (+ bias[n]) on Hopper, weights packed in tiles.
//
// One persistent block an SM: a warp streams packed weights and a warp streams activations into a ring in shared
// memory; warpgroups dequantize the weights in registers and multiply them with the activations by wgmma (weights are
// A, so that few tokens waste nothing), workers that share a tile hand their sums over, and the epilogue scales, rounds
// and stores.
#pragma once

#include "linear_sm90_epilogue.cuh"
#include "linear_sm90_exchange.cuh"
#include "linear_sm90_handover.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// How a block's threads and registers are shared out.
template <class T, bool kGrouped>
struct Threads {
    static constexpr int kSums = (T::kOwnPanels + (kGrouped ? 1 : 0)) * T::kSums;  // registers
    // Beyond that the even share of a thread is too few; the producers then hand theirs to the consumers, which takes
    // whole warpgroups.
    static constexpr bool kMovesRegisters = kSums > (T::kConsumers == 2 ? 80 : 8);
    static constexpr int kConsumerRegisters = T::kConsumers == 2 ? 232 : 104;
    static constexpr int kProducerRegisters = T::kConsumers == 2 ? 40 : 64;
    // A block starts with even shares, in steps of 8, and has no more to hand around: it would wait for them forever.
    static constexpr int kStartRegisters = 512 / (T::kConsumers + 1) / 8 * 8;
    static_assert(!kMovesRegisters || T::kConsumers * kConsumerRegisters + kProducerRegisters <=
                                          (T::kConsumers + 1) * kStartRegisters, "more registers than the block has");
    static constexpr int kCount = T::kConsumers * 128 + (kMovesRegisters ? 128 : 64);
};

template <class T, class C, bool kGrouped>
__global__ void __launch_bounds__(Threads<T, kGrouped>::kCount, 1)
    linear_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Problem p,
                       const __grid_constant__ CUtensorMap weights_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Shares = Threads<T, kGrouped>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const Ring<T, C::kBits> ring{shared_address(shared)};
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warpgroup = warp / 4;
    const int rank = T::kClusterK > 1 ? cluster_rank() : 0;
    // NOTE: a block waits only for partial sums of blocks launched before it, or a second kernel on the GPU could keep
    // those it waits for from starting.
    const int worker = p.schedule.workers - 1 - static_cast<int>(blockIdx.x) / T::kClusterK;

    using Start = sm90::Start<T, Shares::kCount>;
    if (warpgroup < T::kConsumers) {
        Start::wait();
        launch_later_grids();
        if constexpr (Shares::kMovesRegisters) registers_increase<Shares::kConsumerRegisters>();
        wait_for_earlier_grids();
        Consumer<T, C, kGrouped> consumer(p, ring, warpgroup, warp % 4, lane);
        Exchange<T, C::kBits> exchange(ring, rank, warpgroup, thread % 128);
        const Handover<T> handover(p, worker, rank, warpgroup, thread % 128);
        const Epilogue<T, C, kGrouped> epilogue(p, ring, rank, warpgroup, thread % 128);
        PieceWalk walk(p.schedule, worker);
        bool first_piece = true;
        for (Piece piece; walk.next(piece); first_piece = false) {
            float sums[T::kOwnPanels][T::kSums], half[T::kOwnPanels][T::kOwnSums];
            const auto terms = epilogue.load_terms(piece);
            consumer.multiply(sums, part_of<T::kClusterK>(piece, rank));
            if (!exchange.add_up_turns(sums, first_piece)) continue;
            auto& own = exchange.add_up_cluster(sums, half);
            if (piece.begin != 0) {
                handover.send(own);
            } else {
                if (piece.end != p.schedule.steps) handover.collect(own, piece);
                epilogue.store(own, terms);
            }
        }
        exchange.wait_taken();
    } else {
        if constexpr (Shares::kMovesRegisters) registers_decrease<Shares::kProducerRegisters>();
        if (warp == T::kConsumers * 4) {
            copy_weights<Start>(p, &weights_map, ring, worker, rank, lane);
            Start::finish();
        } else if (warp == T::kConsumers * 4 + 1) {
            if (lane == 0) {
                ring.initialize();
                Exchange<T, C::kBits>::initialize(ring);
                barrier_init_fence();
            }
            __syncwarp();
            Start::announce();
            copy_activations(p, &x_map, ring, worker, rank, lane);
            Start::finish();
        } else {
            Start::wait();
        }
    }
    if constexpr (T::kClusterK > 1) cluster_sync();  // no block leaves while the other may still signal it
#endif
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
