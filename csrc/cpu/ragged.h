// The kernels of FastGen's ragged batches, as ragged_bindings.cpp sees them: plain pointers, no torch.
//
// As in kernels.h, a kernel works on a range of rows or on one task, and the caller owns the threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace ds_fp6 {
namespace cpu {

// A run of queries of one sequence: DeepSpeed's attention atom.
struct Atom {
    const int32_t* blocks;  // the sequence's cache blocks
    int32_t first;          // row of the first query in the batch
    int32_t queries;
    int32_t block_count;
    int32_t extent;    // positions in the cache, those of these queries included
    int32_t position;  // of the first query in its sequence
    int32_t unused;
};
static_assert(sizeof(Atom) == 32, "an atom is a row of int32 [n, 8]");

// One layer's keys or values in the cache: element (block, token, head, i) at `data` plus their strides, i contiguous.
struct CacheView {
    void* data;
    int64_t block_stride, token_stride, head_stride;  // elements
    int64_t block_size, heads, size;
};

// out = softmax(scale * q k^T) v, causal, over the last `window` positions (0: all).
struct AttentionProblem {
    const void* q;  // [tokens, heads * size], rows q_stride elements apart
    void* out;      // [tokens, heads * size], contiguous
    int64_t q_stride;
    int64_t heads;
    CacheView keys, values;
    Dtype dtype;
    float scale;
    int64_t window;

    int64_t group() const { return heads / keys.heads; }  // query heads that share a key/value head
};

// Rotates q in place by halves, and writes rotated k and plain v into the cache.
struct RotaryProblem {
    void* q;
    const void *k, *v;                     // rows of heads * size, strides below in elements
    int64_t q_stride, k_stride, v_stride;  // elements
    int64_t heads;
    CacheView keys, values;
    Dtype dtype;
    const float *cos, *sin;  // [positions, half]
    int64_t half;            // rotated pairs of a head; 0 copies only
    const int32_t* sequences;           // [n_seqs, 4] first token, tokens, seen, unused
    const int32_t* token_sequence;      // [tokens]
    const int64_t* block_lists;         // [n_seqs] addresses of int32 lists
};

// sum = x + residual (where there is one), rounded to dtype; out = norm(sum) * gamma (+ beta).
struct NormProblem {
    const void *x, *residual;    // [rows, width] of dtype; residual may be null
    void *out, *sum;             // [rows, width]; sum may be null. Any of these may be one tensor
    const void *gamma, *beta;    // [width]; beta null: RMS norm, else layer norm
    int64_t width;
    Dtype dtype;
    float epsilon;
};

enum class Activation { kGelu, kRelu, kSilu, kIdentity };

// Gated: out[i] = act(x[2i]) * x[2i + 1]. Else out[i] = act(x[i] + bias[i]).
struct ActivationProblem {
    const void* x;     // [rows, width], or [rows, 2 * width] where gated
    const void* bias;  // of x's width, or null
    void* out;         // [rows, width]; x itself where not gated
    int64_t width;
    Dtype dtype;
    Activation activation;
    bool gated;
};

// y[m, n] = x[m, k] . w[n, k]^T for a few rows of x.
struct DenseProblem {
    const float* x;  // [m, k]
    const void* w;   // fp16 [n, k], rows w_stride elements apart
    void* y;         // fp16 [m, n], rows y_stride elements apart
    int64_t m, n, k, w_stride, y_stride;
};

struct RaggedKernels {
    // Queries [q0, q1) of an atom, of the heads that share key/value head `kv_head`.
    void (*attention)(const AttentionProblem&, const Atom&, int64_t kv_head, int64_t q0, int64_t q1);
    void (*rotary)(const RotaryProblem&, int64_t token0, int64_t token1);
    void (*norm)(const NormProblem&, int64_t row0, int64_t row1);
    void (*activation)(const ActivationProblem&, int64_t row0, int64_t row1);
    void (*dense)(const DenseProblem&, int64_t n0, int64_t n1);
};

extern const RaggedKernels kRaggedGeneric;
#if defined(__x86_64__)
extern const RaggedKernels kRaggedAvx2;
extern const RaggedKernels kRaggedAvx512;  // F, BW, DQ, VL
#endif

}  // namespace cpu
}  // namespace ds_fp6
