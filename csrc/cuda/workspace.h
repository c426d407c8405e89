// The linear kernels' scratch memory.
#pragma once

#include <cuda_runtime_api.h>

namespace ds_fp6 {
namespace cuda {

// kWorkspaceBytes for one stream of the current device, set as kernels expect it; allocated at the first call for
// the stream and kept for the life of the process. Kernels on one stream run one after another, so they can share it.
//
// NOTE: a captured graph keeps using the workspace of the stream it was captured on: graphs captured on one stream must
// not be replayed at the same time, as with cuBLAS's workspaces.
cudaError_t workspace_of(int device, cudaStream_t stream, void** workspace);

}  // namespace cuda
}  // namespace ds_fp6
