// From fp32 sums in registers to y: sums of consumers that split K, partial sums of other blocks, scale, bias, store.
#pragma once

#include "linear_sm90_consumer.cuh"

namespace ds_fp6::cuda::sm90 {

__device__ inline uint32_t pack_pair(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T, class C>
class Epilogue {
public:
    static constexpr int kBits = C::kBits;
    using Element = typename C::Element;
    using Layout = SharedLayout<T, kBits>;
    using Sums = float[T::kOwnPanels][T::kAccumulators];

    __device__ Epilogue(const Problem& p, const Ring<T, kBits>& ring, uint8_t* shared, int worker, int warpgroup,
                        int thread)
        : p_(p), ring_(ring), worker_(worker), thread_(thread) {
        group_ = warpgroup / T::kSplit;
        turn_ = warpgroup % T::kSplit;
        staging_ = ring.base + Layout::kStagings + group_ * Layout::kStaging;
        exchange_ = reinterpret_cast<float*>(shared + Layout::kExchange);
    }

    // Scale and bias of the two channels of each panel that a thread holds sums of.
    struct Terms {
        float scale[T::kOwnPanels][2], bias[T::kOwnPanels][2];
    };

    // Ahead of the multiplication, so that it hides the loads.
    __device__ Terms load_terms(const Piece& piece) const {
        Terms terms{};
        if (piece.begin != 0) return terms;
        const int first = first_channel(block_origin(p_, ring_, piece.tile)) + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2 * T::kOwnPanels; ++i) {
            const int n = first + i / 2 * 64 + i % 2 * 8;
            if (n >= p_.n) continue;
            terms.scale[i / 2][i % 2] = p_.scale[n] * C::kValue;
            if (p_.bias) terms.bias[i / 2][i % 2] = to_float(static_cast<const Element*>(p_.bias)[n]);
        }
        return terms;
    }

    // All consumers; leaves the whole sum with the first one of each group and returns whether this is it.
    __device__ bool add_up_split(Sums& sums) const {
        if constexpr (T::kSplit == 1) return true;
        constexpr int kAll = T::kConsumers * 128, kPerConsumer = T::kOwnPanels * T::kAccumulators * 128;
        float* own = exchange_ + (group_ * (T::kSplit - 1) + max(turn_ - 1, 0)) * kPerConsumer + thread_;
        named_sync(kSplitBarrier, kAll);
        if (turn_ != 0) visit(sums, [&](float& sum, int i) { own[i * 128] = sum; });
        named_sync(kSplitBarrier, kAll);
        if (turn_ != 0) return false;
        for (int other = 0; other < T::kSplit - 1; ++other) {
            visit(sums, [&](float& sum, int i) { sum += own[other * kPerConsumer + i * 128]; });
        }
        return true;
    }

    // All consumers of a cluster that cuts its tile along K; leaves the whole sums of own_token with each block.
    __device__ void add_up_cluster(Sums& sums) const {
        if constexpr (T::kClusterK > 1) {
            const uint32_t offset = (group_ * T::kOwnPanels * T::kAccumulators / 4 * 128 + thread_) * 16;
            named_sync(kSplitBarrier, T::kConsumers * 128);  // the ring is free
            visit4(sums, [&](float4 sum, int i) {
                if (!own_token(i % (T::kAccumulators / 4) * 8)) store_shared_16(ring_.base + offset + i * 2048, sum);
                return sum;
            });
            cluster_sync_memory();
            for (int other = 1; other < T::kClusterK; ++other) {
                const int k = (ring_.rank_k() + other) % T::kClusterK;
                const uint32_t source = map_to_rank(ring_.base, ring_.rank_in_part(k)) + offset;
                visit4(sums, [&](float4 sum, int i) {
                    if (!own_token(i % (T::kAccumulators / 4) * 8)) return sum;
                    const float4 more = load_cluster_16(source + i * 2048);
                    return make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
                });
            }
        }
    }

    // For a piece whose tile an earlier worker owns.
    __device__ void publish(Sums& sums) const {
        float4* target = partial(worker_);
        visit4(sums, [&](float4 sum, int i) {
            __stcg(&target[i * 128], sum);
            return sum;
        });
        sync();
        if (thread_ == 0) store_release(published(worker_), 1);
    }

    // For a piece that has the first step of its tile but not the last: adds the later pieces, in the order of K.
    __device__ void collect(Sums& sums, const Piece& piece) const {
        const Schedule& s = p_.schedule;
        int other = worker_;
        for (int done = piece.end; done < s.steps;) {
            ++other;
            done += s.range_begin(other + 1) - s.range_begin(other);
            if (thread_ == 0) {
                while (load_acquire(published(other)) == 0) {
                }
            }
            sync();
            const float4* source = partial(other);
            visit4(sums, [&](float4 sum, int i) {
                const float4 more = __ldcg(&source[i * 128]);
                return make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
            });
            if (thread_ == 0) *published(other) = 0;  // for the next launch
        }
    }

    // y = sums * scale (+ bias), rounded once.
    __device__ void store(Sums& sums, int tile, const Terms& terms) const {
        const BlockOrigin origin = block_origin(p_, ring_, tile);
#pragma unroll
        for (int panel = 0; panel < T::kOwnPanels; ++panel) {
            store_panel(sums[panel], terms.scale[panel], terms.bias[panel], first_channel(origin) + panel * 64,
                        origin.token);
        }
    }

private:
    static constexpr int kSplitBarrier = 1, kFirstGroupBarrier = 2;

    template <class Visitor>
    __device__ static void visit(Sums& sums, Visitor visitor) {
#pragma unroll
        for (int panel = 0; panel < T::kOwnPanels; ++panel) {
#pragma unroll
            for (int i = 0; i < T::kAccumulators; ++i) visitor(sums[panel][i], panel * T::kAccumulators + i);
        }
    }

    template <class Visitor>
    __device__ static void visit4(Sums& sums, Visitor visitor) {
#pragma unroll
        for (int panel = 0; panel < T::kOwnPanels; ++panel) {
#pragma unroll
            for (int i = 0; i < T::kAccumulators; i += 4) {
                float* s = &sums[panel][i];
                const float4 v = visitor(make_float4(s[0], s[1], s[2], s[3]), (panel * T::kAccumulators + i) / 4);
                s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
            }
        }
    }

    __device__ int first_channel(BlockOrigin origin) const { return (origin.panel + group_ * T::kOwnPanels) * 64; }

    // Whether this block stores a token of the tile: a cluster that cuts K shares the tokens out, 16 at a time.
    __device__ bool own_token(int token) const {
        if constexpr (T::kClusterK == 1) return true;
        constexpr int kShares = (T::kTokens + 15) / 16;
        const int share = token / 16, k = ring_.rank_k();
        return kShares * k / T::kClusterK <= share && share < kShares * (k + 1) / T::kClusterK;
    }

    __device__ int consumer_of(int worker) const {
        return (worker * T::kCluster + static_cast<int>(ring_.rank)) * T::kGroups + group_;
    }
    __device__ float4* partial(int worker) const {
        return reinterpret_cast<float4*>(p_.partial) +
               static_cast<int64_t>(consumer_of(worker)) * (T::kOwnPanels * T::kAccumulators / 4 * 128) + thread_;
    }
    __device__ uint32_t* published(int worker) const { return p_.published + consumer_of(worker); }

    __device__ void sync() const { named_sync(kFirstGroupBarrier + group_, 128); }

    // 64 channels from `channel`, kTokens tokens from `token`: transposed through shared memory, 64 tokens at a time,
    // 128 bytes a token whose 16-byte chunks are swizzled by the token.
    __device__ void store_panel(const float (&sums)[T::kAccumulators], const float (&scale)[2], const float (&bias)[2],
                                int channel, int token) const {
        const int warp = thread_ / 32, lane = thread_ % 32;
#pragma unroll
        for (int first = 0; first < T::kTokens; first += Layout::kStagedTokens) {
            sync();
#pragma unroll
            for (int t = 0; t < Layout::kStagedTokens; t += 16) {
                if (!own_token(first + t)) continue;
                uint32_t q[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int h = i % 2, at = 4 * ((first + t) / 8 + i / 2) + 2 * h;
                    if (t + 8 * (i / 2) >= Layout::kStagedTokens) continue;
                    q[i] = pack_pair(sums[at] * scale[h] + bias[h], sums[at + 1] * scale[h] + bias[h], Element());
                }
                const int row = t + lane % 8 + lane / 16 * 8, chunk = 2 * warp + lane / 8 % 2;
                const uint32_t address = staging_ + row * 128 + ((chunk ^ (row % 8)) * 16);
                if constexpr (Layout::kStagedTokens >= 16) {
                    store_matrix_transposed_4(address, q[0], q[1], q[2], q[3]);
                } else {
                    store_matrix_transposed_2(staging_ + lane % 8 * 128 + ((chunk ^ (lane % 8)) * 16), q[0], q[1]);
                }
            }
            sync();
            copy_staged(channel, token, first);
        }
    }

    // Tokens first ... first + kStagedTokens - 1 of the tile.
    __device__ void copy_staged(int channel, int token, int first) const {
        const int chunk = thread_ % 8, n = channel + 8 * chunk;
        Element* y = static_cast<Element*>(p_.y);
#pragma unroll
        for (int row = 0; row < Layout::kStagedTokens; row += 16) {
            const int inside = row + thread_ / 8, m = token + first + inside;
            if (inside >= Layout::kStagedTokens || !own_token(first + row) || m >= p_.m || n >= p_.n) continue;
            const uint4 v = load_shared_16(staging_ + inside * 128 + ((chunk ^ (inside % 8)) * 16));
            Element* target = y + static_cast<int64_t>(m) * p_.n + n;
            if (p_.n % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = v;
            } else {
                const Element* values = reinterpret_cast<const Element*>(&v);
                for (int i = 0; i < 8 && n + i < p_.n; ++i) target[i] = values[i];
            }
        }
    }

    const Problem& p_;
    const Ring<T, kBits>& ring_;
    int worker_, group_, turn_, thread_;
    uint32_t staging_;
    float* exchange_;
};

}  // namespace ds_fp6::cuda::sm90
