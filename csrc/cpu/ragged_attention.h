// Attention of a few queries over a sequence's blocked cache, by chunks of the cache with a running softmax. Included
// after ragged_vector.h.
//
// A task's rows are its queries times the heads that share a key/value head, so that each key is expanded to fp32
// once for all of them:
//
//   scores[rows, kChunk] = q[rows, size] * keys^T        keys are transposed to [size, kChunk]
//   sums[rows, size]     = sums * rescale + exp(scores - largest) * values[chunk, size]
#pragma once

namespace ds_fp6 {
namespace cpu {
namespace {

// Positions of the cache at a time: keys, their transpose and values of 128 channels are 96 KiB, within L2.
constexpr int64_t kChunk = 64;

// Positions [p0, p0 + n) of one head to rows of fp32, `stride` apart; columns from `size` on are left alone.
template <class Native>
void gather_rows(const CacheView& cache, Dtype dtype, const Atom& atom, int64_t head, int64_t p0, int64_t n, float* out,
                 int64_t stride) {
    const int64_t base = atom.blocks[p0 / cache.block_size] * cache.block_stride + head * cache.head_stride;
    const int64_t token = p0 % cache.block_size;
    for (int64_t i = 0; i < n; ++i)
        load_floats<Native>(cache.data, dtype, base + (token + i) * cache.token_stride, cache.size, out + i * stride);
}

// Asks for what gather_rows will read. A head's rows are too far apart for the hardware to guess the next, and a
// decode step finds them in memory, not in a cache.
void prefetch_rows(const CacheView& cache, Dtype dtype, const Atom& atom, int64_t head, int64_t p0, int64_t n) {
    const int64_t bytes = element_size(dtype), line = 64;
    const int64_t base = atom.blocks[p0 / cache.block_size] * cache.block_stride + head * cache.head_stride;
    const int64_t first = base + p0 % cache.block_size * cache.token_stride;
    const char* from = static_cast<const char*>(cache.data) + first * bytes;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t offset = 0; offset < cache.size * bytes; offset += line)
            __builtin_prefetch(from + i * cache.token_stride * bytes + offset);
}

// What a task keeps while it goes through the cache.
struct AttentionRows {
    float *q, *sums;                   // [rows, padded]
    float *largest, *total;            // [rows]
    float *scores;                     // [rows, kChunk]
    float *cached, *transposed;        // [kChunk, padded], [padded, kChunk]

    AttentionRows(int64_t rows, int64_t size, int64_t padded) {
        const int64_t floats = rows * (2 * padded + kChunk + 2) + 2 * kChunk * padded;
        cached = static_cast<float*>(scratch(Scratch::kTile, size_t(floats) * sizeof(float)));
        transposed = cached + kChunk * padded;
        scores = transposed + kChunk * padded;
        largest = scores + rows * kChunk;
        total = largest + rows;
        sums = total + rows;
        q = sums + rows * padded;
        __builtin_memset(total, 0, size_t(rows * (1 + padded)) * sizeof(float));
        if (size < padded) {  // the columns that no row fills
            __builtin_memset(cached, 0, size_t(kChunk * padded) * sizeof(float));
            __builtin_memset(q, 0, size_t(rows * padded) * sizeof(float));
        }
    }
};

// Turns a row's scores of the chunk's columns [begin, end) into weights, zero elsewhere below n, and rescales its sums.
void running_softmax(AttentionRows& rows, int64_t row, int64_t padded, int64_t begin, int64_t end, int64_t n) {
    float* score = rows.scores + row * kChunk;
    if (begin >= end) {
        __builtin_memset(score, 0, size_t(n) * sizeof(float));
        return;
    }
    float largest = rows.largest[row];
#pragma omp simd reduction(max : largest)
    for (int64_t j = begin; j < end; ++j) largest = score[j] > largest ? score[j] : largest;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = begin; j < end; ++j) {
        score[j] = exponential(score[j] - largest);
        total += score[j];
    }
    for (int64_t j = 0; j < begin; ++j) score[j] = 0.0f;
    for (int64_t j = end; j < n; ++j) score[j] = 0.0f;
    if (largest > rows.largest[row]) {
        const float rescale = exponential(rows.largest[row] - largest);
        float* sum = rows.sums + row * padded;
        for (int64_t i = 0; i < padded; ++i) sum[i] *= rescale;
        rows.total[row] *= rescale;
        rows.largest[row] = largest;
    }
    rows.total[row] += total;
}

template <class Native>
void attention(const AttentionProblem& p, const Atom& atom, int64_t kv_head, int64_t q0, int64_t q1) {
    const int64_t group = p.group(), rows = (q1 - q0) * group, size = p.keys.size, padded = round_up(size, kWidth);
    AttentionRows state(rows, size, padded);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t offset = (atom.first + q0 + r / group) * p.q_stride + (kv_head * group + r % group) * size;
        load_floats<Native>(p.q, p.dtype, offset, size, state.q + r * padded);
        for (int64_t i = 0; i < size; ++i) state.q[r * padded + i] *= p.scale;
        state.largest[r] = -3.0e38f;
    }

    const int64_t last = atom.position + q1;  // one past what the last query sees
    const int64_t first = p.window && atom.position + q0 + 1 > p.window ? atom.position + q0 + 1 - p.window : 0;
    const auto chunk_from = [&](int64_t position) {  // positions in the chunk that starts there: within a block
        const int64_t in_block = p.keys.block_size - position % p.keys.block_size;
        const int64_t chunk = in_block < kChunk ? in_block : kChunk;
        return last - position < chunk ? last - position : chunk;
    };
    int64_t p0 = first / kChunk * kChunk, n = chunk_from(p0);
    prefetch_rows(p.keys, p.dtype, atom, kv_head, p0, n);
    prefetch_rows(p.values, p.dtype, atom, kv_head, p0, n);
    for (int64_t next; p0 < last; p0 += n, n = next) {
        next = p0 + n < last ? chunk_from(p0 + n) : 0;
        gather_rows<Native>(p.keys, p.dtype, atom, kv_head, p0, n, state.cached, padded);
        if (next) prefetch_rows(p.keys, p.dtype, atom, kv_head, p0 + n, next);
        const int64_t columns = round_up(n, kWidth);
        for (int64_t j = 0; j < columns; j += kWidth)
            for (int64_t i = 0; i < padded; i += kWidth)
                transpose_square(state.cached + j * padded + i, padded, state.transposed + i * kChunk + j, kChunk);
        multiply(state.q, padded, state.transposed, kChunk, state.scores, kChunk, rows, columns, padded, false);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t seen = atom.position + q0 + r / group + 1 - p0;  // columns below this are not in the future
            const int64_t begin = p.window && seen > p.window ? seen - p.window : 0;
            running_softmax(state, r, padded, begin, seen < n ? seen : n, n);
        }
        gather_rows<Native>(p.values, p.dtype, atom, kv_head, p0, n, state.cached, padded);
        if (next) prefetch_rows(p.values, p.dtype, atom, kv_head, p0 + n, next);
        multiply(state.scores, kChunk, state.cached, padded, state.sums, padded, rows, padded, n, true);
    }

    for (int64_t r = 0; r < rows; ++r) {
        float* sum = state.sums + r * padded;
        const float scale = 1.0f / state.total[r];
        for (int64_t i = 0; i < size; ++i) sum[i] *= scale;
        const int64_t offset = ((atom.first + q0 + r / group) * p.heads + kv_head * group + r % group) * size;
        store_floats<Native>(sum, p.dtype, offset, size, p.out);
    }
}

}  // namespace
}  // namespace cpu
}  // namespace ds_fp6
