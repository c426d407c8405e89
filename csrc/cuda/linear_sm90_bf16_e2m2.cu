#include "linear_sm90_launch.cuh"

DS_FP6_INSTANTIATE_SM90(2, 2, ds_fp6::BFloat16)
