#include "scratch.h"

#include <cstdlib>
#include <new>

namespace ds_fp6 {
namespace cpu {
namespace {

struct Buffers {
    void* memory[int(Scratch::kCount)] = {};
    size_t size[int(Scratch::kCount)] = {};

    ~Buffers() {
        for (void* p : memory) std::free(p);
    }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(Scratch purpose, size_t bytes) {
    const int i = int(purpose);
    if (buffers.size[i] < bytes) {
        std::free(buffers.memory[i]);
        buffers.size[i] = 0;
        buffers.memory[i] = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (buffers.memory[i] == nullptr) throw std::bad_alloc();
        buffers.size[i] = bytes;
    }
    return buffers.memory[i];
}

}  // namespace cpu
}  // namespace ds_fp6
