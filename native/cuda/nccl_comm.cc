// The operations of an NCCL communicator; see nccl_comm.h. Bytes that are only moved travel as bytes, so that every dtype may.
// NCCL sums BF16 and F16 in their own precision at each step of its ring or tree: not the bits of the host's sums.
#include "nccl_comm.h"

#include <algorithm>

#include "../checks/collectives.h"
#include "nccl_group.h"

namespace viaduct::cuda {

namespace {

/// The types that NCCL can reduce; false for others.
bool reducedType(DType dtype, ncclDataType_t* type) {
  switch (dtype) {
    case DType::F32:
      *type = ncclFloat32;
      return true;
    case DType::BF16:
      *type = ncclBfloat16;
      return true;
    case DType::F16:
      *type = ncclFloat16;
      return true;
    case DType::F64:
      *type = ncclFloat64;
      return true;
    case DType::I64:
      *type = ncclInt64;
      return true;
    case DType::I32:
      *type = ncclInt32;
      return true;
    case DType::I8:
      *type = ncclInt8;
      return true;
    case DType::U8:
      *type = ncclUint8;
      return true;
    case DType::U32:
      *type = ncclUint32;
      return true;
    case DType::U64:
      *type = ncclUint64;
      return true;
    default:
      return false;
  }
}

ncclDataType_t checkReducible(const char* op, const TensorRef& in) {
  ncclDataType_t type = ncclFloat32;
  if (!reducedType(in.dtype, &type)) refuseReduction(op, in);
  return type;
}

ncclRedOp_t reduction(ReduceOp op) {
  if (op == ReduceOp::Sum) return ncclSum;
  return op == ReduceOp::Max ? ncclMax : ncclMin;
}

/// Calls that NCCL starts together.
template <typename F>
ncclResult_t together(const Nccl& lib, F&& calls) {
  ncclResult_t result = lib.groupStart();
  if (result != ncclSuccess) return result;
  const ncclResult_t called = calls();
  result = lib.groupEnd();
  return called == ncclSuccess || called == ncclInProgress ? result : called;
}

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(std::shared_ptr<NcclGroup> group) : group_(std::move(group)), nccl_(nccl()) {}
  ~NcclCommunicator() override { group_->close(); }

  const std::string& name() const override { return group_->host().name(); }
  int rank() const override { return group_->host().rank(); }
  int size() const override { return group_->host().size(); }
  const std::vector<int>& worldRanks() const override { return group_->host().worldRanks(); }
  const char* transport() const override { return "nccl"; }
  std::shared_ptr<Communicator> host() const override { return group_->sharedHost(); }

  void allReduce(Stream& s, Out out, In in, ReduceOp op) override {
    checkCollective("allReduce", out, in, 1, 1);
    const ncclDataType_t type = checkReducible("allReduce", in);
    enqueue(s, CommOp::AllReduce, in, [=, &lib = nccl_](ncclComm_t comm, cudaStream_t stream) {
      return lib.allReduce(in.data, out.data, static_cast<size_t>(in.numel()), type, reduction(op), comm, stream);
    });
  }

  void allGather(Stream& s, Out out, In in) override {
    checkCollective("allGather", out, in, size(), 1);
    enqueue(s, CommOp::AllGather, in, [=, &lib = nccl_](ncclComm_t comm, cudaStream_t stream) {
      return lib.allGather(in.data, out.data, commBytes(in), ncclInt8, comm, stream);
    });
  }

  void reduceScatter(Stream& s, Out out, In in, ReduceOp op) override {
    checkCollective("reduceScatter", out, in, 1, size());
    const ncclDataType_t type = checkReducible("reduceScatter", in);
    enqueue(s, CommOp::ReduceScatter, in, [=, &lib = nccl_](ncclComm_t comm, cudaStream_t stream) {
      return lib.reduceScatter(in.data, out.data, static_cast<size_t>(out.numel()), type, reduction(op), comm, stream);
    });
  }

  void broadcast(Stream& s, InOut buffer, int root) override {
    checkBroadcast(buffer, root, size());
    enqueue(s, CommOp::Broadcast, buffer, [=, &lib = nccl_](ncclComm_t comm, cudaStream_t stream) {
      return lib.broadcast(buffer.data, buffer.data, commBytes(buffer), ncclInt8, root, comm, stream);
    });
  }

  void allToAll(Stream& s, Out out, In in, std::vector<int64_t> sendCounts, std::vector<int64_t> recvCounts) override {
    auto bytes = checkAllToAll(out, in, sendCounts, recvCounts, rank(), size());
    enqueueTicket(s, group_->issue(CommOp::AllToAll, 0, static_cast<int64_t>(commBytes(in))),
                  [=, &lib = nccl_, bytes = std::move(bytes)](ncclComm_t comm, cudaStream_t stream) {
                    return together(lib, [&] {
                      const char* from = in.as<char>();
                      char* to = out.as<char>();
                      ncclResult_t result = ncclSuccess;
                      const auto ok = [&] { return result == ncclSuccess || result == ncclInProgress; };
                      for (size_t p = 0; p < bytes.send.size() && ok(); ++p) {
                        if (bytes.send[p] > 0)
                          result = lib.send(from, bytes.send[p], ncclInt8, static_cast<int>(p), comm, stream);
                        if (bytes.recv[p] > 0 && ok())
                          result = lib.recv(to, bytes.recv[p], ncclInt8, static_cast<int>(p), comm, stream);
                        from += bytes.send[p];
                        to += bytes.recv[p];
                      }
                      return result;
                    });
                  });
  }

  void pointToPoint(Stream& s, std::vector<P2p> group) override {
    checkTransfers(group, rank(), size());
    int64_t payload = 0;
    std::vector<int> peers;
    for (const P2p& p : group) {
      if (p.send) payload += static_cast<int64_t>(commBytes(p.tensor));
      if (std::find(peers.begin(), peers.end(), p.peer) == peers.end()) peers.push_back(p.peer);
    }
    enqueueTicket(s, group_->issue(CommOp::PointToPoint, 0, payload, std::move(peers)),
                  [&lib = nccl_, group = std::move(group)](ncclComm_t comm, cudaStream_t stream) {
                    return together(lib, [&] {
                      ncclResult_t result = ncclSuccess;
                      for (const P2p& p : group) {
                        const size_t bytes = commBytes(p.tensor);
                        if (bytes == 0) continue;
                        result = p.send ? lib.send(p.tensor.data, bytes, ncclInt8, p.peer, comm, stream)
                                        : lib.recv(p.tensor.data, bytes, ncclInt8, p.peer, comm, stream);
                        if (result != ncclSuccess && result != ncclInProgress) break;
                      }
                      return result;
                    });
                  });
  }

  void barrier(Stream& s) override {
    const Scratch number(group_->backend(), s, sizeof(int32_t));
    enqueueTicket(s, group_->issue(CommOp::Barrier, 0, 0),
                  [&lib = nccl_, data = number.as<int32_t>()](ncclComm_t comm, cudaStream_t stream) {
                    return lib.allReduce(data, data, 1, ncclInt32, ncclMax, comm, stream);
                  });
  }

  std::function<std::unique_ptr<Communicator>()> split(int colour, int key, const std::string& name) override {
    auto splitHost = group_->host().split(colour, key, name);
    const CommTicket ticket = group_->issue(CommOp::Split, 0, 0);
    return [group = group_, ticket, colour, key, splitHost = std::move(splitHost),
            storeKey = group_->nextSplit(colour)]() -> std::unique_ptr<Communicator> {
      auto part = group->split(ticket, colour, key, splitHost, storeKey);
      return part == nullptr ? nullptr : std::make_unique<NcclCommunicator>(std::move(part));
    };
  }

  std::function<std::vector<std::vector<uint8_t>>()> gatherBytes(std::vector<uint8_t> mine) override {
    return group_->host().gatherBytes(std::move(mine));
  }

  void abort(const std::string& reason) override {
    group_->end(Error("ERR_COMM", "abort", "group " + name() + " was aborted: " + reason));
  }
  void setTimeout(int64_t timeoutMs) override { group_->setTimeout(timeoutMs); }
  uint64_t fingerprint() const override {
    return group_->ordered([](CommOrder& order) { return order.fingerprint(); });
  }
  int64_t sequence() const override {
    return group_->ordered([](CommOrder& order) { return order.sequence(); });
  }
  std::vector<std::pair<std::string, int64_t>> payload() const override {
    return group_->ordered([](CommOrder& order) { return order.payload(); });
  }

 private:
  template <typename F>
  void enqueue(Stream& s, CommOp op, const TensorRef& in, F call) {
    const size_t bytes = commBytes(in);
    enqueueTicket(s, group_->issue(op, bytes, static_cast<int64_t>(bytes)),
                  [call = std::move(call), bytes](ncclComm_t comm, cudaStream_t stream) {
                    return bytes == 0 ? ncclSuccess : call(comm, stream);
                  });
  }
  template <typename F>
  void enqueueTicket(Stream& s, const CommTicket& ticket, F call) {
    CudaStream& stream = cudaStream(s);
    s.enqueue(commOpName(ticket.op),
              [group = group_, &stream, ticket, call = std::move(call)] { group->run(ticket, stream, call); });
  }

  const std::shared_ptr<NcclGroup> group_;
  const Nccl& nccl_;
};

}  // namespace

std::unique_ptr<Communicator> connectNccl(CudaBackend& backend, const DeviceGroupOptions& options) {
  auto group = std::make_shared<NcclGroup>(backend, options, nullptr);
  group->start();
  return std::make_unique<NcclCommunicator>(std::move(group));
}

}  // namespace viaduct::cuda
