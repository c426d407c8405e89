// A KernelSet out of the kernels of one instruction set. Included between DS_FP6_TARGET_BEGIN and _END (target.h).
//
// Fp32 and Bf16 are families of Isa structs (linear_dot.h): Family::visit(format, run) calls run(Isa()) with the
// member of the family that expands that format. Bf16 is NoBf16 where the CPU cannot multiply bf16.
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

struct NoBf16 {};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct RunLinear {
    const LinearProblem& problem;
    const LinearPlan& plan;
    const uint32_t* x;
    int64_t t0, t1;

    template <class Isa>
    void operator()(Isa) const {
        const int64_t n = problem.weight.n;
        if (plan.dot) {
            const int64_t end = t1 * plan.n_tile < n ? t1 * plan.n_tile : n;
            return dot_task<Isa>(problem, plan, x, t0 * plan.n_tile, end);
        }
        const typename Isa::Expander expander(problem.weight.format);
        const int64_t n_tiles = ceil_div(n, plan.n_tile);
        for (int64_t t = t0; t < t1; ++t) {
            const int64_t m0 = t / n_tiles * plan.m_tile;
            const int64_t m1 = m0 + plan.m_tile < problem.m ? m0 + plan.m_tile : problem.m;
            Panel<Isa>::task(problem, plan, expander, x, t % n_tiles * plan.n_tile, m0, m1);
        }
    }
};

struct Dequantize {
    const PackedMatrix& w;
    void* out;
    Dtype dtype;
    int64_t n0, n1;

    template <class Isa>
    void operator()(Isa) const {
        const typename Isa::Expander expander(w.format);
        const int64_t row_bytes = w.row_bytes(), groups = w.groups();
        const int64_t chunk_bytes = Isa::kChunk * w.format.bits() / 8, chunks = ceil_div(w.k, Isa::kChunk);
        const int64_t group_size = w.group_size ? w.group_size : w.k;
        float* values = static_cast<float*>(scratch(Scratch::kRow, chunks * Isa::kChunk * sizeof(float)));
        for (int64_t n = n0; n < n1; ++n) {
            const uint8_t* row = w.packed + n * row_bytes;
            for (int64_t c = 0; c < chunks; ++c) {
                typename Isa::Weights weights[Isa::kVectors];
                expander.expand(row + c * chunk_bytes, expander.window(row_bytes - c * chunk_bytes), weights);
                for (int j = 0; j < Isa::kVectors; ++j)
                    Isa::store_sum(values + c * Isa::kChunk + j * Isa::kLanes, weights[j]);
            }
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t begin = g * group_size, end = begin + group_size < w.k ? begin + group_size : w.k;
                const float exact = expander.scale(), scale = w.scales[n * groups + g];
                for (int64_t k = begin; k < end; ++k) values[k] = values[k] * exact * scale;
            }
            store_floats<typename Isa::Native>(values, dtype, n * w.k, w.k, out);
        }
    }
};

template <class Fp32, class Bf16 = NoBf16>
struct Kernels {
    static constexpr bool kHasBf16 = !kSame<Bf16, NoBf16>;
    using Native = typename Fp32::Native;

    static LinearPlan plan_linear(const LinearProblem& p, int threads) {
        const PackedMatrix& w = p.weight;
        LinearPlan plan{};
        plan.scale_weights = w.groups() > 1 && w.group_size % Fp32::kChunk != 0;
        if constexpr (kHasBf16)
            plan.bf16 = p.dtype == Dtype::kBFloat16 && (w.groups() == 1 || w.group_size % Bf16::kChunk == 0);
        plan.dot = p.m <= kMaxDotRows && !plan.scale_weights;

        const int64_t unit_codes = plan.bf16 ? 2 : 1;
        plan.use_x = w.k % Fp32::kChunk == 0 && (plan.bf16 || p.dtype == Dtype::kFloat32);
        plan.ldx = round_up(w.k, Fp32::kChunk) / unit_codes;
        // Rows a multiple of 1 KiB apart would compete for a few sets of L1. That alone is no reason to copy x.
        if (!plan.use_x && plan.ldx % 256 == 0) plan.ldx += 16;

        if (plan.dot) {
            plan.n_tile = 8;
            plan.m_tile = p.m;
            plan.tasks = ceil_div(w.n, plan.n_tile);
            return plan;
        }
        plan.n_tile = Fp32::kPanel;
        const int64_t n_tiles = ceil_div(w.n, plan.n_tile);
        // A narrow W is cut along M, so that every thread has a few tasks.
        const int64_t wanted = ceil_div(4 * threads, n_tiles), smallest = ceil_div(p.m, 48);
        int64_t m_tiles = wanted < smallest ? wanted : smallest;
        if (m_tiles < ceil_div(p.m, kMaxTileRows)) m_tiles = ceil_div(p.m, kMaxTileRows);
        plan.m_tile = ceil_div(p.m, m_tiles);
        plan.tasks = n_tiles * ceil_div(p.m, plan.m_tile);
        return plan;
    }

    static void prepare_x(const LinearProblem& p, const LinearPlan& plan, uint32_t* prepared, int64_t m0, int64_t m1) {
        const int64_t k = p.weight.k;
        for (int64_t m = m0; m < m1; ++m) {
            uint32_t* row = prepared + m * plan.ldx;
            if (plan.bf16) {
                uint16_t* to = reinterpret_cast<uint16_t*>(row);
                __builtin_memcpy(to, static_cast<const uint16_t*>(p.x) + m * k, size_t(k) * 2);
                __builtin_memset(to + k, 0, size_t(plan.ldx * 2 - k) * 2);
            } else {
                load_floats<Native>(p.x, p.dtype, m * k, k, reinterpret_cast<float*>(row));
                __builtin_memset(row + k, 0, size_t(plan.ldx - k) * 4);
            }
        }
    }

    static void linear(const LinearProblem& p, const LinearPlan& plan, const uint32_t* x, int64_t t0, int64_t t1) {
        const RunLinear run{p, plan, x, t0, t1};
        if constexpr (kHasBf16)
            if (plan.bf16) return Bf16::visit(p.weight.format, run);
        Fp32::visit(p.weight.format, run);
    }

    static void dequantize(const PackedMatrix& w, void* out, Dtype dtype, int64_t n0, int64_t n1) {
        Fp32::visit(w.format, Dequantize{w, out, dtype, n0, n1});
    }

    static constexpr KernelSet set(const char* name) {
        return {name, plan_linear, prepare_x, linear, dequantize, quantize_rows<Native>};
    }
};

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
