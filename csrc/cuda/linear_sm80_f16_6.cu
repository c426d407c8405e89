#include "linear_sm80_launch.cuh"

DS_FP6_INSTANTIATE_SM80(1, 4, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(2, 3, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(3, 2, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(4, 1, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(5, 0, ds_fp6::Half)
