// The twin's functions where NCCL's would be; see ../nccl_library.h. For tests alone.
#include "../nccl_library.h"

namespace viaduct::cuda {

void ncclOptions(const DeviceOptions&) {}

const Nccl& nccl() {
  static const Nccl twin = {ncclGetUniqueId,  ncclCommInitRankConfig, ncclCommSplit, ncclCommGetAsyncError,
                            ncclCommFinalize, ncclCommDestroy,        ncclCommAbort, ncclGetErrorString,
                            ncclGetLastError, ncclGroupStart,         ncclGroupEnd,  ncclAllReduce,
                            ncclAllGather,    ncclReduceScatter,      ncclBroadcast, ncclSend,
                            ncclRecv};
  return twin;
}

}  // namespace viaduct::cuda
