// Every problem on every GPU has a tile and a split that the kernel and its workspace can take; and bf16 that stays bf16,
// or becomes fp16 in the ring, takes each tile that is compiled for it.
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

// By the tile's number, whether bf16 that stays bf16 takes it where the memory is fast, and where it is slow; and whether
// bf16 that becomes fp16 in the ring does.
static bool taken[64][2], taken_in_ring[64];

static void check_plan(const LinearProblem& p, const Device& device, const Plan& plan) {
    UngroupedTiles::with(plan.tile, [&](auto tile) {
        using T = decltype(tile);
        const Tiling tiling = Tiling::of<T>(p, device);
        const BFloat16Way way = bf16_way(p, device);
        const bool in_bf16 = way == BFloat16Way::kAsTheyAre, in_ring = way == BFloat16Way::kInRing;
        const bool compiled = (!in_bf16 || BFloat16Tiles::contains<T>()) && (!in_ring || ConvertingTiles::contains<T>());
        taken[plan.tile][memory_is_slow(device)] |= in_bf16;
        taken_in_ring[plan.tile] |= in_ring;
        if (!compiled || ((p.m <= 64 || in_bf16) && tiling.tiles_m != 1)) {
            std::printf("m %d: tiles of %d tokens%s\n", p.m, T::kTokens, compiled ? "" : ", not compiled for bf16");
            std::exit(1);
        }
        check_split(p, device, tiling, plan.split.workers ? plan.split : tiling.cut(), T::kClusterK);
    });
}

// Tiles of 128 tokens are for every memory, the others for slow ones.
template <class... T>
static void check_taken(TileList<T...>) {
    const auto check = [](int number, int tokens) {
        const bool fast = taken[number][false], slow = taken[number][true];
        if (slow && fast == (tokens == 128)) return;
        std::printf("tile %d of %d tokens: bf16 takes it with fast memory: %d, with slow: %d\n", number, tokens, fast, slow);
        std::exit(1);
    };
    (check(UngroupedTiles::number<T>(), T::kTokens), ...);
}

template <class... T>
static void check_taken_in_ring(TileList<T...>) {
    if ((taken_in_ring[UngroupedTiles::number<T>()] && ...)) return;
    std::printf("a tile that converts is not taken\n");
    std::exit(1);
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
                        p.dtype = Dtype::kBFloat16, p.x_stride = k;
                        check_plan(p, device, choose_plan(p, device));
                    }
                }
            }
        }
    }
    check_taken(BFloat16Tiles());
    check_taken_in_ring(ConvertingTiles());
    std::printf("right\n");
}
