#include "linear_sm80_launch.cuh"

DS_FP6_INSTANTIATE_SM80(1, 5, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(2, 4, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(3, 3, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(4, 2, ds_fp6::Half)
DS_FP6_INSTANTIATE_SM80(5, 1, ds_fp6::Half)
