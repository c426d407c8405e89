// Which tile of the sm_90 kernel for which problem, and how its tiles are shared out.
#pragma once

#include <initializer_list>

#include "linear.h"
#include "linear_sm90_schedule.h"
#include "linear_sm90_tile.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// The tile's number in its list. A split without workers: cut_split's choice.
struct Plan {
    int tile;
    Split split{};
};

template <class T>
Plan plan(Split split = {}) {
    return {UngroupedTiles::number<T>(), split};
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A problem in tiles of shape T.
struct Tiling {
    int tiles_n, tiles_m, steps, most_workers;

    template <class T>
    static Tiling of(const LinearProblem& p, const Device& device) {
        return {ceil_div(p.n, 64 * T::kPanels), ceil_div(p.m, T::kTokens), ceil_div(p.k, 64 * T::kBlocks),
                device.sms > T::kClusterK ? device.sms / T::kClusterK : 1};
    }
    int tiles() const { return tiles_n * tiles_m; }
    Split cut() const { return cut_split(tiles_n, tiles_m, steps, most_workers); }
    Split whole() const { return whole_split(tiles(), most_workers); }
    // One tile a worker, and hardly a worker without.
    bool one_round() const { return tiles() <= most_workers && 10 * tiles() >= 9 * most_workers; }
    // Every worker has the same number of whole tiles.
    bool even() const { return tiles() % cut().workers == 0; }
    // Whole tiles where one round of them is at most `most_steps` longer than cut ones would take: adding up is three
    // trips to the L2.
    Split whole_if_cutting_saves(int most_steps) const {
        const int saved = steps - ceil_div(tiles() * steps, cut().workers);
        return tiles() <= most_workers && saved <= most_steps ? whole() : Split{};
    }
};

// Whether weights in any tile become operands faster than the memory delivers them, by a margin: an H100's carries 25 GB/s
// an SM, an H200's 37, for the same SMs. Activations that are read more often then cost nothing, adding up still does.
inline bool memory_is_slow(const Device& device) { return device.bytes_per_second < 31e9 * device.sms; }

inline bool has_weights(const LinearProblem& p, int least) { return static_cast<int64_t>(p.n) * p.k >= least; }
inline bool is_large(const LinearProblem& p) { return has_weights(p, 1 << 27); }

// Up to 32 tokens, where memory_is_slow: the tiles that add up least. On an H100:
//
//   tokens  condition                tile         reason
//   <= 8    any                      one panel    gate_up 116.9 (two panels 118.9)
//   <= 16   small, a round of pairs  cut          8B's down 17.2 (one panel 17.6)
//           any                      one panel    qkv 23.0 (two panels 24.6), gate_up 117.2 (119.5)
//   <= 32   any                      cut          gate_up 118.0 (four panels 123.7), qkv 24.1 (two panels 25.6)
inline Plan plan_for_slow_memory(const LinearProblem& p, const Device& device) {
    if (p.m <= 8) return plan<Tile8>(Tiling::of<Tile8>(p, device).whole_if_cutting_saves(10));
    if (p.m <= 16) {
        if (!is_large(p) && Tiling::of<Tile16Cut>(p, device).one_round()) return plan<Tile16Cut>();
        return plan<Tile16>(Tiling::of<Tile16>(p, device).whole_if_cutting_saves(10));
    }
    return plan<Tile32Cut>(Tiling::of<Tile32Cut>(p, device).whole_if_cutting_saves(16));
}

// Up to 64 tokens the narrowest tile that holds them all reads and dequantizes each weight once. Then, with the times
// in microseconds on an H200 that speak for it (o 8192 x 8192, qkv 10240 x 8192, gate_up 57344 x 8192, down 8192 x
// 28672):
//
//   tokens  condition                         tile      reason
//   <= 8    >= 2^25 weights                   wide      half the activations' traffic: gate_up 82.6 (narrow 85.3), qkv
//                                                       16.1 (16.4), o 13.3 (13.6); 8B's qkv 7.4 (6.9)
//           a short K, fewer tiles than SMs   whole     8B's qkv and o, in a decode step: 2.0 and 1.0 less than cut
//   <= 16   tiles of 2 panels for all SMs     wide      gate_up 80.0 (81.9); qkv 16.2 (16.2), down 40.8 (40.4)
//           bf16, 2^26 to 2^27 weights        wide      four consumers hide its longer dequantization: qkv 16.5 (17.6),
//                                                       o 13.7 (14.1)
//           small, one round of pairs         cut       8B's down, in a decode step: 0.9 less
//   <= 32   tiles of 4 panels for all SMs     wide      gate_up 89.3 (two panels 92.0); 8B's 2.6 more
//           no more than two rounds of pairs  cut       pairs of blocks add up through shared memory: o 14.2 (15.1), qkv
//                                                       18.1 (18.2), down 42.3 (43.2), 8B's gate_up 25.1 (23.7); in a
//                                                       decode step 8B's down 1.9 less; whole, as above, its qkv and o
//                                                       2.3 less
//           of those, >= 2^27 weights, in     cut long  down 43.2 (43.7); bf16 takes longer over a stage: down 44.3
//           bf16 >= 2^26                                (46.2), qkv 18.6 (19.1), o 15.2 (15.1; in fp16 14.9, 14.3)
//           any                               two panels
//   <= 48   tiles of 4 panels for most SMs    wide      gate_up 94.5 (cut 97.1; tiles of 64 tokens 104.6)
//           any                               cut       qkv 19.5 (wide 23.0; 64 tokens 22.1), o 15.2 (19.8; 17.0), down
//                                                       46.6 (49.8; 52.7)
//   <= 64   tiles of 4 panels for most SMs    wide      gate_up 110 (cut 115)
//           >= 2^27 weights                   wide cut  down 56.2 (wide 57.6)
//           any                               cut       o 19.3 (wide 22.5)
//   > 32    a short K, fewer tiles than SMs   whole     8B's gate_up and qkv, on an H100: 34.5 (cut 35.8) and 10.5
//                                                       (11.6) at 64 tokens, 34.1 (35.1) and 10.2 (11.1) at 48
inline Plan plan_for_few_tokens(const LinearProblem& p, const Device& device) {
    const auto fill = [&](auto tile, int quarters) {
        return 4 * Tiling::of<decltype(tile)>(p, device).tiles() >= quarters * device.sms;
    };
    const bool large = is_large(p), bf16 = p.dtype == Dtype::kBFloat16;
    if (p.m <= 8) {
        if (has_weights(p, 1 << 25)) return plan<Tile8Wide>();
        return plan<Tile8>(Tiling::of<Tile8>(p, device).whole_if_cutting_saves(10));
    }
    if (p.m <= 16) {
        if (fill(Tile16Wide(), 4) || (bf16 && !large && has_weights(p, 1 << 26))) return plan<Tile16Wide>();
        if (!large && Tiling::of<Tile16Cut>(p, device).one_round()) return plan<Tile16Cut>();
        return plan<Tile16>();
    }
    if (p.m <= 32) {
        if (fill(Tile32Wide(), 4)) return plan<Tile32Wide>();
        const Tiling pairs = Tiling::of<Tile32Cut>(p, device);
        if (pairs.tiles() > 2 * pairs.most_workers) return plan<Tile32>();
        if (has_weights(p, bf16 ? 1 << 26 : 1 << 27)) return plan<Tile32CutLong>();
        return plan<Tile32Cut>(pairs.whole_if_cutting_saves(16));
    }
    if (p.m <= 48) {
        if (fill(Tile48(), 3)) return plan<Tile48>(Tiling::of<Tile48>(p, device).whole_if_cutting_saves(10));
        // NOTE: half the steps of the others, whose stages are half as long.
        return plan<Tile48Cut>(Tiling::of<Tile48Cut>(p, device).whole_if_cutting_saves(5));
    }
    if (fill(Tile64(), 3)) return plan<Tile64>(Tiling::of<Tile64>(p, device).whole_if_cutting_saves(10));
    if (large) return plan<Tile64WideCut>();
    return plan<Tile64Cut>(Tiling::of<Tile64Cut>(p, device).whole_if_cutting_saves(10));
}

// What a tile costs, in times of a tile of 256 channels x 128 tokens with all SMs busy (89 us at k = 8192, where adding
// up and exchanging sums are given too).
struct TileCost {
    double tile;       // itself
    double adding_up;  // the sums of one more contributor
    double exchange;   // with the other block of a pair
};

// Beyond 64 tokens tensor cores and power are the limit, and whole tiles on few SMs, which then run at a higher clock,
// compete with cut tiles on all of them. What each would take, fitted to an H200: within 5 % from 256 tokens on, 10 %
// too low at 128, and in the order that was measured.
inline double estimated_time(const Tiling& tiling, const Split& split, int k, const TileCost& cost) {
    const int tiles = tiling.tiles(), rounds = ceil_div(tiles, split.workers);
    const double busy = static_cast<double>(split.workers) / tiling.most_workers;
    const double rate = 0.27 + 0.73 * busy;  // of the whole GPU: 96 of 132 SMs reach 640 of 790 TFLOP/s
    const double exchanging = rounds * cost.exchange * 8192 / k;
    if (!split.cut || tiles % split.workers == 0) return rounds * busy / rate * cost.tile + exchanging;
    const double out_of_step = tiling.tiles_m == 1 || split.in_step ? 1.0 : 1.05;
    const int pieces = ceil_div(split.workers, tiles), contributors = pieces > 2 ? pieces - 1 : 1;  // of a tile
    return tiles / (tiling.most_workers * rate) * cost.tile * out_of_step + cost.adding_up * contributors * 8192 / k +
           exchanging;
}

// A tile of 128 channels reads twice the activations for a weight, and adds up half the sums; cut, pairs of blocks do.
inline Plan plan_for_many_tokens(const LinearProblem& p, const Device& device) {
    Plan best{};
    double least = 0;
    const auto consider = [&](auto tile, const TileCost& cost) {
        using T = decltype(tile);
        const Tiling tiling = Tiling::of<T>(p, device);
        for (const Split& split : {tiling.cut(), tiling.whole()}) {
            const double time = estimated_time(tiling, split, p.k, cost);
            if (least == 0 || time < least) least = time, best = plan<T>(split);
        }
    };
    consider(Tile128(), {1.0, 0.077, 0.0});
    consider(Tile128Narrow(), {0.524, 0.038, 0.0});
    consider(Tile128Cut(), {0.262, 0.019, 0.02});
    if (ceil_div(p.m, 96) * 96 >= ceil_div(p.m, 128) * 128) return best;
    // Fewer tokens that are not there. Tensor cores need three quarters of the time for 96, dequantization all of it:
    // gate_up 130 at 96 tokens (tiles of 128: 158) and 245 at 192 (299), qkv 29.7 and 49.0 (35.2 and 73.1).
    consider(Tile96(), {0.74, 0.058, 0.0});
    consider(Tile96Narrow(), {0.414, 0.029, 0.0});
    consider(Tile96Cut(), {0.207, 0.015, 0.016});
    return best;
}

inline Plan plan_for_groups(const LinearProblem& p) {
    if (p.m <= 8) return {GroupedTiles::number<Tile8>()};
    if (p.m <= 16) return {GroupedTiles::number<Tile16>()};
    return {p.m <= 32 ? GroupedTiles::number<Tile32Grouped>() : GroupedTiles::number<Tile64>()};
}

inline Plan choose_plan(const LinearProblem& p, const Device& device) {
    if (p.groups > 1) return plan_for_groups(p);
    if (p.m > 64) return plan_for_many_tokens(p, device);
    const bool adds_up_little = p.m <= 32 && memory_is_slow(device);
    return adds_up_little ? plan_for_slow_memory(p, device) : plan_for_few_tokens(p, device);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
