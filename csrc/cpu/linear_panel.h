// y = x . W^T for many rows of x: a tile of W is expanded once in cache, then multiplied with every row of x.
// Included between DS_FP6_TARGET_BEGIN and _END (target.h).
//
// Besides what linear_dot.h asks of it, an Isa has
//   kTileVectors, kRegisterRows   the block of y in registers: kRegisterRows x (kTileVectors * kLanes)
//   kUnitCodes                    codes in a unit of 4 bytes: 1 (fp32) or 2 (bf16)
//   Weights broadcast(const uint32_t*), load_tile(const uint32_t*), multiply_add(sum, weights, weights)
//   load_sum, store_sum (float*)
//   expand_tile(expander, rows, offset, left, chunks, tile): chunks from byte `offset` of kTileVectors * kLanes
//                                 rows, which have `left` bytes from there, to the tile
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// A tile is [kTileVectors][kTileUnits][kLanes] units: lane l of vector v is row v * kLanes + l of W, so that expansion
// and multiplication both walk it in order. 64 rows of 256 units are 64 KiB, in L2; longer sums cost fewer trips of the
// sums to memory, which is worth more than staying in L1.
constexpr int64_t kTileUnits = 256;
// Rows of x in a task: its sums, 512 * 64 * 4 bytes = 128 KiB, stay in L2.
constexpr int64_t kMaxTileRows = 512;

template <class Isa>
struct Panel {
    static constexpr int kN = Isa::kTileVectors * Isa::kLanes;  // rows of W in a tile
    static constexpr int64_t kTileCodes = kTileUnits * Isa::kUnitCodes;

    // Codes that a multiplication brings to L2 on the side, a cache line for each unit: the lines of one row, then of
    // the next. Asking for them where they are expanded would fill the miss buffers of the core and stop it there.
    struct Fetch {
        const uint8_t* next;
        int64_t line = 0, lines, to_next_row, rows_left;

        Fetch(const uint8_t* first, int64_t bytes, int64_t row_bytes, int64_t rows)
            : next(first), lines(bytes / 64 + 1), to_next_row(row_bytes - (lines - 1) * 64), rows_left(rows) {}

        DS_FP6_INLINE void step() {
            __builtin_prefetch(next, 0, 2);
            const bool row_ends = ++line == lines;
            next += row_ends ? to_next_row : 64;
            rows_left -= row_ends;
            line = row_ends ? 0 : line;
        }
        // Once everything has been asked for, further steps stay on one line.
        void rest() {
            if (rows_left <= 0) lines = 1, line = 0, to_next_row = 0;
        }
    };

    // sums[kM, kN] (+)= scale[kN] * x[kM, units] . tile[kN, units]^T
    template <int kM>
    static void multiply(const uint32_t* x, int64_t ldx, const uint32_t* tile, int64_t units, const float* scale,
                         bool first, float* sums, Fetch& pending) {
        Fetch fetch = pending;
        fetch.rest();
        typename Isa::Sum sum[kM][Isa::kTileVectors];
        for (int m = 0; m < kM; ++m)
            for (int v = 0; v < Isa::kTileVectors; ++v) sum[m][v] = Isa::zero();
        for (int64_t u = 0; u < units; ++u) {
            fetch.step();
            typename Isa::Weights weights[Isa::kTileVectors];
            for (int v = 0; v < Isa::kTileVectors; ++v)
                weights[v] = Isa::load_tile(tile + (v * kTileUnits + u) * Isa::kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) {
                const typename Isa::Weights value = Isa::broadcast(x + m * ldx + u);
#pragma GCC unroll 8
                for (int v = 0; v < Isa::kTileVectors; ++v) sum[m][v] = Isa::multiply_add(sum[m][v], weights[v], value);
            }
        }
        pending = fetch;
        for (int m = 0; m < kM; ++m)
            for (int v = 0; v < Isa::kTileVectors; ++v) {
                float* to = sums + m * kN + v * Isa::kLanes;
                const typename Isa::Sum before = first ? Isa::zero() : Isa::load_sum(to);
                Isa::store_sum(to, Isa::scaled_add(before, sum[m][v], Isa::load_sum(scale + v * Isa::kLanes)));
            }
    }

    template <int kM = Isa::kRegisterRows>
    static void multiply_rows(int64_t rows, const uint32_t* x, int64_t ldx, const uint32_t* tile, int64_t units,
                              const float* scale, bool first, float* sums, Fetch& fetch) {
        if (rows == kM) return multiply<kM>(x, ldx, tile, units, scale, first, sums, fetch);
        if constexpr (kM > 1) return multiply_rows<kM - 1>(rows, x, ldx, tile, units, scale, first, sums, fetch);
    }

    // tile[n, k] *= scale of (n, k), for groups that a segment of K cannot follow (fp32 tiles only).
    static void scale_tile(const PackedMatrix& w, const float* const* scale, int64_t k0, int64_t k1, uint32_t* tile) {
        float* values = reinterpret_cast<float*>(tile);
        for (int64_t k = k0; k < k1; ++k) {
            const int64_t group = w.group_size ? k / w.group_size : 0;
            for (int n = 0; n < kN; ++n)
                values[(n / Isa::kLanes * kTileUnits + k - k0) * Isa::kLanes + n % Isa::kLanes] *= scale[n][group];
        }
    }

    // Rows [n0, n0 + kN) of W against rows [m0, m1) of x.
    static void task(const LinearProblem& p, const LinearPlan& plan, const typename Isa::Expander& expander,
                     const uint32_t* x, int64_t n0, int64_t m0, int64_t m1) {
        const PackedMatrix& w = p.weight;
        const int64_t row_bytes = w.row_bytes(), groups = w.groups();
        const int64_t rows = m1 - m0, most = ceil_div(rows, Isa::kRegisterRows);
        const int64_t blocks = most < 2 && rows > 1 ? 2 : most;  // one would be too short to fetch the next tile in
        uint32_t* tile = static_cast<uint32_t*>(scratch(Scratch::kTile, kTileUnits * kN * sizeof(uint32_t)));
        float* sums = static_cast<float*>(scratch(Scratch::kSums, rows * kN * sizeof(float)));

        const uint8_t* row[kN];
        const float* scale[kN];
        for (int n = 0; n < kN; ++n) {
            const int64_t source = n0 + n < w.n ? n0 + n : w.n - 1;
            row[n] = w.packed + source * row_bytes;
            scale[n] = w.scales + source * groups;
        }

        for (int64_t k0 = 0, k1; k0 < w.k; k0 = k1) {
            k1 = k0 + kTileCodes < w.k ? k0 + kTileCodes : w.k;
            alignas(64) float segment_scale[kN];
            if (plan.scale_weights) {
                for (int n = 0; n < kN; ++n) segment_scale[n] = expander.scale();
            } else {
                const int64_t group = w.group_size ? k0 / w.group_size : 0;
                if (w.group_size && k1 > (group + 1) * w.group_size) k1 = (group + 1) * w.group_size;
                for (int n = 0; n < kN; ++n) segment_scale[n] = expander.scale() * scale[n][group];
            }
            const int64_t chunks = ceil_div(k1 - k0, Isa::kChunk);
            const int64_t offset = k0 * w.format.bits() / 8, bytes = chunks * Isa::kChunk * w.format.bits() / 8;
            Isa::expand_tile(expander, row, offset, row_bytes - offset, chunks, tile);
            if (plan.scale_weights) scale_tile(w, scale, k0, k1, tile);
            const int64_t units = chunks * Isa::kChunk / Isa::kUnitCodes;
            // While this tile is multiplied, the codes of the next come nearer: further along K, or kN rows on.
            const uint8_t* next = row[0] + (k1 < w.k ? offset + bytes : kN * row_bytes);
            Fetch fetch(next, bytes, row_bytes, kN);
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t first_row = rows * b / blocks, end_row = rows * (b + 1) / blocks;
                multiply_rows(end_row - first_row, x + (m0 + first_row) * plan.ldx + k0 / Isa::kUnitCodes, plan.ldx,
                              tile, units, segment_scale, k0 == 0, sums + first_row * kN, fetch);
            }
        }

        const int64_t valid = w.n - n0 < kN ? w.n - n0 : kN;
        float bias[kN] = {};
        if (p.bias != nullptr) load_floats<typename Isa::Native>(p.bias, p.bias_dtype, n0, valid, bias);
        for (int64_t m = 0; m < rows; ++m) {
            for (int n = 0; n < kN; ++n) sums[m * kN + n] += bias[n];
            store_floats<typename Isa::Native>(sums + m * kN, p.dtype, (m0 + m) * w.n + n0, valid, p.y);
        }
    }
};

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
