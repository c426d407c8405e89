// Compares linear_sm90, launcher and kernels, with a product in double precision: random codes, activations, scales, bias.
// Activations in bf16 have rows of very different magnitudes, and gaps between the rows; their GPU's memory is slow.
// Each problem with an even n runs once more with a gate, which must make of y what double precision makes of the same y.
//
// Arguments, any number of times: m n k group_size bias(0, 1: of x's type, 2: fp32) sms tile(0: the heuristics' choice,
// else the n-th of kTiles).
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <iterator>

#include "emulator.h"

#define threadIdx (EmulatedThread{})
#define blockIdx (EmulatedBlock{})
struct EmulatedThread {
    int x = emulator::current->index;
};
struct EmulatedBlock {
    int x = emulator::current->block->index;
};
#define __grid_constant__
#define __launch_bounds__(...)

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= emulator::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

#include "linear_sm90_launch.cuh"

using namespace ds_fp6;
using namespace ds_fp6::cuda;

#ifndef EMULATED_FORMAT
#define EMULATED_FORMAT Format<3, 2>
#define EMULATED_ELEMENT __half
#endif

static CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* memory, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    sm90::EmulatedMap emulated{static_cast<const uint8_t*>(memory), type == CU_TENSOR_MAP_DATA_TYPE_UINT64 ? 8 : 2,
                               {1, 1, 1}, {0, 0}, {1, 1, 1}};
    for (cuuint32_t i = 0; i < rank; ++i) {
        emulated.sizes[i] = int64_t(sizes[i]), emulated.box[i] = int(box[i]);
        if (box[i] > 256 || box[i] == 0) return CUDA_ERROR_INVALID_VALUE;
        if (i > 0) emulated.strides[i - 1] = int64_t(strides[i - 1]);
        if (i > 0 && strides[i - 1] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    }
    static_assert(sizeof(emulated) <= sizeof(CUtensorMap), "fits");
    std::memcpy(map, &emulated, sizeof(emulated));
    return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
    *function = reinterpret_cast<void*>(&encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

extern "C" cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    int cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
    }
    using Kernel = void (*)(const CUtensorMap, const sm90::Problem, const CUtensorMap);
    const auto kernel = reinterpret_cast<Kernel>(const_cast<void*>(function));
    const auto& x_map = *static_cast<const CUtensorMap*>(arguments[0]);
    const auto& problem = *static_cast<const sm90::Problem*>(arguments[1]);
    const auto& weights_map = *static_cast<const CUtensorMap*>(arguments[2]);
    emulator::kernel_body = [=] { kernel(x_map, problem, weights_map); };
    return emulator::launch(config->gridDim.x, config->blockDim.x, cluster) ? cudaSuccess : cudaErrorLaunchTimeout;
}

using Fmt = EMULATED_FORMAT;
using Element = EMULATED_ELEMENT;
constexpr bool kHalf = std::is_same_v<Element, __half>;
using Operand = std::conditional_t<kHalf, Half, BFloat16>;

static double value_of_code(int code) {
    const int mantissa = code & ((1 << Fmt::kMantissaBits) - 1);
    const int exponent = code >> Fmt::kMantissaBits & ((1 << Fmt::kExponentBits) - 1);
    const double fraction = std::ldexp(mantissa, -Fmt::kMantissaBits);
    const double magnitude =
        exponent == 0 ? std::ldexp(fraction, 1 - Fmt::kBias) : std::ldexp(1 + fraction, exponent - Fmt::kBias);
    return code >> (Fmt::kBits - 1) ? -magnitude : magnitude;
}

// Puts a code where the kernel looks for it, bit by bit along the format's map.
static void put(std::vector<uint8_t>& tiles, int k_blocks, int n, int k, int code) {
    constexpr BitMap map = BitMapOf<Fmt, Operand>::kMap;
    const int row = n % 16, column = k % 64;
    const int lane = row % 8 * 4 + column % 8 / 2, pair = column / 16 * 4 + column % 16 / 8 * 2 + row / 8;
    uint32_t bits = static_cast<uint32_t>(code & (Fmt::kCodes / 2 - 1)) << BitMapOf<Fmt, Operand>::kShift;
    if (code >> (Fmt::kBits - 1)) bits |= 0x8000u;
    if (column % 2 != 0) bits <<= 16;
    uint8_t* block = tiles.data() + (size_t(n / 64) * k_blocks + k / 64) * Tiles<Fmt::kBits>::kPanelBytes +
                     n % 64 / 16 * Tiles<Fmt::kBits>::kBlockBytes;
    for (int i = 0; i < map.pair[pair].count; ++i) {
        const Term& term = map.pair[pair].term[i];
        for (int bit = 0; bit < 32; ++bit) {
            if (!(term.mask >> bit & bits >> bit & 1)) continue;
            int source = term.source, at = (bit + 32 - term.rotate) % 32;
            if (source >= Fmt::kBits) {
                const Terms& spare = map.virtual_word[source - Fmt::kBits];
                int j = 0;
                while (!(spare.term[j].mask >> at & 1)) ++j;
                source = spare.term[j].source;
                at = (at + 32 - spare.term[j].rotate) % 32;
            }
            block[Tiles<Fmt::kBits>::word_offset(lane, source) + at / 8] |= uint8_t(1u << at % 8);
        }
    }
}

constexpr float kPoison = -12345.f;

template <class T>
constexpr auto kLaunch = &sm90::launch_tile<T, sm90::Codes<Fmt, Operand>, false>;

// Tiles that the heuristics take for weights too many to emulate.
constexpr decltype(kLaunch<sm90::Tile64>) kTiles[] = {
    kLaunch<sm90::Tile32Wide>,     kLaunch<sm90::Tile64>,         kLaunch<sm90::Tile8Wide>,
    kLaunch<sm90::Tile16Wide>,     kLaunch<sm90::Tile32>,         kLaunch<sm90::Tile32Cut>,
    kLaunch<sm90::Tile64WideCut>,  kLaunch<sm90::Tile128>,        kLaunch<sm90::Tile128Narrow>,
    kLaunch<sm90::Tile128Cut>,     kLaunch<sm90::Tile48>,         kLaunch<sm90::Tile48Cut>,
    kLaunch<sm90::Tile96>,         kLaunch<sm90::Tile96Narrow>,   kLaunch<sm90::Tile96Cut>,
    kLaunch<sm90::Tile64Cut>,      kLaunch<sm90::Tile16Cut>,      kLaunch<sm90::Tile32CutLong>,
};

// What x's row i is scaled with.
static float magnitude_of_row(int i) {
    constexpr float kMagnitudes[] = {1.f, 0x1p100f, 0x1p-100f, 0.f, 0x1p-128f, 1e-3f};
    return kHalf ? 1.f : kMagnitudes[i % 6];
}

static double activated(Gate gate, double x) {
    if (gate == Gate::kReglu) return x > 0 ? x : 0;
    if (gate == Gate::kSiglu) return x / (1 + std::exp(-x));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static bool check(int m, int n, int k, int group_size, int bias, int sms, int tile) {
    std::mt19937 random{static_cast<uint32_t>(m * 31 + n * 7 + k)};
    std::normal_distribution<float> normal;
    const int k_blocks = (k + 63) / 64, groups = group_size ? (k + group_size - 1) / group_size : 1;
    std::vector<uint8_t> tiles(size_t((n + 63) / 64) * k_blocks * Tiles<Fmt::kBits>::kPanelBytes + 16);
    std::vector<double> w(size_t(n) * k);
    const int stride = kHalf ? k : k + 8;
    std::vector<Element> x(size_t(m) * stride), bias16(n), y(size_t(m + 1) * n + 8, Element(kPoison));
    std::vector<float> scales(size_t(n) * groups), bias32(n);
    for (auto& s : scales) s = 0.5f + (random() % 1024) / 1024.f;
    for (int i = 0; i < n; ++i) bias16[i] = Element(normal(random)), bias32[i] = normal(random);
    for (auto& v : x) v = Element(NAN);
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < k; ++j) x[size_t(i) * stride + j] = Element(normal(random) * magnitude_of_row(i));
        if (!kHalf && i % 6 == 5) x[size_t(i) * stride + random() % k] = Element(1e4f);
        for (int j = k / 2; !kHalf && i % 6 == 0 && j < k; ++j) {  // larger than what comes before
            x[size_t(i) * stride + j] = Element(static_cast<float>(x[size_t(i) * stride + j]) * 1e3f);
        }
    }
    const int spoiled = m > 2 ? 1 : m;  // this token is to be NaN, all others not
    if (spoiled < m) x[size_t(spoiled) * stride + random() % k] = Element(NAN);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < k; ++j) {
            const int code = random() % Fmt::kCodes;
            put(tiles, k_blocks, i, j, code);
            w[size_t(i) * k + j] = value_of_code(code) * scales[size_t(i) * groups + (group_size ? j / group_size : 0)];
        }
    }
    std::vector<uint8_t> workspace(kWorkspaceFlagBytes + kWorkspaceSumBytes, 0xFF);
    LinearProblem p{};
    p.exponent_bits = Fmt::kExponentBits, p.mantissa_bits = Fmt::kMantissaBits;
    p.dtype = kHalf ? Dtype::kFloat16 : Dtype::kBFloat16;
    p.x = x.data(), p.x_stride = stride, p.tiles = tiles.data(), p.scales = scales.data(), p.groups = groups;
    p.group_size = groups > 1 ? group_size : 0;
    p.bias = bias == 0 ? nullptr : bias == 1 ? static_cast<const void*>(bias16.data()) : bias32.data();
    p.bias_dtype = bias == 2 ? Dtype::kFloat32 : p.dtype;
    p.y = y.data(), p.m = m, p.n = n, p.k = k;
    const Device device{0, 9, 0, sms, emulator::kSharedBytes, (kHalf ? 37e9 : 25e9) * sms};
    std::vector<double> expected(size_t(m) * n), magnitude(size_t(m) * n);
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            double sum = 0, magnitudes = 0;
            for (int c = 0; c < k; ++c) {
                const double term = w[size_t(j) * k + c] * static_cast<float>(x[size_t(i) * stride + c]);
                sum += term, magnitudes += std::fabs(term);
            }
            if (bias) sum += bias == 1 ? static_cast<float>(bias16[j]) : bias32[j];
            expected[size_t(i) * n + j] = sum, magnitude[size_t(i) * n + j] = magnitudes;
        }
    }
    // Of rounding y; and in bf16 of sums below fp32's normal numbers, times weights' 2^20 and a scale.
    const double step = kHalf ? 0x1p-11 : 0x1p-8, below_normal = kHalf ? 0 : k * 0x1p-129 * 1.5;
    const double smallest = (kHalf ? 0x1p-24 : 0x1p-133) + below_normal;
    const auto launch = [&] {
        return tile == 0 ? sm90::launch<Fmt, Operand>(p, device, workspace.data(), nullptr)
                         : kTiles[tile - 1](p, device, workspace.data(), nullptr, sm90::Split{});
    };
    for (int turn = 0; turn < 2; ++turn) {  // the second launch finds the sums that the first one left: none
        std::fill(y.begin(), y.end(), Element(kPoison));
        const cudaError_t status = launch();
        if (status != cudaSuccess) {
            std::printf("m %d n %d k %d group %d: %s\n", m, n, k, group_size,
                        status == cudaErrorLaunchTimeout ? "deadlock" : "launch failed");
            return false;
        }
        for (size_t i = 0; i < y.size(); ++i) {
            const double got = static_cast<float>(y[i]);
            const bool right = i / n == size_t(spoiled) && i < expected.size()
                                   ? std::isnan(got)
                               : i < expected.size()
                                   ? std::fabs(got - expected[i]) <= std::fabs(expected[i]) * step * 1.01 + magnitude[i] * 0x1p-20 + smallest
                                   : got == static_cast<float>(Element(kPoison));
            if (right) continue;
            std::printf("m %d n %d k %d group %d bias %d sms %d tile %d launch %d: y[%zu] = %g, expected %g\n", m, n, k, group_size,
                        bias, sms, tile, turn, i, got, i < expected.size() ? expected[i] : kPoison);
            return false;
        }
    }
    if (n % 2 != 0) return true;
    constexpr Gate kGates[] = {Gate::kGeglu, Gate::kReglu, Gate::kSiglu};
    std::vector<Element> out(size_t(m + 1) * n / 2 + 8, Element(kPoison));
    p.gate = kGates[m % 3], p.y = out.data();
    if (launch() != cudaSuccess) return false;
    for (size_t i = 0; i < out.size(); ++i) {
        const double got = static_cast<float>(out[i]);
        double gate = kPoison, wanted = kPoison, largest = 0;
        if (i < expected.size() / 2) {
            gate = static_cast<float>(y[2 * i]);
            const double up = static_cast<float>(y[2 * i + 1]);
            wanted = i / (n / 2) == size_t(spoiled) ? NAN : activated(p.gate, gate) * up;
            largest = std::fabs(gate * up);  // 1 + tanh cancels where the gate is negative
        }
        const bool overflows = std::fabs(wanted) > (kHalf ? 65504. : 3.38e38) || std::isnan(wanted);
        if (overflows || std::fabs(got - wanted) <= std::fabs(wanted) * step * 1.01 + largest * 0x1p-20 + smallest) continue;
        std::printf("m %d n %d k %d gate %d: y[%zu] = %g, expected %g of the gate %g\n", m, n, k, int(p.gate), i, got, wanted,
                    gate);
        return false;
    }
    return true;
}

int main(int count, char** arguments) {
    bool right = true;
    for (int i = 1; i + 6 < count; i += 7) {
        int v[7];
        for (int j = 0; j < 7; ++j) v[j] = std::atoi(arguments[i + j]);
        right = check(v[0], v[1], v[2], v[3], v[4], v[5], v[6]) && right;
    }
    std::printf(right ? "right\n" : "wrong\n");
    return right ? 0 : 1;
}
