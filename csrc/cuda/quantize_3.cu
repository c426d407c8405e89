#include "quantize_launch.cuh"

DS_FP6_INSTANTIATE_TILES(1, 1)
DS_FP6_INSTANTIATE_TILES(2, 0)
