// Races tiles of linear_sm90 on problems of choice, without torch: each against fp64 first, then in turns, in CUDA graphs,
// weights rotated past the L2, with a rest as long as the work. For development: a new tile or kernel is compiled and
// judged in seconds.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc -Icsrc/cuda '-DTILES=RACE(Tile64) RACE(Tile64Cut)' \
//       -o race_tiles tests/cpp/race_tiles.cu
//   ./race_tiles qkv:64 gate_up:64:bf16 6144x4096:1
//
// A problem is a layer of LLaMA-2-70B or NxK (multiples of 64), the tokens, and the type of x, fp16 by default.
// -DFORMAT=2,2 takes another format.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "linear_sm90_launch.cuh"

#ifndef FORMAT
#define FORMAT 3, 2
#endif
#ifndef TILES
#define TILES RACE(Tile64)
#endif

using namespace ds_fp6;
using namespace ds_fp6::cuda;
using namespace ds_fp6::cuda::sm90;
using Fmt = Format<FORMAT>;

constexpr int kRounds = 15, kCheckedChannels = 61;
constexpr double kWorkMicroseconds = 2500;  // of a contender's turn, about
constexpr size_t kRotatedBytes = size_t(200) << 20;

static void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

template <class T>
T* allocate(size_t count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
    return static_cast<T*>(memory);
}

// SplitMix64's output function.
__device__ uint64_t random_bits(uint64_t i) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__global__ void fill_codes(uint64_t* words, size_t count, uint64_t seed) {
    const size_t first = blockIdx.x * size_t(blockDim.x) + threadIdx.x, step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = first; i < count; i += step) words[i] = random_bits(i + (seed << 40));
}

// Sums of four uniform values: close to normal, of variance 1.
template <class Element>
__global__ void fill_x(Element* x, size_t count) {
    const size_t first = blockIdx.x * size_t(blockDim.x) + threadIdx.x, step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = first; i < count; i += step) {
        const uint64_t bits = random_bits(i);
        float sum = 0;
        for (int j = 0; j < 4; ++j) sum += static_cast<float>(bits >> 16 * j & 0xFFFF) / 65536.f - 0.5f;
        x[i] = Element(1.732f * sum);
    }
}

// Of x, and what its weights are laid out for.
template <class Element>
using Operand = std::conditional_t<std::is_same_v<Element, __half>, Half, BFloat16>;

__device__ double widen(uint32_t bits, Half) { return __half2float(__ushort_as_half(bits)); }
__device__ double widen(uint32_t bits, BFloat16) { return __uint_as_float(bits << 16); }

// One channel of a lane's weights of a block, those of the row that it has twice, times x.
template <class Type, int... kPair>
__device__ double dot(const uint32_t (&words)[Fmt::kBits], int lane, int second_row, const double* x,
                      std::integer_sequence<int, kPair...>) {
    double sum = 0;
    const auto add = [&](int pair, uint32_t values) {
        if (pair % 2 != second_row) return;
        const int column = pair_column(lane, pair);
        sum += widen(values & 0xFFFF, Type()) * x[column] + widen(values >> 16, Type()) * x[column + 1];
    };
    (add(kPair, Dequant<Fmt, Type>::template pair<kPair>(words)), ...);
    return sum;
}

// expected[channel, token] in fp64; a block an element.
template <class Element>
__global__ void multiply(const uint8_t* tiles, const float* scales, const Element* x, int step, int k, double* expected) {
    const int n = blockIdx.x * step, m = blockIdx.y, k_blocks = k / 64, row = n % 16;
    double sum = 0;
    for (int b = threadIdx.x; b < k_blocks; b += blockDim.x) {
        double of_block[64];
        for (int i = 0; i < 64; ++i) of_block[i] = static_cast<double>(static_cast<float>(x[size_t(m) * k + b * 64 + i]));
        const uint8_t* block = tiles + (size_t(n / 64) * k_blocks + b) * Tiles<Fmt::kBits>::kPanelBytes +
                               n % 64 / 16 * Tiles<Fmt::kBits>::kBlockBytes;
        for (int lane = row % 8 * 4; lane < row % 8 * 4 + 4; ++lane) {
            uint32_t words[Fmt::kBits];
            for (int i = 0; i < Fmt::kBits; ++i) {
                words[i] = *reinterpret_cast<const uint32_t*>(block + Tiles<Fmt::kBits>::word_offset(lane, i));
            }
            sum += dot<Operand<Element>>(words, lane, row / 8, of_block, std::make_integer_sequence<int, kPairs>());
        }
    }
    __shared__ double sums[128];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < blockDim.x; ++i) sum += sums[i];
    expected[blockIdx.x * gridDim.y + m] = sum * (1 << Dequant<Fmt, Operand<Element>>::kScaleExponent) * scales[n];
}

struct Contender {
    std::string name;
    std::function<cudaError_t(LinearProblem)> launch;
    cudaGraphExec_t graph{};
    std::vector<float> microseconds{};
};

class Race {
public:
    explicit Race(const Device& device) : device_(device) {
        check(cudaStreamCreate(&stream_), "stream");
        check(cudaEventCreate(&begin_), "event"), check(cudaEventCreate(&end_), "event");
        workspace_ = allocate<uint8_t>(kWorkspaceBytes);
        check(cudaMemset(workspace_, 0, kWorkspaceFlagBytes), "flags");
        check(cudaMemset(workspace_ + kWorkspaceFlagBytes, kAbsentSum & 0xFF, kWorkspaceSumBytes), "sums");
    }

    template <class Element>
    void run(const std::string& name, int m, int n, int k) {
        const size_t bytes = size_t(n) * k * Fmt::kBits / 8;
        const int copies = static_cast<int>(kRotatedBytes / bytes) + 1;
        std::vector<uint8_t*> weights(copies);
        for (int i = 0; i < copies; ++i) {
            weights[i] = allocate<uint8_t>(bytes);
            fill_codes<<<1024, 256>>>(reinterpret_cast<uint64_t*>(weights[i]), bytes / 8, i + 1);
        }
        std::vector<float> host_scales(n);
        for (int i = 0; i < n; ++i) host_scales[i] = 1e-3f * (1 + i % 7);
        float* const scales = allocate<float>(n);
        check(cudaMemcpy(scales, host_scales.data(), n * sizeof(float), cudaMemcpyHostToDevice), "scales");
        Element *const x = allocate<Element>(size_t(m) * k), *const y = allocate<Element>(size_t(m) * n);
        fill_x<<<512, 256>>>(x, size_t(m) * k);
        LinearProblem p{};
        p.exponent_bits = Fmt::kExponentBits, p.mantissa_bits = Fmt::kMantissaBits;
        p.dtype = p.bias_dtype = std::is_same_v<Element, __half> ? Dtype::kFloat16 : Dtype::kBFloat16;
        p.x = x, p.x_stride = k, p.scales = scales, p.groups = 1, p.y = y, p.m = m, p.n = n, p.k = k;

        contenders_.clear();
#define RACE(tile) add<tile, Codes<Fmt, Operand<Element>>>(p, #tile);
        TILES
#undef RACE
        for (int i = 0; i < std::min(copies, 2); ++i) compare(p, weights[i], x);
        time(p, weights, bytes);
        for (Contender& c : contenders_) {
            std::sort(c.microseconds.begin(), c.microseconds.end());
            std::printf("%-12s M %4d  %-32s %8.2f us, least %8.2f\n", name.c_str(), m, c.name.c_str(),
                        c.microseconds[kRounds / 2], c.microseconds[0]);
            cudaGraphExecDestroy(c.graph);
        }
        std::fflush(stdout);
        for (uint8_t* memory : weights) cudaFree(memory);
        cudaFree(scales), cudaFree(x), cudaFree(y);
    }

private:
    // With its cut tiles and, where a round of them suffices, with whole ones.
    template <class T, class C>
    void add(const LinearProblem& p, const std::string& name) {
        const Tiling tiling = Tiling::of<T>(p, device_);
        const auto push = [&](Split split, const char* kind) {
            contenders_.push_back({name + kind, [=](const LinearProblem& q) {
                                       return launch_tile<T, C, false>(q, device_, workspace_, stream_, split);
                                   }});
        };
        push(tiling.cut(), "");
        if (!tiling.even() && tiling.tiles() <= tiling.most_workers) push(tiling.whole(), " whole");
    }

    template <class Element>
    void compare(LinearProblem p, const uint8_t* weights, const Element* x) {
        const int step = p.n / kCheckedChannels;
        double* const on_gpu = allocate<double>(kCheckedChannels * p.m);
        multiply<<<dim3(kCheckedChannels, p.m), 128>>>(weights, p.scales, x, step, p.k, on_gpu);
        std::vector<double> expected(kCheckedChannels * p.m);
        check(cudaMemcpy(expected.data(), on_gpu, expected.size() * sizeof(double), cudaMemcpyDeviceToHost), "fp64");
        cudaFree(on_gpu);
        double largest = 0;
        for (double e : expected) largest = std::max(largest, std::fabs(e));
        std::vector<Element> y(size_t(p.m) * p.n);
        const double rounding = std::is_same_v<Element, __half> ? 0x1p-10 : 0x1p-7;
        p.tiles = weights;
        for (Contender& c : contenders_) {
            check(cudaMemset(p.y, 0xFF, y.size() * 2), "poison");
            check(c.launch(p), c.name.c_str());
            check(cudaStreamSynchronize(stream_), c.name.c_str());
            check(cudaMemcpy(y.data(), p.y, y.size() * 2, cudaMemcpyDeviceToHost), "y");
            int wrong = 0;
            for (int m = 0; m < p.m; ++m) {
                for (int i = 0; i < kCheckedChannels; ++i) {
                    const double e = expected[i * p.m + m], got = static_cast<float>(y[size_t(m) * p.n + i * step]);
                    wrong += !(std::fabs(got - e) <= rounding * (std::fabs(e) + 0.01 * largest));  // NaN is wrong
                }
            }
            if (wrong) std::printf("WRONG: %d of %zu elements of %s\n", wrong, expected.size(), c.name.c_str());
        }
    }

    void time(LinearProblem p, const std::vector<uint8_t*>& weights, size_t bytes) {
        const int copies = static_cast<int>(weights.size());
        const int launches = std::max(1, static_cast<int>(kWorkMicroseconds / (bytes / 4e6)) / copies) * copies;
        for (Contender& c : contenders_) {
            cudaGraph_t graph;
            check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
            for (int i = 0; i < launches; ++i) p.tiles = weights[i % copies], check(c.launch(p), c.name.c_str());
            check(cudaStreamEndCapture(stream_, &graph), "capture");
            check(cudaGraphInstantiate(&c.graph, graph, 0), "graph");
            cudaGraphDestroy(graph);
            check(cudaGraphLaunch(c.graph, stream_), "graph");
            check(cudaStreamSynchronize(stream_), "graph");
        }
        for (int round = 0; round < kRounds; ++round) {
            for (Contender& c : contenders_) {
                check(cudaEventRecord(begin_, stream_), "event");
                check(cudaGraphLaunch(c.graph, stream_), "graph");
                check(cudaEventRecord(end_, stream_), "event");
                check(cudaStreamSynchronize(stream_), "graph");
                float milliseconds = 0;
                check(cudaEventElapsedTime(&milliseconds, begin_, end_), "event");
                c.microseconds.push_back(milliseconds * 1e3f / launches);
                usleep(static_cast<useconds_t>(milliseconds * 1e3f));
            }
        }
    }

    Device device_;
    cudaStream_t stream_{};
    cudaEvent_t begin_{}, end_{};
    uint8_t* workspace_ = nullptr;
    std::vector<Contender> contenders_;
};

int main(int count, char** arguments) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "device");
    Race race({0, properties.major, properties.minor, properties.multiProcessorCount,
               static_cast<int>(properties.sharedMemPerBlockOptin), 37e9 * properties.multiProcessorCount});
    for (int i = 1; i < count; ++i) {
        char layer[32] = "", dtype[8] = "fp16";
        int m = 0, n = 0, k = 0;
        const int read = std::sscanf(arguments[i], "%31[^:]:%d:%7s", layer, &m, dtype);
        const std::string name = layer;
        if (name == "qkv") n = 10240, k = 8192;
        else if (name == "o") n = 8192, k = 8192;
        else if (name == "gate_up") n = 57344, k = 8192;
        else if (name == "down") n = 8192, k = 28672;
        else std::sscanf(layer, "%dx%d", &n, &k);
        if (read < 2 || m < 1 || n < 64 || k < 64 || n % 64 != 0 || k % 64 != 0) {
            std::printf("a problem is a layer or NxK in multiples of 64, and tokens: %s\n", arguments[i]);
            return 1;
        }
        if (std::string(dtype) == "bf16") race.run<__nv_bfloat16>(name, m, n, k);
        else race.run<__half>(name, m, n, k);
    }
}
