// Which kernels this CPU runs, and the choice between them.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace ds_fp6 {
namespace cpu {

void FormatSpec::values(float table[256]) const {
    const int magnitudes = 1 << (bits() - 1);
    for (int i = 0; i < magnitudes; ++i) {
        const int exponent = i >> mantissa_bits, mantissa = i & ((1 << mantissa_bits) - 1);
        const int significand = exponent ? (1 << mantissa_bits) + mantissa : mantissa;
        const uint32_t power = uint32_t(127 + (exponent ? exponent : 1) - bias() - mantissa_bits) << 23;
        float value;
        std::memcpy(&value, &power, sizeof(value));
        table[i] = value * float(significand);
        table[magnitudes + i] = -table[i];
    }
    for (int i = 2 * magnitudes; i < 256; ++i) table[i] = table[i - 2 * magnitudes];
}

float FormatSpec::max() const {
    return std::ldexp(float((2 << mantissa_bits) - 1), (1 << (exponent_bits - 1)) - mantissa_bits);
}

namespace {

// Best first. A short name stands for the best kernels whose name starts with it.
std::vector<const KernelSet*> runnable() {
    std::vector<const KernelSet*> sets;
#if defined(__x86_64__)
    // NOTE: __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool base = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vbmi = base && __builtin_cpu_supports("avx512vbmi");
    if (vbmi && __builtin_cpu_supports("avx512bf16")) sets.push_back(&kAvx512Bf16Kernels);
    if (vbmi) sets.push_back(&kAvx512VbmiKernels);
    if (base) sets.push_back(&kAvx512BaseKernels);
    if (avx2) sets.push_back(&kAvx2Kernels);
#endif
    sets.push_back(&kGenericKernels);
    return sets;
}

const KernelSet* find(const std::string& name) {
    for (const KernelSet* set : runnable())
        if (name == set->name || (name == "avx512" && std::string(set->name).rfind("avx512", 0) == 0)) return set;
    throw std::invalid_argument("DS_FP6_CPU_ISA is \"" + name + "\"; this CPU runs: " + available_kernels() +
                                " (avx512 is the best of those that start with it)");
}

std::atomic<const KernelSet*> selected{nullptr};

}  // namespace

std::string available_kernels() {
    std::string names;
    for (const KernelSet* set : runnable()) names.append(names.empty() ? "" : " ").append(set->name);
    return names;
}

void select_kernels(const std::string& name) { selected = name.empty() ? runnable().front() : find(name); }

const KernelSet& kernels() {
    const KernelSet* set = selected.load(std::memory_order_relaxed);
    if (set == nullptr) {
        const char* name = std::getenv("DS_FP6_CPU_ISA");
        select_kernels(name ? name : "");
        set = selected.load();
    }
    return *set;
}

}  // namespace cpu
}  // namespace ds_fp6
