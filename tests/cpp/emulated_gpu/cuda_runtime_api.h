// The names that kernels' headers mention.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
