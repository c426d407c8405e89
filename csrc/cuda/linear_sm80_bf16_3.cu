#include "linear_sm80_launch.cuh"

DS_FP6_INSTANTIATE_SM80(1, 1, ds_fp6::BFloat16)
DS_FP6_INSTANTIATE_SM80(2, 0, ds_fp6::BFloat16)
