#include "workspace.h"

#include <map>
#include <mutex>
#include <utility>

#include "linear.h"

namespace ds_fp6 {
namespace cuda {
namespace {

// Memory with its first contents from CUDA itself, allowed and complete even while the caller's stream is being captured: memory of
// torch's allocator would belong to the graph, and its setting would be recorded instead of done.
cudaError_t allocate_set(void** memory) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) return status;
    cudaStream_t stream = nullptr;
    status = cudaMalloc(memory, kWorkspaceBytes);
    if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = cudaMemsetAsync(*memory, 0, kWorkspaceFlagBytes, stream);
    if (status == cudaSuccess) {
        status = cudaMemsetAsync(static_cast<uint8_t*>(*memory) + kWorkspaceFlagBytes, kAbsentSum & 0xFF,
                                 kWorkspaceSumBytes, stream);
    }
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
    return status != cudaSuccess ? status : restored;
}

}  // namespace

cudaError_t workspace_of(int device, cudaStream_t stream, void** workspace) {
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, void*> known;
    const std::lock_guard<std::mutex> lock(mutex);
    void*& memory = known[{device, stream}];
    if (memory == nullptr) {
        void* fresh = nullptr;
        const cudaError_t status = allocate_set(&fresh);
        if (status != cudaSuccess) {
            if (fresh != nullptr) cudaFree(fresh);
            return status;
        }
        memory = fresh;
    }
    *workspace = memory;
    return cudaSuccess;
}

}  // namespace cuda
}  // namespace ds_fp6
