#include "linear_sm80_launch.cuh"

DS_FP6_INSTANTIATE_SM80(1, 2, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(2, 1, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(3, 0, ds_fp6::Half)
