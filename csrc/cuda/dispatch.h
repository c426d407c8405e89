// From a format known at run time to the template that knows it.
#pragma once

#include "common/format.h"

namespace ds_fp6 {
namespace cuda {

// f(Format<E, M>{}) for the format with these bits, or `otherwise` where there is none.
template <class F, class R>
R dispatch_format(int exponent_bits, int mantissa_bits, F&& f, R otherwise) {
#define DS_FP6_FORMAT(E, M) \
    if (exponent_bits == E && mantissa_bits == M) return f(Format<E, M>{});
    DS_FP6_FORMAT(3, 2)
    DS_FP6_FORMAT(1, 1) DS_FP6_FORMAT(2, 0)
    DS_FP6_FORMAT(1, 2) DS_FP6_FORMAT(2, 1) DS_FP6_FORMAT(3, 0)
    DS_FP6_FORMAT(1, 3) DS_FP6_FORMAT(2, 2) DS_FP6_FORMAT(3, 1) DS_FP6_FORMAT(4, 0)
    DS_FP6_FORMAT(1, 4) DS_FP6_FORMAT(2, 3) DS_FP6_FORMAT(4, 1) DS_FP6_FORMAT(5, 0)
    DS_FP6_FORMAT(1, 5) DS_FP6_FORMAT(2, 4) DS_FP6_FORMAT(3, 3) DS_FP6_FORMAT(4, 2) DS_FP6_FORMAT(5, 1)
    DS_FP6_FORMAT(1, 6) DS_FP6_FORMAT(2, 5) DS_FP6_FORMAT(3, 4) DS_FP6_FORMAT(4, 3) DS_FP6_FORMAT(5, 2)
#undef DS_FP6_FORMAT
    return otherwise;
}

}  // namespace cuda
}  // namespace ds_fp6
