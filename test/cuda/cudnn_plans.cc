// Makes cuDNN's plans of attention for a GPU that is not here: the plug-in's own files, given cuDNN's properties of the GPU. cuDNN
// compiles the kernels; none runs. Arguments: folders of libraries. Standard input: the compute capability and the properties,
// a line each, then one call a line: the numbers of readCall. Standard output, a line each: `plan MILLISECONDS WORKSPACE`,
// `refused WHY` by whyNotCudnn, `failed WHY` by cuDNN.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <sstream>

#include "native/cuda/attention_cut.h"

namespace viaduct::cuda {
namespace {

struct Call {
  AttentionArgs args;
  bool backward = false;
};

/// A view of tensors that are not there: [B, positions, G, heads, channels] in rows of `row` elements.
HeadsView viewOf(DType dtype, int64_t positions, int64_t row, int64_t group, int64_t head) {
  HeadsView view;
  view.data = reinterpret_cast<void*>(uintptr_t{1} << 20);
  view.dtype = dtype;
  view.batch = positions * row;
  view.position = row;
  view.group = group;
  view.head = head;
  return view;
}

Call readCall(const std::string& line) {
  std::istringstream numbers(line);
  const auto next = [&numbers] {
    double x = 0;
    numbers >> x;
    return x;
  };
  const auto whole = [&next] { return static_cast<int64_t>(next()); };
  Call call;
  AttentionArgs& a = call.args;
  call.backward = whole() != 0;
  const DType dtype = whole() != 0 ? DType::F16 : DType::BF16;
  const bool packed = whole() != 0;
  for (int64_t* size : {&a.B, &a.S, &a.G, &a.R, &a.K, &a.D, &a.Dv}) *size = whole();
  a.causal = whole() != 0;
  a.queryOffset = whole();
  a.window = whole();
  a.softcap = static_cast<float>(next());
  static int32_t end = 0;
  if (whole() != 0) a.keyEnd = &end;
  if (whole() != 0) a.firstKey = &end;
  a.scale = 0.1f;
  const int64_t group = packed ? (a.R + 2) * a.D : 0, row = a.G * group;
  const auto queries = [&](int64_t channels) {
    return packed ? viewOf(dtype, a.S, row, group, a.D)
                  : viewOf(dtype, a.S, a.G * a.R * channels, a.R * channels, channels);
  };
  const auto keys = [&](int64_t channels) {
    return packed ? viewOf(dtype, a.K, row, group, 0) : viewOf(dtype, a.K, a.G * channels, channels, 0);
  };
  a.q = a.dq = queries(a.D);
  a.k = a.dk = keys(a.D);
  a.v = a.dv = keys(a.Dv);
  a.out = a.dOut = viewOf(dtype, a.S, a.G * a.R * a.Dv, a.R * a.Dv, a.Dv);
  a.lseQuery = 1;
  a.lseHead = a.S;
  a.lseBatch = a.G * a.R * a.S;
  return call;
}

std::string oneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

std::string answer(const Call& call, const SdpaTarget& target) {
  const std::string why = whyNotCudnn(call.args, call.backward, target.computeCapability);
  if (!why.empty()) return "refused " + why;
  const auto begun = std::chrono::steady_clock::now();
  try {
    const auto plan = makeSdpaPlan(cutForCudnn(call.args, call.backward, target.computeCapability).shape, target);
    if (call.backward) makeSdpaPlan(cutForCudnn(call.args, true, {target.computeCapability, false}).shape, target);
    const auto took = std::chrono::steady_clock::now() - begun;
    return "plan " + std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(took).count()) + " " +
           std::to_string(plan->workspace());
  } catch (const Error& e) {
    return "failed " + oneLine(e.what());
  }
}

}  // namespace
}  // namespace viaduct::cuda

int main(int count, char** arguments) {
  using namespace viaduct;
  DeviceOptions options;
  options.libraryFolders.assign(arguments + 1, arguments + count);
  cuda::sdpaOptions(options);
  std::string line;
  cuda::SdpaTarget target;
  std::getline(std::cin, line);
  target.computeCapability = std::stoi(line);
  std::getline(std::cin, target.properties);
  while (std::getline(std::cin, line)) std::cout << answer(cuda::readCall(line), target) << std::endl;
  return 0;
}
