// A sign of life out of band, for the process that supervises this one.
#pragma once

#include <cstdint>
#include <string>

namespace viaduct {

/// From now to its end this process touches `file` every `periodMs` milliseconds, on a thread of its own: also while JavaScript,
/// a kernel or a collective is busy or waits, but not while the process is stopped. Later calls of the process do nothing.
/// Throws ERR_IO when the file cannot be touched.
void startHeartbeat(const std::string& file, int64_t periodMs);

}  // namespace viaduct
