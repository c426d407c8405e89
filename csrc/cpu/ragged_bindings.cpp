// torch.ops.ds_fp6.ragged_*: FastGen's operators for CPU tensors. Check, split over threads, call.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ragged.h"

namespace {

using namespace ds_fp6::cpu;
using at::Tensor;

// Those of the instruction set that the linear kernels run on.
const RaggedKernels& ragged_kernels() {
#if defined(__x86_64__)
    if (std::strncmp(kernels().name, "avx512", 6) == 0) return kRaggedAvx512;
    if (std::strncmp(kernels().name, "avx2", 4) == 0) return kRaggedAvx2;
#endif
    return kRaggedGeneric;
}

Dtype dtype_of(const char* name, const Tensor& tensor) {
    const at::ScalarType dtype = tensor.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
                     " must be float32, float16 or bfloat16, got ", dtype);
    return dtype == at::kFloat ? Dtype::kFloat32 : dtype == at::kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
}

void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& like) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
                     tensor.scalar_type());
}

// A 2-D tensor whose rows are contiguous; its row stride.
int64_t row_stride(const char* name, const Tensor& tensor, int64_t rows, int64_t width) {
    TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width, name, " must be [", rows,
                      ", ", width, "], got ", tensor.sizes());
    TORCH_CHECK_VALUE(width == 1 || tensor.stride(1) == 1, name, " must have contiguous rows, got strides ",
                      tensor.strides());
    return tensor.stride(0);
}

void check_contiguous(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.sizes() == shape, name, " must be contiguous ", shape, ", got ",
                      tensor.sizes(), " with strides ", tensor.strides());
}

// [blocks, block_size, heads, size], contiguous along size.
CacheView cache_view(const char* name, const Tensor& cache) {
    TORCH_CHECK_VALUE(cache.dim() == 4 && cache.stride(3) == 1, name,
                      " must be [blocks, block_size, heads, size], contiguous along size, got ", cache.sizes(),
                      " with strides ", cache.strides());
    return {cache.data_ptr(),    cache.stride(0), cache.stride(1), cache.stride(2),
            cache.size(1), cache.size(2),   cache.size(3)};
}

// Runs work(begin, end) over [0, count) in parts of at least `grain`.
template <class Work>
void parallel(int64_t count, int64_t grain, const Work& work) {
    at::parallel_for(0, count, std::max<int64_t>(grain, 1), work);
}

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

void ragged_attention(const Tensor& out, const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& atoms,
                      double scale, int64_t window) {
    AttentionProblem p{};
    p.dtype = dtype_of("q", q);
    p.keys = cache_view("keys", keys);
    p.values = cache_view("values", values);
    check_same_dtype("out", out, q);
    check_same_dtype("keys", keys, q);
    check_same_dtype("values", values, q);
    TORCH_CHECK_VALUE(keys.sizes() == values.sizes(), "keys are ", keys.sizes(), ", values ", values.sizes());
    TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) % (p.keys.heads * p.keys.size) == 0,
                      "q must be [tokens, a multiple of ", p.keys.heads, " heads of ", p.keys.size, "], got ",
                      q.sizes());
    TORCH_CHECK_VALUE(window >= 0, "window must be 0 (everything) or positive, got ", window);
    p.q_stride = row_stride("q", q, q.size(0), q.size(1));
    check_contiguous("out", out, q.sizes());
    TORCH_CHECK_TYPE(atoms.scalar_type() == at::kInt, "atoms must be int32, got ", atoms.scalar_type());
    check_contiguous("atoms", atoms, {atoms.size(0), 8});
    p.q = q.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.heads = q.size(1) / p.keys.size;
    p.scale = float(scale);
    p.window = window;

    // A task is one key/value head and as many queries as make 64 rows with the heads that share it.
    struct Task {
        const Atom* atom;
        int32_t kv_head, q0, q1;
    };
    const Atom* atom = reinterpret_cast<const Atom*>(atoms.const_data_ptr<int32_t>());
    const int64_t queries = std::max<int64_t>(1, 64 / p.group());
    std::vector<Task> tasks;
    int64_t work = 0;
    for (int64_t a = 0; a < atoms.size(0); ++a) {
        TORCH_CHECK_VALUE(atom[a].first >= 0 && atom[a].queries >= 0 && atom[a].first + atom[a].queries <= q.size(0) &&
                              atom[a].extent <= atom[a].block_count * p.keys.block_size &&
                              atom[a].position + atom[a].queries == atom[a].extent,
                          "atom ", a, " has queries [", atom[a].first, ", ", atom[a].first + atom[a].queries, ") of ",
                          q.size(0), " at position ", atom[a].position, " of ", atom[a].extent, " in ",
                          atom[a].block_count, " blocks of ", p.keys.block_size);
        // Later queries see more and take longer: they go first.
        for (int64_t q1 = atom[a].queries; q1 > 0; q1 -= queries)
            for (int64_t h = 0; h < p.keys.heads; ++h)
                tasks.push_back({atom + a, int32_t(h), int32_t(std::max<int64_t>(0, q1 - queries)), int32_t(q1)});
        work += int64_t(atom[a].queries) * atom[a].extent * p.heads * p.keys.size;
    }
    const RaggedKernels& kernel = ragged_kernels();
    const int64_t threads = std::min<int64_t>({int64_t(tasks.size()), at::get_num_threads(), 1 + work / (16 * kGrain)});
    std::atomic<int64_t> next{0};
    parallel(threads, 1, [&](int64_t, int64_t) {
        for (int64_t t; (t = next.fetch_add(1)) < int64_t(tasks.size());)
            kernel.attention(p, *tasks[t].atom, tasks[t].kv_head, tasks[t].q0, tasks[t].q1);
    });
}

// Returns the positions that cos and sin must have; where they have fewer, nothing was done.
int64_t ragged_rotary(const Tensor& cache, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                      const Tensor& sin, const Tensor& sequences, const Tensor& tokens, const Tensor& pointers) {
    TORCH_CHECK_VALUE(cache.dim() == 5 && cache.size(2) == 2,
                      "the cache must be [blocks, block_size, 2, heads, size], got ", cache.sizes());
    RotaryProblem p{};
    p.dtype = dtype_of("q", q);
    const Tensor keys = cache.select(2, 0), values = cache.select(2, 1);
    p.keys = cache_view("keys", keys);
    p.values = cache_view("values", values);
    check_same_dtype("k", k, q);
    check_same_dtype("v", v, q);
    check_same_dtype("the cache", cache, q);
    const int64_t n = tokens.numel(), size = p.keys.size, kv_width = p.keys.heads * size;
    TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) % size == 0, "q must be [tokens, heads * ", size, "], got ", q.sizes());
    p.q_stride = row_stride("q", q, n, q.size(1));
    p.k_stride = row_stride("k", k, n, kv_width);
    p.v_stride = row_stride("v", v, n, kv_width);
    TORCH_CHECK_TYPE(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat, "cos and sin must be float32");
    TORCH_CHECK_VALUE(cos.dim() == 2 && 2 * cos.size(1) <= size, "cos must be [positions, at most ", size / 2,
                      "], got ", cos.sizes());
    check_contiguous("cos", cos, cos.sizes());
    check_contiguous("sin", sin, cos.sizes());
    TORCH_CHECK_TYPE(sequences.scalar_type() == at::kInt && tokens.scalar_type() == at::kInt &&
                         pointers.scalar_type() == at::kLong,
                     "sequences and tokens must be int32, pointers int64");
    check_contiguous("sequences", sequences, {sequences.size(0), 4});
    check_contiguous("pointers", pointers, {sequences.size(0)});
    TORCH_CHECK_VALUE(tokens.is_contiguous(), "tokens must be contiguous");
    p.q = q.data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.heads = q.size(1) / size;
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    p.half = cos.size(1);
    p.sequences = sequences.const_data_ptr<int32_t>();
    p.token_sequence = tokens.const_data_ptr<int32_t>();
    p.block_lists = pointers.const_data_ptr<int64_t>();

    int64_t positions = 0;
    for (int64_t s = 0; s < sequences.size(0); ++s)
        positions = std::max<int64_t>(positions, p.sequences[4 * s + 1] + p.sequences[4 * s + 2]);
    if (p.half && positions > cos.size(0)) return positions;
    const RaggedKernels& kernel = ragged_kernels();
    parallel(n, kGrain / (q.size(1) + 2 * kv_width) + 1,
             [&](int64_t begin, int64_t end) { kernel.rotary(p, begin, end); });
    return positions;
}

void ragged_norm(const Tensor& out, const std::optional<Tensor>& sum, const Tensor& x,
                 const std::optional<Tensor>& residual, const Tensor& gamma, const std::optional<Tensor>& beta,
                 double epsilon) {
    NormProblem p{};
    p.dtype = dtype_of("x", x);
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0, "x must be [..., width], got ", x.sizes());
    p.width = x.size(-1);
    check_contiguous("x", x, x.sizes());
    check_contiguous("out", out, x.sizes());
    check_same_dtype("out", out, x);
    const auto check_optional = [&](const char* name, const std::optional<Tensor>& tensor, at::IntArrayRef shape) {
        if (!tensor.has_value()) return;
        check_contiguous(name, *tensor, shape);
        check_same_dtype(name, *tensor, x);
    };
    check_optional("sum", sum, x.sizes());
    check_optional("residual", residual, x.sizes());
    check_optional("gamma", gamma, {p.width});
    check_optional("beta", beta, {p.width});
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.sum = sum.has_value() ? sum->mutable_data_ptr() : nullptr;
    p.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
    p.gamma = gamma.const_data_ptr();
    p.beta = beta.has_value() ? beta->const_data_ptr() : nullptr;
    p.epsilon = float(epsilon);
    const RaggedKernels& kernel = ragged_kernels();
    parallel(x.numel() / p.width, kGrain / p.width + 1,
             [&](int64_t begin, int64_t end) { kernel.norm(p, begin, end); });
}

void ragged_activation(const Tensor& out, const Tensor& x, const std::optional<Tensor>& bias, int64_t activation,
                       bool gated) {
    ActivationProblem p{};
    p.dtype = dtype_of("x", x);
    TORCH_CHECK_VALUE(0 <= activation && activation < 4, "activation must lie in 0..3, got ", activation);
    TORCH_CHECK_VALUE(out.dim() >= 1 && x.dim() == out.dim() && x.numel() == out.numel() * (gated ? 2 : 1) &&
                          x.size(-1) == out.size(-1) * (gated ? 2 : 1) && out.size(-1) > 0,
                      "x of ", x.sizes(), " and out of ", out.sizes(), " do not belong together");
    check_contiguous("x", x, x.sizes());
    check_contiguous("out", out, out.sizes());
    check_same_dtype("out", out, x);
    if (bias.has_value()) {
        check_contiguous("bias", *bias, {x.size(-1)});
        check_same_dtype("bias", *bias, x);
        p.bias = bias->const_data_ptr();
    }
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.width = out.size(-1);
    p.activation = Activation(activation);
    p.gated = gated;
    const RaggedKernels& kernel = ragged_kernels();
    parallel(out.numel() / p.width, kGrain / x.size(-1) + 1,
             [&](int64_t begin, int64_t end) { kernel.activation(p, begin, end); });
}

void ragged_dense(const Tensor& out, const Tensor& x, const Tensor& w) {
    DenseProblem p{};
    TORCH_CHECK_TYPE(w.scalar_type() == at::kHalf, "w must be float16, got ", w.scalar_type());
    check_same_dtype("out", out, w);
    check_same_dtype("x", x, w);
    TORCH_CHECK_VALUE(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "x of ", x.sizes(), " and w of ",
                      w.sizes(), " do not belong together");
    p.m = x.size(0);
    p.n = w.size(0);
    p.k = x.size(1);
    p.w_stride = row_stride("w", w, p.n, p.k);
    p.y_stride = row_stride("out", out, p.m, p.n);
    const Tensor wide = x.to(at::kFloat).contiguous();
    p.x = wide.const_data_ptr<float>();
    p.w = w.const_data_ptr();
    p.y = out.data_ptr();
    const RaggedKernels& kernel = ragged_kernels();
    parallel(p.n, kGrain / p.k + 1, [&](int64_t begin, int64_t end) { kernel.dense(p, begin, end); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ds_fp6, m) {
    m.def("ragged_attention(Tensor(a!) out, Tensor q, Tensor keys, Tensor values, Tensor atoms, float scale, "
          "int window) -> ()");
    m.def("ragged_rotary(Tensor(a!) cache, Tensor(b!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor sequences, "
          "Tensor tokens, Tensor pointers) -> int");
    m.def("ragged_norm(Tensor(a!) out, Tensor(b!)? sum, Tensor x, Tensor? residual, Tensor gamma, Tensor? beta, "
          "float epsilon) -> ()");
    m.def("ragged_activation(Tensor(a!) out, Tensor x, Tensor? bias, int activation, bool gated) -> ()");
    m.def("ragged_dense(Tensor(a!) out, Tensor x, Tensor w) -> ()");
}

TORCH_LIBRARY_IMPL(ds_fp6, CPU, m) {
    m.impl("ragged_attention", ragged_attention);
    m.impl("ragged_rotary", ragged_rotary);
    m.impl("ragged_norm", ragged_norm);
    m.impl("ragged_activation", ragged_activation);
    m.impl("ragged_dense", ragged_dense);
}
