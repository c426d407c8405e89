// Working memory of a thread: kept between calls, so that the hot path does not allocate.
#pragma once

#include <cstddef>

namespace ds_fp6 {
namespace cpu {

enum class Scratch { kTile, kSums, kRow, kCodes, kCount };

// At least `bytes` of memory, 64-byte aligned, that belongs to this thread and purpose; its contents are undefined.
void* scratch(Scratch purpose, size_t bytes);

}  // namespace cpu
}  // namespace ds_fp6
