#include "linear_sm80_launch.cuh"

DS_FP6_INSTANTIATE_SM80(1, 6, ds_fp6::BFloat16)
DS_FP6_INSTANTIATE_SM80(2, 5, ds_fp6::BFloat16)
DS_FP6_INSTANTIATE_SM80(3, 4, ds_fp6::BFloat16)
DS_FP6_INSTANTIATE_SM80(4, 3, ds_fp6::BFloat16)
DS_FP6_INSTANTIATE_SM80(5, 2, ds_fp6::BFloat16)
