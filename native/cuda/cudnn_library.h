// cuDNN as cudnn-frontend's headers call it: their functions by name, which cudnn_library.cc has, and which call the library
// that is opened at run time. So nothing links cuDNN.
#pragma once

#include <string>

#include "../plugin.h"

namespace viaduct::cuda {

/// Where cuDNN and NVRTC are searched from now on.
void cudnnOptions(const DeviceOptions& options);
/// Opens cuDNN. Throws ERR_UNSUPPORTED when it is missing or too old; so does each of its functions.
void openCudnn();
/// "cuDNN 9.19.0".
std::string cudnnName();

}  // namespace viaduct::cuda
