// y[m, n] = x[m, k] . weights[n, k]^T * scale[n, group] (+ bias[n]) with cp.async and mma.sync: compute capability 8.0
// and everything newer that has no kernel of its own.
//
// Weights are the MMA's A operand, dequantized in registers, so that few tokens waste little of an MMA. A block of 8
// warps computes 128 channels x Tile::kTokens: 4 warps along the channels, and 2 along K or along the tokens.
//
// Stream-K: all (tile, step along K) pairs form one line that is cut into equal ranges, one a block. A tile that is cut
// is added up in fp32 through the workspace by whichever of its blocks comes last, in the order of K whoever that is:
// deterministic, and no block waits for another.
#pragma once

#include "linear_sm80_tile.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm80 {

template <class Fmt, class T, class Tile, bool Grouped>
class Block {
    static constexpr int kBits = Fmt::kBits;
    using Shared = SharedLayout<Tile, kBits>;
    using Sums = float[kWarpBlocks][Tile::kFragments][4];

public:
    DS_FP6_DEVICE Block(const Problem& p, uint8_t* shared) : p_(p), shared_(shared) {
        const int warp = threadIdx.x / 32;
        lane_ = threadIdx.x % 32;
        warp_n_ = warp % kWarpsN;
        warp_k_ = Tile::kWarpsK > 1 ? warp / kWarpsN : 0;
        warp_m_ = Tile::kWarpsM > 1 ? warp / kWarpsN : 0;
    }

    DS_FP6_DEVICE void run() {
        const int begin = range_begin(blockIdx.x), end = range_begin(blockIdx.x + 1);
        for (int unit = begin; unit < end;) {
            const int tile = unit / p_.steps, first = unit - tile * p_.steps;
            const Piece piece{tile / p_.tiles_m, tile % p_.tiles_m, first, min(p_.steps, first + end - unit)};
            Sums sums;
            multiply(piece, sums);
            add_up_warps(sums);
            const bool whole = piece.end - piece.begin == p_.steps;
            if (whole || last_to_arrive(tile, piece, sums)) store(piece, sums);
            __syncthreads();  // the ring is refilled
            unit += piece.end - piece.begin;
        }
    }

private:
    DS_FP6_DEVICE int range_begin(int block) const { return block * p_.range_least + min(block, p_.range_more); }
    // The block whose range holds a unit.
    DS_FP6_DEVICE int block_of(int unit) const {
        const int in_longer = p_.range_more * (p_.range_least + 1);
        return unit < in_longer ? unit / (p_.range_least + 1) : p_.range_more + (unit - in_longer) / p_.range_least;
    }

    // ---- main loop ----

    DS_FP6_DEVICE void multiply(const Piece& piece, Sums& sums) {
#pragma unroll
        for (float& sum : reinterpret_cast<float(&)[Tile::kSums]>(sums)) sum = 0.0f;
        Sums group_sums;
        if constexpr (Grouped) enter_first_group(piece, group_sums);

        const int steps = piece.end - piece.begin;
        Copies copies = first_copies(piece);
#pragma unroll
        for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
            if (stage < steps) load_stage(copies, stage);
            ptx::cp_async_commit();
        }
        int stage = 0, free_stage = Tile::kStages - 1;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            ptx::cp_async_wait<Tile::kStages - 2>();
            __syncthreads();
            if (step + Tile::kStages - 1 < steps) load_stage(copies, free_stage);
            ptx::cp_async_commit();
            multiply_stage(piece, piece.begin + step, stage, sums, group_sums);
            free_stage = stage;
            stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
        }
        if constexpr (Grouped) add_group(sums, group_sums);
        ptx::cp_async_wait<0>();
        __syncthreads();
    }

    // ---- copies: 16-byte chunks of a stage, dealt out to the threads in turn ----
    //
    // Weights as they lie in memory: [panel along n][panel along k]. x: [panel along k][token], chunks swizzled.
    // What lies beyond n, m or k is filled with zeros.

    static constexpr int kPanelChunks = Tiles<kBits>::kPanelBytes / 16, kRowChunks = Tile::kWarpsK * kPanelChunks;
    static constexpr int kWeightChunks = kPanels * kRowChunks;
    static constexpr int kWeightCopies = (kWeightChunks + kThreads - 1) / kThreads;
    static constexpr int kTokenChunks = Tile::kColumns / 8, kTokenStep = kThreads / kTokenChunks;
    static constexpr int kCopiesOfX = Tile::kTokens / kTokenStep;
    static_assert(kThreads % kTokenChunks == 0 && Tile::kTokens % kTokenStep == 0 && kTokenStep % 8 == 0,
                  "a thread's chunks of x have one column and one place in the swizzle");

    // This thread's chunks of the next stage to load.
    struct Copies {
        const uint8_t* weights;  // of the block
        uint32_t weights_offset[kWeightCopies];
        int weights_left;               // chunks of a row of panels from here to the end of k
        int rows_left;                  // rows of panels from the first to the end of n
        const uint16_t* x;              // of the first token; the next are kTokenStep rows on
        int tokens_left, columns_left;  // rows and columns of x from there to its end
        uint32_t place_of_x;            // in the stage
    };

    // A thread's i-th chunk of weights.
    static DS_FP6_DEVICE int weight_chunk(int i) { return i * kThreads + threadIdx.x; }

    DS_FP6_DEVICE Copies first_copies(const Piece& piece) const {
        Copies c;
        const int panel_k = piece.begin * Tile::kWarpsK, panel_n = piece.tile_n * kPanels;
        c.weights = p_.tiles + (static_cast<size_t>(panel_n) * p_.panels_k + panel_k) * Tiles<kBits>::kPanelBytes;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
            const uint32_t row = weight_chunk(i) / kRowChunks, in_row = weight_chunk(i) % kRowChunks;
            c.weights_offset[i] = row * p_.panels_k * Tiles<kBits>::kPanelBytes + in_row * 16;
        }
        c.weights_left = (p_.panels_k - panel_k) * kPanelChunks;
        c.rows_left = p_.panels_n - panel_n;
        const int token = threadIdx.x / kTokenChunks, chunk = threadIdx.x % kTokenChunks;
        const int row = piece.tile_m * Tile::kTokens + token, column = piece.begin * Tile::kColumns + chunk * 8;
        c.x = p_.x + static_cast<size_t>(row) * p_.k + column;
        c.tokens_left = p_.m - row, c.columns_left = p_.k - column;
        c.place_of_x = Shared::kWeightBytes + chunk / 8 * Shared::kPanelOfX + token * kSwizzleRow +
                       (chunk % 8 ^ token % 8) * 16;
        return c;
    }

    // NOTE: a chunk of which no byte is read may have any address.
    DS_FP6_DEVICE void load_stage(Copies& c, int stage) const {
        const uint32_t to = ptx::shared_address(shared_) + stage * Shared::kStageBytes;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
            const int row = weight_chunk(i) / kRowChunks, in_row = weight_chunk(i) % kRowChunks;
            if (row < kPanels)
                ptx::cp_async_16(to + weight_chunk(i) * 16, c.weights + c.weights_offset[i],
                                 row < c.rows_left && in_row < c.weights_left ? 16 : 0);
        }
        c.weights += Tile::kWarpsK * Tiles<kBits>::kPanelBytes;
        c.weights_left -= kRowChunks;
#pragma unroll
        for (int i = 0; i < kCopiesOfX; ++i)
            ptx::cp_async_16(to + c.place_of_x + i * kTokenStep * kSwizzleRow,
                             c.x + static_cast<size_t>(i * kTokenStep) * p_.k,
                             i * kTokenStep < c.tokens_left && c.columns_left > 0 ? 16 : 0);
        c.x += Tile::kColumns, c.columns_left -= Tile::kColumns;
    }

    // This warp's 32 channels x 64 columns of a stage times its tokens.
    DS_FP6_DEVICE void multiply_stage(const Piece& piece, int step, int stage, Sums& sums, Sums& group_sums) {
        const uint8_t* base = shared_ + stage * Shared::kStageBytes;
        uint32_t words[kWarpBlocks][kBits];
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
            const int row = warp_n_ * kWarpRows + i * kBlockRows;
            const int panel = row / kPanelRows * Tile::kWarpsK + warp_k_, block = row % kPanelRows / kBlockRows;
            load_words(base + panel * Tiles<kBits>::kPanelBytes + block * Tiles<kBits>::kBlockBytes, words[i]);
        }
        const int panel_of_x = (step * Tile::kWarpsK + warp_k_) * kPanelColumns;
        const uint32_t x = ptx::shared_address(base) + Shared::kWeightBytes + warp_k_ * Shared::kPanelOfX;
        multiply_k16<0>(piece, panel_of_x, words, x, sums, group_sums);
        multiply_k16<1>(piece, panel_of_x, words, x, sums, group_sums);
        multiply_k16<2>(piece, panel_of_x, words, x, sums, group_sums);
        multiply_k16<3>(piece, panel_of_x, words, x, sums, group_sums);
    }

    DS_FP6_DEVICE void load_words(const uint8_t* block, uint32_t (&words)[kBits]) const {
        using Layout = Tiles<kBits>;
#pragma unroll
        for (int i = 0; i < Layout::kVectors16; ++i) {
            const uint4 v = *reinterpret_cast<const uint4*>(block + i * kLanes * 16 + lane_ * 16);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
        if constexpr (Layout::kVector8) {
            const uint2 v = *reinterpret_cast<const uint2*>(block + Layout::kOffset8 + lane_ * 8);
            words[4 * Layout::kVectors16] = v.x, words[4 * Layout::kVectors16 + 1] = v.y;
        }
        if constexpr (Layout::kVector4)
            words[kBits - 1] = *reinterpret_cast<const uint32_t*>(block + Layout::kOffset4 + lane_ * 4);
    }

    template <int Step>
    DS_FP6_DEVICE void multiply_k16(const Piece& piece, int column, const uint32_t (&words)[kWarpBlocks][kBits],
                                    uint32_t x, Sums& sums, Sums& group_sums) {
        if constexpr (Grouped) {
            if (column + Step * 16 >= group_end_) {
                add_group(sums, group_sums);
                enter_group(piece, column + Step * 16);
            }
        }
        uint32_t a[kWarpBlocks][4];
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) Dequant<Fmt, T>::template fragment<Step>(words[i], a[i]);
        // An ldmatrix reads tokens 0 ... 7 and then 8 ... 15, of each k 0 ... 7 and then 8 ... 15.
        const int token = warp_m_ * Tile::kWarpTokens + lane_ / 16 * 8 + lane_ % 8, chunk = 2 * Step + lane_ / 8 % 2;
        const uint32_t from = x + token * kSwizzleRow + (chunk ^ lane_ % 8) * 16;
#pragma unroll
        for (int j = 0; j < Tile::kFragments; j += 2) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, from + j * 8 * kSwizzleRow);
#pragma unroll
            for (int i = 0; i < kWarpBlocks; ++i) {
                Sums& to = Grouped ? group_sums : sums;
                Traits<T>::mma(to[i][j], a[i], b[0], b[1]);
                Traits<T>::mma(to[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }

    // ---- scales of groups along K: sums += scale * group_sums where a group ends ----

    DS_FP6_DEVICE void enter_first_group(const Piece& piece, Sums& group_sums) {
#pragma unroll
        for (float& sum : reinterpret_cast<float(&)[Tile::kSums]>(group_sums)) sum = 0.0f;
        enter_group(piece, piece.begin * Tile::kColumns + warp_k_ * kPanelColumns);
    }

    // Reads the scales of the group that holds `column`; they are used when it ends.
    DS_FP6_DEVICE void enter_group(const Piece& piece, int column) {
        const int group = min(column / p_.group_size, p_.groups - 1);  // the padding of K is past the last one
        group_end_ = group + 1 == p_.groups ? 0x7FFFFFFF : (group + 1) * p_.group_size;
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = this->channel(piece, i, half);
                group_scale_[i][half] =
                    channel < p_.n ? __ldg(p_.scales + static_cast<size_t>(channel) * p_.groups + group) : 0.0f;
            }
    }

    DS_FP6_DEVICE void add_group(Sums& sums, Sums& group_sums) const {
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i)
#pragma unroll
            for (int j = 0; j < Tile::kFragments; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    sums[i][j][e] = fmaf(group_sums[i][j][e], group_scale_[i][e / 2], sums[i][j][e]);
                    group_sums[i][j][e] = 0.0f;
                }
    }

    // Row of y's transpose, in this thread's sums [block][fragment][2 * half + token].
    DS_FP6_DEVICE int channel(const Piece& piece, int block, int half) const {
        return piece.tile_n * kChannels + local_channel(block, half);
    }
    DS_FP6_DEVICE int local_channel(int block, int half) const {
        return warp_n_ * kWarpRows + block * kBlockRows + half * 8 + lane_ / 4;
    }

    // ---- adding up: warps along K through shared memory, pieces of a tile through the workspace ----

    DS_FP6_DEVICE void add_up_warps(Sums& sums) const {
        if constexpr (Tile::kWarpsK > 1) {
            float4* other = reinterpret_cast<float4*>(shared_) + threadIdx.x % Tile::kSumThreads;
            float4* own = reinterpret_cast<float4*>(sums);
            if (warp_k_ == 1) {
#pragma unroll
                for (int i = 0; i < Tile::kSums / 4; ++i) other[i * Tile::kSumThreads] = own[i];
            }
            __syncthreads();
            if (warp_k_ == 0) {
#pragma unroll
                for (int i = 0; i < Tile::kSums / 4; ++i) add(own[i], other[i * Tile::kSumThreads]);
            }
            static_assert(Tile::kWarpsK == 2, "two warps along K");
        }
    }

    static DS_FP6_DEVICE void add(float4& to, const float4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

    // Publishes this piece; the block that comes last gets the sum of all of them and returns true.
    DS_FP6_DEVICE bool last_to_arrive(int tile, const Piece& piece, Sums& sums) {
        const int first = block_of(tile * p_.steps), last = block_of(tile * p_.steps + p_.steps - 1);
        float4* own = reinterpret_cast<float4*>(sums);
        if (warp_k_ == 0) {
            float4* to = partial(blockIdx.x, piece.begin == 0);
#pragma unroll
            for (int i = 0; i < Tile::kSums / 4; ++i) __stcg(to + i * Tile::kSumThreads, own[i]);
            __threadfence();
        }
        __syncthreads();
        bool is_last = false;
        if (threadIdx.x == 0) {
            is_last = atomicAdd(p_.arrived + first, 1u) == static_cast<uint32_t>(last - first);
            if (is_last) p_.arrived[first] = 0;
            __threadfence();
        }
        if (!__syncthreads_or(is_last)) return false;
        if (warp_k_ == 0) {
#pragma unroll
            for (int i = 0; i < Tile::kSums / 4; ++i) own[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (int block = first; block <= last; ++block) {
                const float4* from = partial(block, block == first);
#pragma unroll
                for (int i = 0; i < Tile::kSums / 4; ++i) add(own[i], __ldcg(from + i * Tile::kSumThreads));
            }
        }
        return true;
    }

    // A block has at most two pieces of cut tiles: one that begins its tile, one that does not.
    DS_FP6_DEVICE float4* partial(int block, bool begins) const {
        return p_.partials + (static_cast<size_t>(block) * 2 + begins) * (Tile::kSums / 4) * Tile::kSumThreads +
               threadIdx.x % Tile::kSumThreads;
    }

    // ---- epilogue: scale, bias, one rounding, and y by way of shared memory for stores along n ----

    DS_FP6_DEVICE void store(const Piece& piece, const Sums& sums) {
        uint16_t* staged = reinterpret_cast<uint16_t*>(shared_);
        constexpr float unit = static_cast<float>(1u << Dequant<Fmt, T>::kScaleExponent);
        __syncthreads();  // the sums of other warps have been read
        if (warp_k_ == 0) {
#pragma unroll
            for (int i = 0; i < kWarpBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = this->channel(piece, i, half);
                    const float scale = Grouped || channel >= p_.n ? 1.0f : __ldg(p_.scales + channel);
                    const float bias = p_.bias == nullptr || channel >= p_.n ? 0.0f : bias_of(channel);
#pragma unroll
                    for (int j = 0; j < Tile::kFragments; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int token = warp_m_ * Tile::kWarpTokens + j * 8 + lane_ % 4 * 2 + e;
                            staged[token * Shared::kPitchOfY + local_channel(i, half)] =
                                Traits<T>::round(fmaf(sums[i][j][2 * half + e], unit * scale, bias));
                        }
                }
        }
        __syncthreads();
        constexpr int row_chunks = kChannels / 8;
        for (int chunk = threadIdx.x; chunk < Tile::kTokens * row_chunks; chunk += kThreads) {
            const int token = chunk / row_chunks, row = piece.tile_m * Tile::kTokens + token;
            const int channel = piece.tile_n * kChannels + chunk % row_chunks * 8;
            if (row >= p_.m || channel >= p_.n) continue;
            const uint16_t* from = staged + token * Shared::kPitchOfY + chunk % row_chunks * 8;
            uint16_t* to = p_.y + static_cast<size_t>(row) * p_.n + channel;
            if (p_.n % 8 == 0) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            } else {
                for (int i = 0; i < min(8, p_.n - channel); ++i) to[i] = from[i];
            }
        }
    }

    DS_FP6_DEVICE float bias_of(int channel) const {
        return p_.bias_is_fp32 ? __ldg(static_cast<const float*>(p_.bias) + channel)
                               : Traits<T>::widen(__ldg(static_cast<const uint16_t*>(p_.bias) + channel));
    }

    const Problem& p_;
    uint8_t* shared_;
    int lane_, warp_n_, warp_k_, warp_m_;
    int group_end_;                          // column at which the group under way ends
    float group_scale_[kWarpBlocks][2];
};

// Blocks that should fit an SM's registers: as many to hide latency with as compile without spilling.
template <int Bits, int Tokens, bool Grouped>
constexpr int resident() {
    return Grouped || Tokens > 32 ? 1 : Tokens > 16 || Bits > 6 ? 2 : 3;
}

template <class Fmt, class T, class Tile, bool Grouped>
__global__ void __launch_bounds__(kThreads, resident<Fmt::kBits, Tile::kTokens, Grouped>())
    linear_sm80_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(128) uint8_t shared[];
    Block<Fmt, T, Tile, Grouped>(p, shared).run();
}

}  // namespace sm80
}  // namespace cuda
}  // namespace ds_fp6
