// Who computes what: tiles of y, cut along K where the number of tiles does not fill the GPU ("stream-K").
//
// A worker is a block, or a cluster of blocks that cut each of its pieces once more. Workers compute the first `whole` tiles
// alone, in turns, and the last tiles form one line of (tile, step along K) that is cut into equal ranges, one a worker, in order:
//
//   tile      |----- t -----|---- t+1 ----|---- t+2 ----|
//   worker    |---- 0 ---|----- 1 ----|----- 2 ----|-- 3
//
// The worker that has a tile's first step owns the tile; the others contribute fp32 partial sums. A worker begins with
// the piece that another worker owns, so that the partial sum is sent long before its owner, who takes the piece
// that he owns last, asks for it. The sum runs in the order of K: deterministic.
#pragma once

#include <cstdint>
#include <numeric>

#include "common/layout.h"

namespace ds_fp6 {
namespace cuda {
namespace sm90 {

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery): a division takes long where a block
// begins and ends, with nothing else to do (docs/kernels.md, versions 34 and 35).
struct Divisor {
    uint32_t divisor = 1, multiplier = 1;
    int shift = 0;

    Divisor() = default;
    explicit Divisor(int by) : divisor(by) {
        while ((uint64_t(1) << shift) < divisor) ++shift;
        multiplier = static_cast<uint32_t>((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
    }

    DS_FP6_HD int operator()(int n) const {
        const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(multiplier) * static_cast<uint32_t>(n) >> 32);
        return static_cast<int>((high + n) >> shift);
    }
};

struct Schedule {
    int workers;
    int steps;        // steps along K of a tile
    int tiles_n;      // tiles along the channels
    int tiles_m;      // and along the tokens
    int group_m;      // tiles along the tokens that are taken together, so that they share weights in the L2;
                      // 0: all, and the channels run fastest
    int whole;        // tiles [0, whole) are computed by one worker each: tile i * workers + worker
    int range_least;  // steps in a worker's range: range_least, and one more for the first range_more workers
    int range_more;
    Divisor by_steps, by_tiles_n, by_group, by_group_m, by_last_group_m;  // group: its tiles

    DS_FP6_HD int range_begin(int worker) const {
        return worker * range_least + (worker < range_more ? worker : range_more);
    }
};

// How a grid shares out its tiles.
struct Split {
    int workers;
    bool cut;      // whether tiles may be cut; else some workers may have a tile less than others
    bool in_step;  // all tiles are one line along which the channels run fastest, cut into equal ranges: see cut_split
};

// Steps along K at which workers that take equal ranges of a line of tiles begin, of those that one tile has.
inline int phases(int tiles, int workers) { return workers / std::gcd(tiles, workers); }

// For tiles that may be cut, between at most `most` workers, and no more than have some steps to do. A few fewer where
// their ranges then begin at fewer phases: workers at the same step along K share what they read in the L2, and adding
// up costs more than idle SMs (10240 channels, 512 tokens: 126 us with 132 workers, 115 with 128). In step: where the
// workers are also a multiple of the tiles along the tokens, those that share weights are at the same step, and the
// weights are read from memory once.
inline Split cut_split(int tiles_n, int tiles_m, int steps, int most) {
    constexpr int kLeastSteps = 4, kMostPhases = 8, kMostRows = 8;  // rows: whose activations stay in the L2
    const int tiles = tiles_n * tiles_m, busy = tiles * (steps < kLeastSteps ? 1 : steps / kLeastSteps);
    if (busy < most) most = busy;
    int best = most;
    for (int workers = most; workers >= most - most / 24 && workers > 0; --workers) {
        if (phases(tiles, workers) < phases(tiles, best)) best = workers;
    }
    return {best, true, tiles_m <= kMostRows && best % tiles_m == 0 && phases(tiles, best) <= kMostPhases};
}

// For whole tiles: as few workers as need no more rounds.
inline Split whole_split(int tiles, int most) {
    const int rounds = (tiles + most - 1) / most;
    return {(tiles + rounds - 1) / rounds, false, false};
}

// Ranges of at least one tile, where there are that many tiles: then a tile has at most one contributor.
inline Schedule make_schedule(int tiles_n, int tiles_m, int steps, Split split, int group_m) {
    const int tiles = tiles_n * tiles_m, workers = split.workers;
    const int left_over = split.cut ? tiles % workers : 0;
    const int shared = left_over == 0 ? 0 : (tiles > workers && !split.in_step ? left_over + workers : tiles);
    Schedule s{};
    s.workers = workers;
    s.steps = steps;
    s.tiles_n = tiles_n;
    s.tiles_m = tiles_m;
    s.group_m = split.in_step && left_over != 0 ? 0 : group_m;
    s.whole = tiles - shared;
    s.range_least = shared * steps / workers;
    s.range_more = shared * steps % workers;
    s.by_steps = Divisor(steps);
    s.by_tiles_n = Divisor(tiles_n);
    if (s.group_m != 0) {
        s.by_group = Divisor(s.group_m * tiles_n);
        s.by_group_m = Divisor(s.group_m);
        s.by_last_group_m = Divisor(tiles_m % s.group_m == 0 ? s.group_m : tiles_m % s.group_m);
    }
    return s;
}

// Steps [begin, end) of a tile.
struct Piece {
    int tile;
    int begin;
    int end;
};

// A block's part of a piece of its cluster.
template <int kClusterK>
DS_FP6_HD Piece part_of(const Piece& piece, int rank) {
    if constexpr (kClusterK == 1) return piece;
    const int steps = piece.end - piece.begin;
    return {piece.tile, piece.begin + steps * rank / kClusterK, piece.begin + steps * (rank + 1) / kClusterK};
}

struct TileOrigin {
    int n, m;  // in tiles
};

// Groups of group_m tiles along the tokens; inside a group the tokens run fastest.
DS_FP6_HD TileOrigin tile_origin(const Schedule& s, int tile) {
    if (s.tiles_m == 1) return {tile, 0};
    if (s.group_m == 0) {
        const int m = s.by_tiles_n(tile);
        return {tile - m * s.tiles_n, m};
    }
    const int group = s.by_group(tile), first_m = group * s.group_m;
    const int inside = tile - first_m * s.tiles_n, left = s.tiles_m - first_m;
    const int n = left < s.group_m ? s.by_last_group_m(inside) : s.by_group_m(inside);
    return {n, first_m + inside - n * (left < s.group_m ? left : s.group_m)};
}

// Walks a worker's pieces: the piece that an earlier worker owns, the whole tiles, the rest of the range.
class PieceWalk {
public:
    DS_FP6_HD PieceWalk(const Schedule& s, int worker) : s_(s), whole_(worker) {
        at_ = s.range_begin(worker);
        end_ = s.range_begin(worker + 1);
        tile_ = s.by_steps(at_);
        offset_ = at_ - tile_ * s.steps;
    }

    DS_FP6_HD bool next(Piece& piece) {
        const bool contributes = offset_ != 0;
        if (!contributes && whole_ < s_.whole) {
            piece = {whole_, 0, s_.steps};
            whole_ += s_.workers;
            return true;
        }
        if (at_ >= end_) return false;
        const int to_tile_end = s_.steps - offset_, to_range_end = end_ - at_;
        const int length = to_tile_end < to_range_end ? to_tile_end : to_range_end;
        piece = {s_.whole + tile_, offset_, offset_ + length};
        at_ += length;
        ++tile_;
        offset_ = 0;
        return true;
    }

private:
    const Schedule& s_;
    int whole_, at_, end_, tile_, offset_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace ds_fp6
