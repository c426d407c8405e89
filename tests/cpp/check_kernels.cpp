// Runs the CUDA kernels on a CPU (emulated_gpu/gpu.h) and holds them to their definitions. Arguments: a part ("linear",
// "quantize") and a seed. Returns 1 and says where at the first mismatch.
#include <random>
#include <string>

#include "cuda/linear_sm80.cuh"
#include "cuda/quantize.cuh"
#include "cuda/relayout.cuh"

namespace ds_fp6 {
namespace cuda {
namespace sm80 {
alignas(128) uint8_t shared[256 * 1024];
}
}  // namespace cuda
}  // namespace ds_fp6

using namespace ds_fp6;
using namespace ds_fp6::cuda;

namespace {

std::mt19937 generator;
int random_int(int below) { return int(generator() % unsigned(below)); }
float random_normal() { return std::normal_distribution<float>()(generator); }
const float kNan = std::nanf("");

template <class Fmt>
float value(unsigned code) {
    constexpr int e = Fmt::kExponentBits, m = Fmt::kMantissaBits;
    const int exponent = code >> m & ((1 << e) - 1);
    const float fraction = float(code & ((1u << m) - 1)) / (1 << m);
    const float magnitude = exponent ? std::ldexp(1 + fraction, exponent - Fmt::kBias)
                                     : std::ldexp(fraction, Fmt::kMinExponent);
    return code >> (e + m) ? -magnitude : magnitude;
}

// Nearest code by search: ties away from zero, saturating, never -0.
template <class Fmt>
unsigned nearest(float t) {
    unsigned best = 0;
    double least = INFINITY;
    for (unsigned code = 0; code < Fmt::kCodes / 2u; ++code) {
        const double distance = std::fabs(std::min<double>(std::fabs(t), 1e300) - value<Fmt>(code));
        if (distance <= least) least = distance, best = code;
    }
    return best == 0 || !std::signbit(t) ? best : best | Fmt::kCodes / 2;
}

// Tiles for T of codes [n][k], by the layout's own coordinates.
template <class Fmt, class T>
std::vector<uint8_t> make_tiles(const std::vector<uint8_t>& codes, int n, int k) {
    const int panels_n = (n + 63) / 64, panels_k = (k + 63) / 64;
    std::vector<uint8_t> tiles(size_t(panels_n) * panels_k * Tiles<Fmt::kBits>::kPanelBytes);
    for (int strip = 0; strip < panels_n * 4; ++strip)
        for (int panel = 0; panel < panels_k; ++panel)
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t words[Fmt::kBits] = {};
                auto insert_pair = [&](auto index) {
                    constexpr int i = decltype(index)::value;
                    const int r = strip * 16 + pair_row(lane, i), c = panel * 64 + pair_column(lane, i);
                    const auto code = [&](int column) {
                        return r < n && column < k ? codes[size_t(r) * k + column] : 0u;
                    };
                    insert<Fmt, T, i>(place_code<Fmt, T>(code(c)) | place_code<Fmt, T>(code(c + 1)) << 16, words);
                };
                for_each_pair(insert_pair);
                uint8_t* block = tiles.data() + tiles::block_offset<Fmt::kBits>(strip, panel, panels_k);
                for (int i = 0; i < Fmt::kBits; ++i)
                    std::memcpy(block + Tiles<Fmt::kBits>::word_offset(lane, i), &words[i], 4);
            }
    return tiles;
}

template <class T>
uint16_t narrow(float v) { return sm80::Traits<T>::round(v); }
template <class T>
float wide(uint16_t v) { return sm80::Traits<T>::widen(v); }

template <class Fmt, class T, class Tile, bool Grouped>
void check_linear(int m, int n, int k, int group_size, int blocks, int bias_kind) {
    const int groups = Grouped ? (k + group_size - 1) / group_size : 1;
    std::vector<uint8_t> codes(size_t(n) * k);
    for (uint8_t& code : codes) code = uint8_t(random_int(Fmt::kCodes));
    std::vector<uint16_t> x(size_t(m) * k), y(size_t(m) * n + 8, narrow<T>(kNan)), bias16(n);
    std::vector<float> scales(size_t(n) * groups), bias32(n);
    for (uint16_t& v : x) v = narrow<T>(random_normal());
    for (float& v : scales) v = std::exp(random_normal()) / std::fabs(value<Fmt>(Fmt::kCodes / 2 - 1));
    for (int i = 0; i < n; ++i) bias32[i] = random_normal(), bias16[i] = narrow<T>(bias32[i]);
    const std::vector<uint8_t> tiles = make_tiles<Fmt, T>(codes, n, k);

    sm80::Problem p{};
    p.tiles = tiles.data(), p.x = x.data(), p.scales = scales.data(), p.y = y.data();
    p.bias = bias_kind == 0 ? nullptr : bias_kind == 1 ? (const void*)bias16.data() : bias32.data();
    p.bias_is_fp32 = bias_kind == 2;
    p.m = m, p.n = n, p.k = k;
    p.panels_n = (n + 63) / 64, p.panels_k = (k + 63) / 64;
    p.groups = groups, p.group_size = group_size;
    p.tiles_m = (m + Tile::kTokens - 1) / Tile::kTokens;
    p.steps = (p.panels_k + Tile::kWarpsK - 1) / Tile::kWarpsK;
    const int units = (p.panels_n + 1) / 2 * p.tiles_m * p.steps;
    blocks = std::min(blocks, units);
    p.range_least = units / blocks, p.range_more = units % blocks;
    std::vector<uint32_t> arrived(blocks);
    std::vector<float4> partials(size_t(blocks) * 2 * Tile::kPartialBytes / 16, float4{kNan, kNan, kNan, kNan});
    p.arrived = arrived.data(), p.partials = partials.data();

    emulated::shared_memory = sm80::shared;
    std::memset(sm80::shared, 0xFF, sizeof(sm80::shared));
    gridDim.x = blocks;
    std::vector<int> order(blocks);
    for (int i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (int block : order) {
        blockIdx.x = block;
        emulated::run_block(sm80::kThreads, [&] { sm80::linear_sm80_kernel<Fmt, T, Tile, Grouped>(p); });
    }
    for (int i = 0; i < blocks; ++i)
        if (arrived[i] != 0) std::printf("counter %d is left at %u\n", i, arrived[i]), std::exit(1);

    const double rounding = std::is_same<T, Half>::value ? std::ldexp(1, -11) : std::ldexp(1, -8);
    for (int row = 0; row < m; ++row)
        for (int channel = 0; channel < n; ++channel) {
            double want = bias_kind == 0 ? 0 : bias_kind == 1 ? wide<T>(bias16[channel]) : bias32[channel];
            double size = std::fabs(want);
            for (int i = 0; i < k; ++i) {
                const double scale = scales[size_t(channel) * groups + (Grouped ? i / group_size : 0)];
                const double term = wide<T>(x[size_t(row) * k + i]) * value<Fmt>(codes[size_t(channel) * k + i]) * scale;
                want += term, size += std::fabs(term);
            }
            const double got = wide<T>(y[size_t(row) * n + channel]);
            if (!(std::fabs(got - want) <= rounding * std::fabs(want) + 1e-6 * size + 6e-8)) {
                std::printf("e%dm%d %d tokens a tile, %d x %d x %d, groups of %d, %d blocks: y[%d, %d] is %g, not %g\n",
                            Fmt::kExponentBits, Fmt::kMantissaBits, Tile::kTokens, m, n, k, group_size, blocks, row,
                            channel, got, want);
                std::exit(1);
            }
        }
    for (int i = 0; i < 8; ++i)
        if (!std::isnan(wide<T>(y[size_t(m) * n + i]))) std::printf("wrote past y\n"), std::exit(1);
}

using Tile16 = sm80::Tile<16, 2, 4>;
using Tile32 = sm80::Tile<32, 2, 4>;
using Tile64 = sm80::Tile<64, 2, 3>;
using Tile128 = sm80::Tile<128, 1, 4>;

template <class Fmt>
void linear_in_both_types() {
    check_linear<Fmt, Half, Tile16, false>(1 + random_int(17), 1 + random_int(140), 8 * (1 + random_int(40)), 0, 3, 0);
    check_linear<Fmt, BFloat16, Tile16, false>(1 + random_int(17), 1 + random_int(140), 8 * (1 + random_int(40)), 0, 5, 1);
}

void linear() {
    using E3M2 = Format<3, 2>;
    linear_in_both_types<Format<1, 1>>(), linear_in_both_types<Format<2, 1>>(), linear_in_both_types<Format<2, 2>>();
    linear_in_both_types<E3M2>(), linear_in_both_types<Format<2, 3>>(), linear_in_both_types<Format<3, 3>>();
    linear_in_both_types<Format<4, 3>>(), linear_in_both_types<Format<5, 2>>();
    // Whole tiles, tiles cut in two, tiles cut in many; odd numbers of panels.
    for (const int blocks : {1, 2, 5, 9}) check_linear<E3M2, Half, Tile16, false>(5, 200, 64 * 9, 0, blocks, 2);
    check_linear<E3M2, Half, Tile32, false>(30, 130, 320, 0, 4, 1);
    check_linear<E3M2, BFloat16, Tile64, false>(70, 136, 200, 0, 3, 2);
    check_linear<E3M2, Half, Tile128, false>(131, 129, 136, 0, 3, 1);
    check_linear<E3M2, Half, Tile128, false>(128, 128, 640, 0, 1, 0);
    for (const int group : {16, 48, 64, 128, 208})
        check_linear<E3M2, Half, Tile16, true>(1 + random_int(20), 140, 8 * (60 + random_int(10)), group, 3, 0);
    check_linear<E3M2, BFloat16, Tile64, true>(66, 65, 264, 64, 3, 1);
}

// Codes of tiles for T, by the layout's own coordinates.
template <class Fmt, class T>
std::vector<uint8_t> read_tiles(const std::vector<uint8_t>& tiles, int n, int k) {
    const int panels_n = (n + 63) / 64, panels_k = (k + 63) / 64;
    std::vector<uint8_t> codes(size_t(panels_n) * 64 * panels_k * 64);
    for (int strip = 0; strip < panels_n * 4; ++strip)
        for (int panel = 0; panel < panels_k; ++panel)
            for (int lane = 0; lane < 32; ++lane) {
                const uint8_t* block = tiles.data() + tiles::block_offset<Fmt::kBits>(strip, panel, panels_k);
                uint32_t words[Fmt::kBits];
                for (int i = 0; i < Fmt::kBits; ++i)
                    std::memcpy(&words[i], block + Tiles<Fmt::kBits>::word_offset(lane, i), 4);
                auto read_pair = [&](auto index) {
                    constexpr int i = decltype(index)::value;
                    const uint32_t places = extract<Fmt, T, i>(words);
                    const size_t at = size_t(strip * 16 + pair_row(lane, i)) * panels_k * 64 + panel * 64 +
                                      pair_column(lane, i);
                    codes[at] = uint8_t(code_at<Fmt, T>(places)), codes[at + 1] = uint8_t(code_at<Fmt, T>(places >> 16));
                };
                for_each_pair(read_pair);
            }
    return codes;
}

template <class T>
constexpr Dtype kLayout = std::is_same<T, Half>::value ? Dtype::kFloat16 : Dtype::kBFloat16;

// The weights as fp32, with what they must become; then through quantize, dequantize, unpack and pack.
template <class Fmt, class T, Dtype D>
void check_layout(int n, int k, int row_stride, int group_size, const std::vector<float>& weights,
                    const std::vector<float>& given) {
    using Type = typename tiles::Element<D>::Type;
    const int groups = group_size ? (k + group_size - 1) / group_size : 1, size = groups == 1 ? k : group_size;
    const int panels_n = (n + 63) / 64, panels_k = (k + 63) / 64;
    std::vector<Type> w(size_t(n) * row_stride + 1, tiles::Element<D>::round(kNan));
    for (int r = 0; r < n; ++r)
        for (int c = 0; c < k; ++c) w[size_t(r) * row_stride + c] = tiles::Element<D>::round(weights[size_t(r) * k + c]);
    std::vector<uint8_t> packed(size_t(panels_n) * panels_k * Tiles<Fmt::kBits>::kPanelBytes, 0xFF);
    std::vector<float> scales(size_t(n) * groups, kNan);
    Refused refused{Refused::kNone, Refused::kNone};
    QuantizeProblem p{Fmt::kExponentBits, Fmt::kMantissaBits, w.data(), D, row_stride, n, k, groups, size,
                      given.empty() ? nullptr : given.data(), packed.data(), kLayout<T>, scales.data(), &refused};
    const auto run = [&](int grid_x, int grid_y, int threads, auto&& kernel) {
        for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) emulated::run_block(threads, kernel);
        blockIdx = Dim3{0, 0, 0};
    };
    run(panels_n * 4, 1, tiles::kQuantizeWarps * 32, [&] { tiles::quantize_kernel<Fmt, T, D>(p); });

    const auto fail = [&](const char* what, int r, int c, double got, double want) {
        std::printf("e%dm%d %d x %d, groups of %d: %s [%d, %d] is %.9g, not %.9g\n", Fmt::kExponentBits,
                    Fmt::kMantissaBits, n, k, group_size, what, r, c, got, want);
        std::exit(1);
    };
    const std::vector<uint8_t> codes = read_tiles<Fmt, T>(packed, n, k);
    const size_t pitch = size_t(panels_k) * 64;
    std::vector<float> expected(size_t(n) * k);
    for (int r = 0; r < panels_n * 64; ++r)
        for (int c = 0; c < panels_k * 64; ++c) {
            const unsigned got = codes[r * pitch + c];
            if (r >= n || c >= k) {
                if (got != 0) fail("padding", r, c, got, 0);
                continue;
            }
            const int group = c / size;
            float scale = 0;
            if (given.empty()) {
                for (int i = group * size; i < std::min(k, (group + 1) * size); ++i)
                    scale = std::max(scale, std::fabs(tiles::Element<D>::widen(w[size_t(r) * row_stride + i])));
                const float most = std::fabs(value<Fmt>(Fmt::kCodes / 2 - 1));
                scale = scale == 0 ? 1.0f : std::max(scale / most, 0x1p-126f);
            } else {
                scale = given[size_t(r) * groups + group];
            }
            if (scales[size_t(r) * groups + group] != scale)
                fail("the scale of", r, c, scales[size_t(r) * groups + group], scale);
            const unsigned want = nearest<Fmt>(tiles::Element<D>::widen(w[size_t(r) * row_stride + c]) / scale);
            if (got != want) fail("the code of", r, c, got, want);
            expected[size_t(r) * k + c] = value<Fmt>(got) * scale;
        }
    if (refused.weight != Refused::kNone || refused.scale != Refused::kNone) fail("refused", 0, 0, refused.weight, -1);

    std::vector<Type> dense(size_t(n) * k, tiles::Element<D>::round(kNan));
    const DequantizeProblem d{Fmt::kExponentBits, Fmt::kMantissaBits, packed.data(), kLayout<T>, scales.data(), n, k,
                              groups, size, dense.data(), D};
    const int grid_x = (panels_k + tiles::kBlockWarps - 1) / tiles::kBlockWarps, threads = tiles::kBlockWarps * 32;
    run(grid_x, panels_n * 4, threads, [&] { tiles::dequantize_kernel<Fmt, T, D>(d); });
    for (int r = 0; r < n; ++r)
        for (int c = 0; c < k; ++c) {
            const float got = tiles::Element<D>::widen(dense[size_t(r) * k + c]);
            const float want = tiles::Element<D>::widen(tiles::Element<D>::round(expected[size_t(r) * k + c]));
            if (std::memcmp(&got, &want, 4) != 0) fail("the dequantized", r, c, got, want);
        }

    const int row_bytes = (k * Fmt::kBits + 7) / 8;
    std::vector<uint8_t> rows(size_t(n) * row_bytes + 8, 0xEE), again(packed.size(), 0xFF);
    const RelayoutProblem to_rows{Fmt::kExponentBits, Fmt::kMantissaBits, packed.data(), rows.data(), kLayout<T>, n, k};
    run(grid_x, panels_n * 4, threads, [&] { tiles::unpack_kernel<Fmt, T>(to_rows); });
    for (int r = 0; r < n; ++r)
        for (int bit = 0; bit < row_bytes * 8; ++bit) {
            const int want = bit < k * Fmt::kBits ? codes[r * pitch + bit / Fmt::kBits] >> bit % Fmt::kBits & 1 : 0;
            if ((rows[size_t(r) * row_bytes + bit / 8] >> bit % 8 & 1) != want) fail("the row's bit", r, bit, !want, want);
        }
    for (int i = 0; i < 8; ++i)
        if (rows[size_t(n) * row_bytes + i] != 0xEE) fail("past the rows", n, i, rows[size_t(n) * row_bytes + i], 0xEE);
    const RelayoutProblem to_tiles{Fmt::kExponentBits, Fmt::kMantissaBits, rows.data(), again.data(), kLayout<T>, n, k};
    run(grid_x, panels_n * 4, threads, [&] { tiles::pack_kernel<Fmt, T>(to_tiles); });
    if (again != packed) fail("packed again", 0, 0, 0, 0);
}

// In both layouts.
template <class Fmt, Dtype D>
void check_quantize(int n, int k, int row_stride, int group_size, const std::vector<float>& weights,
                    const std::vector<float>& given) {
    check_layout<Fmt, Half, D>(n, k, row_stride, group_size, weights, given);
    check_layout<Fmt, BFloat16, D>(n, k, row_stride, group_size, weights, given);
}

std::vector<float> random_weights(int n, int k) {
    std::vector<float> weights(size_t(n) * k);
    for (int r = 0; r < n; ++r) {
        const float size = std::exp(2 * random_normal());
        for (int c = 0; c < k; ++c) weights[size_t(r) * k + c] = random_normal() * size;
    }
    return weights;
}

// All values and midpoints, and the numbers next to them, of a format, at a scale of 1.
template <class Fmt>
void check_every_midpoint() {
    std::vector<float> points = {1e30f, -3.4e38f, 1e-45f, -1e-45f, -0.0f};
    for (unsigned code = 0; code < unsigned(Fmt::kCodes); ++code) {
        points.push_back(value<Fmt>(code));
        if ((code + 1) % (Fmt::kCodes / 2) != 0) points.push_back((value<Fmt>(code) + value<Fmt>(code + 1)) / 2);
    }
    for (size_t i = 0, size = points.size(); i < size; ++i)
        for (const float towards : {-INFINITY, INFINITY}) points.push_back(std::nextafter(points[i], towards));
    points.erase(std::remove_if(points.begin(), points.end(), [](float v) { return !std::isfinite(v); }), points.end());
    const int k = int(points.size());
    check_quantize<Fmt, Dtype::kFloat32>(1, k, k, 0, points, {1.0f});   // divided as IEEE has it: 3.4e38 is among them
    for (float& point : points) point = std::fmin(std::fmax(point, -1e18f), 1e18f);
    check_quantize<Fmt, Dtype::kFloat32>(1, k, k, 0, points, {1.0f});   // divided fast
}

template <class Fmt>
void quantize_format() {
    check_every_midpoint<Fmt>();
    const int n = 1 + random_int(20), k = 1 + random_int(200);
    check_quantize<Fmt, Dtype::kFloat32>(n, k, k + random_int(3), random_int(70), random_weights(n, k), {});
}

template <int... E, int... M>
void quantize_formats(std::integer_sequence<int, E...>, std::integer_sequence<int, M...>) {
    (quantize_format<Format<E, M>>(), ...);
}

void check_division() {
    for (int i = 0; i < 3000000; ++i) {
        const float w = __uint_as_float(generator() & 0x807FFFFFu | uint32_t(127 - 30 + random_int(60)) << 23);
        const float scale = __uint_as_float(generator() & 0x007FFFFFu | uint32_t(127 - 30 + random_int(60)) << 23);
        const float got = tiles::divide_fast(w, scale, __frcp_rn(scale));
        if (got != w / scale) std::printf("%a / %a is %a, not %a\n", w, scale, got, w / scale), std::exit(1);
    }
}

void quantize_parts() {
    check_division();
    quantize_formats(
        std::integer_sequence<int, 1, 2, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5>{},
        std::integer_sequence<int, 1, 0, 2, 1, 0, 3, 2, 1, 0, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 6, 5, 4, 3, 2>{});
    using E3M2 = Format<3, 2>;
    for (const int group : {0, 7, 16, 64, 128, 600}) {
        const int n = 1 + random_int(70), k = 64 * (1 + random_int(12)) + random_int(3);
        check_quantize<E3M2, Dtype::kFloat16>(n, k, k, group, random_weights(n, k), {});
        check_quantize<E3M2, Dtype::kFloat32>(n, k, k + 1, group, random_weights(n, k), {});
    }
    check_quantize<Format<2, 3>, Dtype::kBFloat16>(20, 200, 201, 0, random_weights(20, 200), {});
    // The vector loop of a long row; rows of zeros and of extreme size, which are not divided fast.
    check_quantize<E3M2, Dtype::kFloat16>(3, 4100, 4104, 0, random_weights(3, 4100), {});
    check_quantize<E3M2, Dtype::kBFloat16>(3, 4100, 4104, 1000, random_weights(3, 4100), {});
    std::vector<float> extreme = random_weights(6, 70);
    for (int c = 0; c < 70; ++c) {
        extreme[c] = c ? -0.0f : 0.0f, extreme[70 + c] *= 1e-45f, extreme[140 + c] = extreme[140 + c] < 0 ? -3e38f : 3e38f;
        extreme[210 + c] *= 0x1p-126f, extreme[280 + c] *= 1e-40f;
    }
    check_quantize<E3M2, Dtype::kFloat32>(6, 70, 70, 0, extreme, {});
    check_quantize<E3M2, Dtype::kFloat32>(6, 70, 70, 16, extreme, {});
}

}  // namespace

int main(int, char** argv) {
    const std::string part = argv[1];
    generator.seed(std::stoul(argv[2]));
    if (part == "linear") linear();
    if (part == "quantize") quantize_parts();
    std::printf("%s\n", part.c_str());
}
