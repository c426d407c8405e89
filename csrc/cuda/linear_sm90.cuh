// y[m, n] = x[m, k] . weights[n, k]^T * scale[n] (+ bias[n]) on Hopper, weights packed in tiles.
//
// One persistent block an SM: a warp streams packed weights and a warp streams activations into a ring in shared
// memory, warpgroups dequantize the weights in registers and multiply them with the activations by wgmma (weights are
// A, so that few tokens waste nothing), and the epilogue adds partial sums, scales, rounds and stores.
#pragma once

#include "linear_sm90_epilogue.cuh"

namespace ds_fp6::cuda::sm90 {

template <class T, class C>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    linear_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    using BlockRing = Ring<T, C::kBits>;
    const BlockRing ring{shared_address(shared), T::kCluster > 1 ? cluster_rank() : 0};
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warpgroup = warp / 4;
    // NOTE: a block waits only for partial sums of blocks launched before it, or a second kernel on the GPU could keep
    // those it waits for from starting.
    const int worker = p.schedule.workers - 1 - static_cast<int>(blockIdx.x) / T::kCluster;

    if (thread == T::kConsumers * 128) ring.initialize();
    if constexpr (T::kCluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    if (p.overlap == 1) launch_later_grids();

    if (warpgroup < T::kConsumers) {
        if constexpr (T::kMovesRegisters) registers_increase<T::kConsumerRegisters>();
        wait_for_earlier_grids();
        Consumer<T, C> consumer(ring, warpgroup, warp % 4, lane);
        const Epilogue<T, C> epilogue(p, ring, shared, worker, warpgroup, thread % 128);
        PieceWalk walk(p.schedule, worker);
        for (Piece piece; walk.next(piece);) {
            float sums[T::kOwnPanels][T::kAccumulators];
            const auto terms = epilogue.load_terms(piece);
            const Piece own = ring.own_part(piece);
            consumer.multiply(sums, own.end - own.begin);
            if (!epilogue.add_up_split(sums)) continue;
            epilogue.add_up_cluster(sums);
            if (piece.begin != 0) {
                epilogue.publish(sums);
            } else {
                if (piece.end != p.schedule.steps) epilogue.collect(sums, piece);
                epilogue.store(sums, piece.tile, terms);
            }
        }
    } else {
        if constexpr (T::kMovesRegisters) registers_decrease<T::kProducerRegisters>();
        if (warp == T::kConsumers * 4 && lane == 0) copy_weights(p, ring, worker);
        if (warp == T::kConsumers * 4 + 1 && lane == 0) {
            tensor_prefetch(&x_map);
            wait_for_earlier_grids();
            copy_activations(p, &x_map, ring, worker);
        }
        __syncwarp();
        if constexpr (T::kClusterK > 1) cluster_sync_memory();  // as the consumers, in add_up_cluster
    }

    if constexpr (T::kCluster > 1) {  // no block leaves while another may still signal its barriers
        cluster_sync();
    }
}

}  // namespace ds_fp6::cuda::sm90
