// quantize, dequantize, pack, unpack: hands a problem to its format's launcher, instantiated in quantize_*.cu.
#include "quantize.h"

#include "dispatch.h"

namespace ds_fp6 {
namespace cuda {
namespace tiles {

template <class Fmt>
cudaError_t launch_quantize(const QuantizeProblem& problem, cudaStream_t stream);
template <class Fmt>
cudaError_t launch_dequantize(const DequantizeProblem& problem, cudaStream_t stream);
template <class Fmt>
cudaError_t launch_pack(const RelayoutProblem& problem, cudaStream_t stream);
template <class Fmt>
cudaError_t launch_unpack(const RelayoutProblem& problem, cudaStream_t stream);

}  // namespace tiles

#define DS_FP6_DISPATCH(name, Problem)                                                                 \
    cudaError_t name(const Problem& problem, cudaStream_t stream) {                                    \
        return dispatch_format(                                                                        \
            problem.exponent_bits, problem.mantissa_bits,                                              \
            [&](auto format) { return tiles::launch_##name<decltype(format)>(problem, stream); },      \
            cudaErrorInvalidValue);                                                                    \
    }
DS_FP6_DISPATCH(quantize, QuantizeProblem)
DS_FP6_DISPATCH(dequantize, DequantizeProblem)
DS_FP6_DISPATCH(pack, RelayoutProblem)
DS_FP6_DISPATCH(unpack, RelayoutProblem)
#undef DS_FP6_DISPATCH

}  // namespace cuda
}  // namespace ds_fp6
