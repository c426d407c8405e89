// Kernels for any CPU: four lanes of the compiler's own vectors, codes expanded by table look-up.
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "target.h"

#include "element.h"
#include "quantize_rows.h"
#include "linear_dot.h"
#include "linear_panel.h"
#include "kernel_set.h"

namespace ds_fp6 {
namespace cpu {
namespace {

struct GenericFp32 {
    typedef float Sum __attribute__((vector_size(16)));
    using Weights = Sum;
    using Native = PlainNative;
    static constexpr int kLanes = 4, kVectors = 2, kChunk = 8, kUnitCodes = 1;
    static constexpr int kTileVectors = 2, kRegisterRows = 4, kPanel = kTileVectors * kLanes;

    struct Expander {
        float table[256];
        int bits;

        explicit Expander(const FormatSpec& format) : bits(format.bits()) { format.values(table); }
        float scale() const { return 1.0f; }

        int64_t window(int64_t left) const { return left; }
        void expand(const uint8_t* codes, int64_t left, Weights out[kVectors]) const {
                uint64_t run = 0;
            for (int b = 0; b < bits && b < left; ++b) run |= uint64_t(codes[b]) << (8 * b);
            float values[kChunk];
            for (int i = 0; i < kChunk; ++i) values[i] = table[(run >> (i * bits)) & 0xff];
            for (int j = 0; j < kVectors; ++j) out[j] = load_sum(values + j * kLanes);
        }
    };

    static constexpr int dot_rows(int) { return 2; }
    static Sum zero() { return Sum{}; }
    static Sum load_sum(const float* from) {
        Sum sum;
        __builtin_memcpy(&sum, from, sizeof(sum));
        return sum;
    }
    static void store_sum(float* to, Sum sum) { __builtin_memcpy(to, &sum, sizeof(sum)); }
    static Weights load_tile(const uint32_t* tile) { return load_sum(reinterpret_cast<const float*>(tile)); }
    static Weights broadcast(const uint32_t* x) {
        const float value = bits_to_float(*x);
        return Weights{value, value, value, value};
    }
    static Sum multiply_add(Sum sum, Weights weights, Weights x) { return sum + weights * x; }
    static Sum multiply_add(Sum sum, Weights weights, const uint32_t* x) { return sum + weights * load_tile(x); }
    static Sum scaled_add(Sum sum, Sum addend, Sum scale) { return sum + addend * scale; }
    static Sum scaled_add(Sum sum, Sum addend, float scale) { return sum + addend * scale; }
    static float total(Sum sum) { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }

    static void expand_tile(const Expander& expander, const uint8_t* const* rows, int64_t offset, int64_t left,
                            int64_t chunks, uint32_t* tile) {
        for (int n = 0; n < kPanel; ++n)
            for (int64_t c = 0; c < chunks; ++c) {
                Weights weights[kVectors];
                const uint8_t* from = rows[n] + offset + c * expander.bits;
                expander.expand(from, left - c * expander.bits, weights);
                for (int i = 0; i < kChunk; ++i)
                    tile[(n / kLanes * kTileUnits + c * kChunk + i) * kLanes + n % kLanes] =
                        float_to_bits(weights[i / kLanes][i % kLanes]);
            }
    }
};

struct GenericFamily {
    using Native = PlainNative;
    static constexpr int kChunk = GenericFp32::kChunk, kPanel = GenericFp32::kPanel;

    template <class Run>
    static void visit(const FormatSpec&, const Run& run) {
        run(GenericFp32());
    }
};

}  // namespace

extern const KernelSet kGenericKernels = Kernels<GenericFamily>::set("generic");

}  // namespace cpu
}  // namespace ds_fp6
