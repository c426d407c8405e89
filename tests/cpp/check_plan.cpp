// Every problem on every GPU has a tile and a split that the kernel and its workspace can take; and every tile that is
// compiled has problems, in fp16 and in bf16.
#include <cstdio>
#include <cstdlib>

#include "cuda/linear_sm90_heuristics.h"

using namespace ds_fp6::cuda;
using namespace ds_fp6::cuda::sm90;

static void check_split(const LinearProblem& p, const Device& device, const Tiling& tiling, const Split& split, int cluster) {
    const auto fail = [&](const char* what) {
        std::printf("m %d n %d k %d, %d SMs, %d workers: %s\n", p.m, p.n, p.k, device.sms, split.workers, what);
        std::exit(1);
    };
    if (split.workers < 1 || split.workers * cluster > device.sms) fail("workers");
    if (split.workers > tiling.tiles() * tiling.steps) fail("workers without a step");
    if (split.in_step && split.workers % tiling.tiles_m != 0) fail("out of step");
    const Schedule s = make_schedule(tiling.tiles_n, tiling.tiles_m, tiling.steps, split, 8);
    const long long shared = static_cast<long long>(tiling.tiles() - s.whole) * tiling.steps;
    if (s.whole < 0 || s.range_begin(split.workers) != shared) fail("ranges that do not end with the tiles");
}

// By the tile's number, whether a problem of the type takes it.
static bool taken[64][2];

static void check_plan(const LinearProblem& p, const Device& device, const Plan& plan) {
    UngroupedTiles::with(plan.tile, [&](auto tile) {
        using T = decltype(tile);
        const Tiling tiling = Tiling::of<T>(p, device);
        taken[plan.tile][p.dtype == Dtype::kBFloat16] = true;
        if (p.m <= 64 && tiling.tiles_m != 1) {
            std::printf("m %d: tiles of %d tokens\n", p.m, T::kTokens);
            std::exit(1);
        }
        check_split(p, device, tiling, plan.split.workers ? plan.split : tiling.cut(), T::kClusterK);
    });
}

// None is compiled in vain.
template <class... T>
static void check_taken(TileList<T...>) {
    const auto check = [](int number, int tokens) {
        const bool by_f16 = taken[number][0], by_bf16 = taken[number][1];
        if (by_f16 && by_bf16) return;
        std::printf("tile %d of %d tokens: taken by fp16: %d, by bf16: %d\n", number, tokens, by_f16, by_bf16);
        std::exit(1);
    };
    (check(UngroupedTiles::number<T>(), T::kTokens), ...);
}

int main() {
    for (int sms : {2, 16, 78, 114, 132}) {
        for (int n : {1, 64, 200, 4096, 8192, 10240, 57344, 128256}) {
            for (int k : {8, 64, 1000, 8192, 28672}) {
                for (int m : {1, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 200, 256, 511, 768, 1024, 4097}) {
                    LinearProblem p{};
                    p.m = m, p.n = n, p.k = k, p.groups = 1;
                    for (double bandwidth : {25e9, 37e9}) {  // of an SM
                        const Device device{0, 9, 0, sms, 227 * 1024, bandwidth * sms};
                        for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
                            p.dtype = dtype, p.x_stride = k;
                            check_plan(p, device, choose_plan(p, device));
                        }
                    }
                }
            }
        }
    }
    check_taken(UngroupedTiles());
    std::printf("right\n");
}
