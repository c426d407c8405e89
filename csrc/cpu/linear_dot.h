// y = x . W^T for a few rows of x: packed codes -> registers -> products, no intermediate in memory.
// Included between DS_FP6_TARGET_BEGIN and _END (target.h).
//
// An instruction set describes itself by a struct Isa:
//   Weights, Sum            registers of expanded weights, of fp32 sums (Sum: kLanes floats)
//   kVectors                Weights in a chunk; a chunk is kVectors * kLanes units of 4 bytes: one fp32 or two bf16
//   kChunk                  codes in a chunk; a multiple of 8, so that a chunk is whole bytes at every width
//   Expander(FormatSpec)    constants, kept in registers; expand(codes, window, Weights[kVectors]) reads a
//                           chunk, and of its bytes only those in window(bytes that the row has from there on); the
//                           weights are its values times 1 / scale()
//   dot_rows(rows of x)     rows of W taken together, so that one load of x serves them all
//   multiply_add(sum, weights, const uint32_t* x), zero(), total(sum), scaled_add(sum, addend, scale)
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// Rows of W [n0, n1) against kM rows of x.
//
// x: [kM, ldx] units, zero from k on. W's row r, chunk c is at packed + r * row_bytes + c * kChunk * bits / 8.
template <class Isa, int kM>
void dot_rows(const LinearProblem& p, const uint32_t* x, int64_t ldx, int64_t m0, int64_t n0, int64_t n1) {
    using Sum = typename Isa::Sum;
    constexpr int kRows = Isa::dot_rows(kM);
    constexpr int kChunkUnits = Isa::kVectors * Isa::kLanes;
    const PackedMatrix& w = p.weight;
    const typename Isa::Expander expander(w.format);
    const int64_t row_bytes = w.row_bytes(), groups = w.groups();
    const int64_t chunk_bytes = Isa::kChunk * w.format.bits() / 8;
    const int64_t chunks = ceil_div(w.k, Isa::kChunk);
    const auto whole = expander.window(row_bytes), last = expander.window(row_bytes - (chunks - 1) * chunk_bytes);
    const int64_t group_chunks = w.group_size ? w.group_size / Isa::kChunk : chunks;

    for (int64_t n = n0; n < n1; n += kRows) {
        const uint8_t* row[kRows];
        const float* scale[kRows];
        Sum sum[kRows][kM];
        for (int r = 0; r < kRows; ++r) {
            const int64_t source = n + r < n1 ? n + r : n1 - 1;
            row[r] = w.packed + source * row_bytes;
            scale[r] = w.scales + source * groups;
            for (int m = 0; m < kM; ++m) sum[r][m] = Isa::zero();
        }
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t end = group + 1 < groups ? (group + 1) * group_chunks : chunks;
            Sum part[kRows][kM];
            for (int r = 0; r < kRows; ++r)
                for (int m = 0; m < kM; ++m) part[r][m] = Isa::zero();
            for (int64_t c = group * group_chunks; c < end; ++c) {
                const auto window = c + 1 < chunks ? whole : last;
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    typename Isa::Weights weights[Isa::kVectors];
                    const uint8_t* codes = row[r] + c * chunk_bytes;
                    // The rows that this thread takes next lie kRows rows on.
                    __builtin_prefetch(codes + kRows * row_bytes);
                    expander.expand(codes, window, weights);
                    // NOTE: one opaque pointer keeps the compiler from spreading x over kM of them, and the sums, which
                    // those would push out, in registers.
                    const uint32_t* values = x + c * kChunkUnits;
                    asm("" : "+r"(values));
#pragma GCC unroll 8
                    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
                        for (int j = 0; j < Isa::kVectors; ++j)
                            part[r][m] = Isa::multiply_add(part[r][m], weights[j], values + m * ldx + j * Isa::kLanes);
                    }
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int m = 0; m < kM; ++m)
                    sum[r][m] = Isa::scaled_add(sum[r][m], part[r][m], expander.scale() * scale[r][group]);
        }
        float bias[kRows] = {};
        const int64_t valid = n1 - n < kRows ? n1 - n : kRows;
        if (p.bias != nullptr) load_floats<typename Isa::Native>(p.bias, p.bias_dtype, n, valid, bias);
        for (int m = 0; m < kM; ++m) {
            float y[kRows];
            for (int r = 0; r < kRows; ++r) y[r] = Isa::total(sum[r][m]) + bias[r];
            store_floats<typename Isa::Native>(y, p.dtype, (m0 + m) * w.n + n, valid, p.y);
        }
    }
}

// Beyond, the rows of x no longer fit in L1 beside the weights, nor their sums in registers.
constexpr int kMaxDotRows = 5;

template <class Isa, int kM = kMaxDotRows>
void dot_task(const LinearProblem& p, const LinearPlan& plan, const uint32_t* x, int64_t n0, int64_t n1) {
    if (p.m == kM) return dot_rows<Isa, kM>(p, x, plan.ldx, 0, n0, n1);
    if constexpr (kM > 1) return dot_task<Isa, kM - 1>(p, plan, x, n0, n1);
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
