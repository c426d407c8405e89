// Every step of every tile belongs to one piece; who cuts a tile publishes first, and the owner finds all the others.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/linear_sm90_schedule.h"

using namespace ds_fp6::cuda::sm90;

static void check(int tiles_n, int tiles_m, int steps, int most, bool cut, bool in_step, int group_m) {
    Split split = cut ? cut_split(tiles_n, tiles_m, steps, most) : whole_split(tiles_n * tiles_m, most);
    split.in_step = in_step;
    const Schedule s = make_schedule(tiles_n, tiles_m, steps, split, group_m);
    const auto fail = [&](const char* what) {
        std::printf("%d x %d tiles of %d steps, %d workers: %s\n", tiles_n, tiles_m, steps, most, what);
        std::exit(1);
    };
    if (s.workers < 1 || s.workers > most) fail("workers");
    std::vector<int> seen(size_t(tiles_n) * tiles_m * steps), origin(size_t(tiles_n) * tiles_m);
    std::vector<int> publishes(s.workers, -1);
    for (int worker = 0; worker < s.workers; ++worker) {
        PieceWalk walk(s, worker);
        bool first = true;
        for (Piece piece; walk.next(piece); first = false) {
            if (piece.begin >= piece.end || piece.end > steps) fail("an empty piece");
            if (piece.begin != 0) {
                if (!first) fail("a worker publishes late");
                publishes[worker] = piece.tile;
            }
            for (int step = piece.begin; step < piece.end; ++step) ++seen[size_t(piece.tile) * steps + step];
        }
    }
    for (int count : seen) {
        if (count != 1) fail("a step not done once");
    }
    for (int worker = 0; worker < s.workers; ++worker) {
        PieceWalk walk(s, worker);
        for (Piece piece; walk.next(piece);) {
            if (piece.begin != 0 || piece.end == steps) continue;
            int other = worker;
            for (int done = piece.end; done < steps;) {  // as Epilogue::collect
                if (++other >= s.workers || publishes[other] != piece.tile) fail("an owner asks the wrong worker");
                done += s.range_begin(other + 1) - s.range_begin(other);
            }
        }
    }
    for (int tile = 0; tile < tiles_n * tiles_m; ++tile) {
        const TileOrigin at = tile_origin(s, tile);
        if (at.n < 0 || at.n >= tiles_n || at.m < 0 || at.m >= tiles_m) fail("a tile outside");
        ++origin[size_t(at.n) * tiles_m + at.m];
    }
    for (int count : origin) {
        if (count != 1) fail("a tile not done once");
    }
}

static void check_divisor(int divisor, int n) {
    if (n < 0 || Divisor(divisor)(n) == n / divisor) return;
    std::printf("%d / %d is not %d\n", n, divisor, Divisor(divisor)(n));
    std::exit(1);
}

int main() {
    for (int64_t divisor = 1; divisor < 0x7FFFFFFF; divisor += divisor < 3000 ? 1 : divisor / 3) {
        for (int64_t quotient : {int64_t(0), int64_t(1), int64_t(2), int64_t(77), 0x7FFFFFFF / divisor}) {
            for (int more : {-1, 0, 1}) {
                if (divisor * quotient + more <= 0x7FFFFFFF) check_divisor(int(divisor), int(divisor * quotient + more));
            }
        }
        check_divisor(int(divisor), 0x7FFFFFFF);
    }
    for (int workers : {1, 2, 3, 7, 66, 132}) {
        for (int tiles_n : {1, 2, 5, 32, 40, 80, 128, 160, 224, 896}) {
            for (int tiles_m : {1, 2, 3, 8, 9, 32}) {
                for (int steps : {1, 2, 3, 32, 64, 113}) {
                    check(tiles_n, tiles_m, steps, workers, true, false, 8);
                    check(tiles_n, tiles_m, steps, workers, true, true, 8);
                    check(tiles_n, tiles_m, steps, workers, false, false, 8);
                }
            }
        }
    }
    std::printf("right\n");
}
