// How long merging attention states takes, against the bytes that it must move and, with --peer=FILE, against another
// library's times for the same cells.
//
// Each cell has as many sets of inputs and outputs as fill 256 MiB, so that a set is out of the L2 cache when its turn
// comes again. Launches over all sets, at least 20 and at most 1024, make up a graph; graphs are queued one after the
// other, and a sample is the time between an event before and one after a graph, over its launches. Before anything is
// timed, sampled rows of what a graph wrote are compared with the definition in double. Bytes count values and LSEs,
// read or written once.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/merge_variants.h"
#include "pristine/attention/merge_states.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/arguments.h"
#include "tests/benchmarks/graph_timer.h"

namespace pristine::benchmarks {
namespace {

using attention::BFloat16;
using attention::DType;
using attention::Float16;
using attention::LseBase2;
using attention::MergeShape;
using attention::MergeVariant;

constexpr int64_t kRotation = int64_t{256} << 20;  // bytes between two uses of a set
constexpr int64_t kMinLaunches = 20, kMaxLaunches = 1024;
constexpr int kCheckedRows = 24;

struct Options {
  int device = 0;
  int samples = 30;
  bool json = false;
  bool forms = false;  // both kernels of MergeState, whichever the library would choose
  std::string peer;
};

enum class Op { kMergeState, kBlockPerToken, kTokenHead, kMergeStates, kRagged };
// The peer's names where it has the kernel.
const char* ToString(Op op) {
  switch (op) {
    case Op::kMergeState:
      return "MergeState";
    case Op::kBlockPerToken:
      return "MergeState/block";
    case Op::kTokenHead:
      return "MergeState/grid";
    case Op::kMergeStates:
      return "MergeStates";
    case Op::kRagged:
      return "VariableLengthMergeStates";
  }
  return "";
}

struct Cell {
  Op op;
  DType dtype;
  int32_t heads, head_dim, tokens, states;

  MergeShape shape() const { return {dtype, heads, head_dim}; }
  int64_t element() const { return static_cast<int64_t>(attention::SizeOf(dtype)); }
  int64_t row() const { return int64_t{heads} * head_dim; }                         // elements
  int64_t input_v() const { return int64_t{tokens} * states * row() * element(); }  // bytes, as the three below
  int64_t input_lse() const { return int64_t{tokens} * states * heads * 4; }
  int64_t output_v() const { return int64_t{tokens} * row() * element(); }
  int64_t output_lse() const { return int64_t{tokens} * heads * 4; }
  int64_t bytes() const { return input_v() + input_lse() + output_v() + output_lse(); }
  int64_t sets() const { return (kRotation + bytes() - 1) / bytes(); }
  std::string Key() const {
    const char* const type = dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16";
    return absl::StrCat(ToString(op), ",", type, ",", heads, ",", head_dim, ",", tokens, ",", states);
  }
};

std::vector<Cell> Cells(bool forms) {
  std::vector<Cell> cells;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int32_t tokens : {1, 128, 4096, 65536}) {
      for (const int32_t heads : {8, 32, 64}) {
        cells.push_back({Op::kMergeState, dtype, heads, 128, tokens, 2});
        if (!forms) continue;
        cells.push_back({Op::kBlockPerToken, dtype, heads, 128, tokens, 2});
        cells.push_back({Op::kTokenHead, dtype, heads, 128, tokens, 2});
      }
    }
    cells.push_back({Op::kMergeState, dtype, 128, 128, 4096, 2});  // more heads than a block holds
    cells.push_back({Op::kMergeStates, dtype, 32, 128, 4096, 4});
    cells.push_back({Op::kRagged, dtype, 32, 128, 4096, 4});
  }
  cells.push_back({Op::kMergeState, DType::kFloat32, 32, 128, 4096, 2});
  cells.push_back({Op::kRagged, DType::kFloat32, 32, 128, 4096, 4});
  return cells;
}

// Fills `to` with copies of a random block; its odd size lets no two sets or sides be alike.
absl::Status FillRandomly(Stream& stream, DeviceSpan<std::byte> to, bool lse, DType dtype) {
  constexpr size_t kBlock = (size_t{4} << 20) - 272;
  std::vector<std::byte> block(std::min(kBlock, to.size()));
  std::mt19937_64 random(lse ? 2 : 1);
  std::uniform_real_distribution<float> value(lse ? -6.0f : -1.7f, lse ? 6.0f : 1.7f);
  const size_t element = lse ? 4 : attention::SizeOf(dtype);
  for (size_t at = 0; at + element <= block.size(); at += element) {
    const float x = value(random);
    if (element == 4) {
      std::memcpy(&block[at], &x, 4);
    } else {
      const uint16_t bits =
          dtype == DType::kFloat16 ? attention::FromFloat<Float16>(x).bits : attention::FromFloat<BFloat16>(x).bits;
      std::memcpy(&block[at], &bits, 2);
    }
  }
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(to.Sub(0, block.size()), block));
  for (size_t at = block.size(); at < to.size(); at += block.size()) {
    const size_t size = std::min(block.size(), to.size() - at);
    PRISTINE_RETURN_IF_ERROR(stream.Copy(to.Sub(at, size), {to.address(), size}));
  }
  return stream.Synchronize();
}

std::vector<float> Widen(const std::vector<std::byte>& bytes, DType dtype) {
  const size_t element = attention::SizeOf(dtype);
  std::vector<float> values(bytes.size() / element);
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits = 0;
    std::memcpy(element == 4 ? static_cast<void*>(&values[i]) : &bits, &bytes[i * element], element);
    if (dtype == DType::kFloat16) values[i] = attention::ToFloat(Float16{bits});
    if (dtype == DType::kBFloat16) values[i] = attention::ToFloat(BFloat16{bits});
  }
  return values;
}

class Workload {
 public:
  static absl::StatusOr<std::unique_ptr<Workload>> Create(Device& device, Stream& stream, const Cell& cell) {
    std::unique_ptr<Workload> work(new Workload(stream, cell));
    const int64_t sets = cell.sets();
    PRISTINE_ASSIGN_OR_RETURN(work->manager_, BufferManager::Create(device));
    PRISTINE_ASSIGN_OR_RETURN(work->v_, device.Allocate(sets * cell.input_v(), "v"));
    PRISTINE_ASSIGN_OR_RETURN(work->lse_, device.Allocate(sets * cell.input_lse(), "lse"));
    PRISTINE_ASSIGN_OR_RETURN(work->out_v_, device.Allocate(sets * cell.output_v(), "out_v"));
    PRISTINE_ASSIGN_OR_RETURN(work->out_lse_, device.Allocate(sets * cell.output_lse(), "out_lse"));
    std::vector<int32_t> indptr(static_cast<size_t>(cell.tokens) + 1);
    for (size_t i = 0; i < indptr.size(); ++i) indptr[i] = static_cast<int32_t>(i) * cell.states;
    PRISTINE_ASSIGN_OR_RETURN(work->indptr_, device.Allocate(indptr.size() * 4, "indptr"));
    PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(
        work->indptr_.As<std::byte>(), {reinterpret_cast<const std::byte*>(indptr.data()), indptr.size() * 4}));
    PRISTINE_RETURN_IF_ERROR(FillRandomly(stream, work->v_.As<std::byte>(), false, cell.dtype));
    PRISTINE_RETURN_IF_ERROR(FillRandomly(stream, work->lse_.As<std::byte>(), true, cell.dtype));
    PRISTINE_RETURN_IF_ERROR(stream.Fill(work->out_v_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(stream.Fill(work->out_lse_.As<std::byte>(), std::byte{0xff}));
    const ReportRing reports = work->manager_->report_ring({cell.tokens, cell.tokens});

    // A first launch loads the kernel, which a capture need not survive.
    PRISTINE_RETURN_IF_ERROR(work->Merge(stream, 0, reports));
    work->launches_ = std::clamp(sets, kMinLaunches, kMaxLaunches);
    const int64_t graphs = (sets + work->launches_ - 1) / work->launches_;
    for (int64_t graph = 0; graph < graphs; ++graph) {
      PRISTINE_ASSIGN_OR_RETURN(
          const std::unique_ptr<Graph> captured, Capture(stream, [&](Stream& capturing) -> absl::Status {
            for (int64_t i = 0; i < work->launches_; ++i) {
              PRISTINE_RETURN_IF_ERROR(work->Merge(capturing, (graph * work->launches_ + i) % sets, reports));
            }
            return absl::OkStatus();
          }));
      PRISTINE_ASSIGN_OR_RETURN(auto exec, captured->Instantiate());
      work->execs_.push_back(std::move(exec));
    }
    return work;
  }

  // Runs all graphs once, and compares sampled rows of the first and the last set with the definition.
  absl::Status Check() {
    for (const auto& exec : execs_) PRISTINE_RETURN_IF_ERROR(exec->Launch(stream_));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    std::mt19937_64 random(3);
    for (const int64_t set : {int64_t{0}, cell_.sets() - 1}) {
      for (int i = 0; i < kCheckedRows; ++i) {
        const int64_t row = i == 0 ? 0 : i == 1 ? cell_.tokens - 1 : static_cast<int64_t>(random() % cell_.tokens);
        PRISTINE_RETURN_IF_ERROR(CheckRow(set, row));
      }
    }
    Violation violation;
    if (manager_->Poll({&violation, 1}) > 0) return absl::DataLossError(violation.ToString());
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<double>> Time(int samples) {
    PRISTINE_ASSIGN_OR_RETURN(std::vector<double> times, GraphTimer::Time(stream_, execs_, samples));
    for (double& time : times) time /= static_cast<double>(launches_);
    return times;
  }

 private:
  Workload(Stream& stream, const Cell& cell) : stream_(stream), cell_(cell) {}

  // State i of token t: two inputs one after the other for MergeState, states of a token together otherwise.
  bool IsPair() const { return cell_.op != Op::kMergeStates && cell_.op != Op::kRagged; }
  int64_t StateRow(int64_t token, int32_t i) const {
    return IsPair() ? int64_t{i} * cell_.tokens + token : token * cell_.states + i;
  }

  absl::Status Merge(Stream& stream, int64_t set, const ReportRing& reports) {
    const auto v = v_.As<const std::byte>().Sub(set * cell_.input_v(), cell_.input_v());
    const auto lse = lse_.As<const LseBase2>().Sub(set * cell_.input_lse() / 4, cell_.input_lse() / 4);
    const attention::MutableStates out = {
        .v = out_v_.As<std::byte>().Sub(set * cell_.output_v(), cell_.output_v()),
        .lse = out_lse_.As<LseBase2>().Sub(set * cell_.output_lse() / 4, cell_.output_lse() / 4)};
    if (!IsPair()) {
      const attention::States states = {.v = v, .lse = lse};
      if (cell_.op == Op::kMergeStates) {
        return MergeStates(stream, cell_.shape(), cell_.tokens, cell_.states, states, out, reports);
      }
      return MergeRaggedStates(stream, cell_.shape(), cell_.tokens, indptr_.As<const int32_t>(),
                               cell_.tokens * cell_.states, states, out, reports);
    }
    const attention::States a = {.v = v.Sub(0, v.size() / 2), .lse = lse.Sub(0, lse.size() / 2)};
    const attention::States b = {.v = v.Sub(v.size() / 2, v.size() / 2),
                                 .lse = lse.Sub(lse.size() / 2, lse.size() / 2)};
    if (cell_.op == Op::kMergeState) return MergeState(stream, cell_.shape(), cell_.tokens, a, b, out, reports);
    const auto input = [&](const attention::States& states) -> attention::MergeInput {
      return {states.v.address(), reinterpret_cast<const float*>(states.lse.address()), cell_.row(), cell_.heads, 1};
    };
    const MergeVariant* const variant = attention::FindMergeVariant(cell_.dtype, cell_.head_dim);
    return Launch(stream, cell_.op == Op::kBlockPerToken ? variant->block_per_token : variant->token_head,
                  attention::MergePairParams{.a = input(a),
                                             .b = input(b),
                                             .out = {out.v.address(), reinterpret_cast<float*>(out.lse.address()),
                                                     cell_.row(), cell_.heads, 1},
                                             .mask = nullptr,
                                             .rows = cell_.tokens,
                                             .heads = cell_.heads,
                                             .head_dim = cell_.head_dim,
                                             .reports = reports});
  }

  absl::StatusOr<std::vector<float>> Read(const DeviceBuffer& buffer, int64_t offset, int64_t bytes, DType dtype) {
    std::vector<std::byte> values(static_cast<size_t>(bytes));
    PRISTINE_RETURN_IF_ERROR(
        stream_.CopyToHost(absl::MakeSpan(values), buffer.As<const std::byte>().Sub(offset, bytes)));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    return Widen(values, dtype);
  }

  absl::Status CheckRow(int64_t set, int64_t token) {
    const int64_t row_bytes = cell_.row() * cell_.element(), lse_bytes = int64_t{cell_.heads} * 4;
    std::vector<std::vector<float>> v, lse;
    for (int32_t i = 0; i < cell_.states; ++i) {
      const int64_t at = StateRow(token, i);
      PRISTINE_ASSIGN_OR_RETURN(std::vector<float> values,
                                Read(v_, set * cell_.input_v() + at * row_bytes, row_bytes, cell_.dtype));
      PRISTINE_ASSIGN_OR_RETURN(std::vector<float> lses,
                                Read(lse_, set * cell_.input_lse() + at * lse_bytes, lse_bytes, DType::kFloat32));
      v.push_back(std::move(values));
      lse.push_back(std::move(lses));
    }
    PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> out,
                              Read(out_v_, set * cell_.output_v() + token * row_bytes, row_bytes, cell_.dtype));
    PRISTINE_ASSIGN_OR_RETURN(const std::vector<float> out_lse,
                              Read(out_lse_, set * cell_.output_lse() + token * lse_bytes, lse_bytes, DType::kFloat32));
    const double tolerance = cell_.dtype == DType::kFloat32 ? 1e-5 : cell_.dtype == DType::kFloat16 ? 2e-3 : 8e-3;
    for (int32_t head = 0; head < cell_.heads; ++head) {
      double mass = 0, error = 0, norm = 0;
      for (int32_t i = 0; i < cell_.states; ++i) mass += std::exp2(double{lse[i][head]});
      for (int64_t d = int64_t{head} * cell_.head_dim; d < int64_t{head + 1} * cell_.head_dim; ++d) {
        double expected = 0;
        for (int32_t i = 0; i < cell_.states; ++i) expected += std::exp2(double{lse[i][head]}) / mass * v[i][d];
        error += (out[d] - expected) * (out[d] - expected);
        norm += expected * expected;
      }
      // Written so that NaN does not pass.
      if (!(std::sqrt(error / norm) <= tolerance) || !(std::abs(out_lse[head] - std::log2(mass)) <= 1e-4)) {
        return absl::DataLossError(absl::StrCat(cell_.Key(), ": set ", set, ", token ", token, ", head ", head,
                                                ": relative RMS ", std::sqrt(error / norm), ", LSE ", out_lse[head],
                                                ", expected ", std::log2(mass)));
      }
    }
    return absl::OkStatus();
  }

  Stream& stream_;
  const Cell cell_;
  std::unique_ptr<BufferManager> manager_;
  DeviceBuffer v_, lse_, out_v_, out_lse_, indptr_;
  int64_t launches_ = 0;                           // of one graph
  std::vector<std::unique_ptr<GraphExec>> execs_;  // all sets, in turn
};

// Cell::Key -> us. Lines: kernel,dtype,heads,head_dim,tokens,states,us,…; # and the line of names are skipped.
absl::StatusOr<std::map<std::string, double>> ReadPeer(const std::string& path) {
  std::map<std::string, double> peer;
  if (path.empty()) return peer;
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#' || line.rfind("kernel,", 0) == 0) continue;
    size_t end = 0;
    for (int field = 0; field < 6 && end != std::string::npos; ++field) end = line.find(',', end + (field > 0));
    double us = 0;
    if (end == std::string::npos || std::sscanf(line.c_str() + end + 1, "%lf", &us) != 1 || us <= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": \"", line, "\" is not kernel,dtype,heads,head_dim,tokens,states,us"));
    }
    peer[line.substr(0, end)] = us;
  }
  return peer;
}

absl::Status Run(const Options& options) {
  PRISTINE_ASSIGN_OR_RETURN(const auto peer, ReadPeer(options.peer));
  PRISTINE_ASSIGN_OR_RETURN(const auto device, CreateCudaDevice(options.device));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaSetDevice(options.device), "cudaSetDevice"));
  PRISTINE_ASSIGN_OR_RETURN(const auto stream, device->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(const double copy, CopyBandwidth(*device, *stream));
  if (!options.json) {
    std::printf("%s: copies %.0f GB/s. Median of at least %d graphs, outputs checked.\n\n", device->name().c_str(),
                copy, options.samples);
    std::printf("%-26s %-8s %5s %8s %7s %6s %10s %10s %8s %8s %10s %8s\n", "kernel", "dtype", "heads", "head_dim",
                "tokens", "states", "min us", "median us", "GB/s", "of copy", "peer us", "speedup");
  }
  std::string json = absl::StrCat("{\"device\": \"", device->name(), "\", \"copy_gbps\": ", copy, ", \"cells\": [");
  const char* separator = "\n ";
  for (const Cell& cell : Cells(options.forms)) {
    PRISTINE_ASSIGN_OR_RETURN(const auto work, Workload::Create(*device, *stream, cell));
    PRISTINE_RETURN_IF_ERROR(work->Check());
    PRISTINE_ASSIGN_OR_RETURN(const std::vector<double> times, work->Time(options.samples));
    const double us = Median(times), least = *std::min_element(times.begin(), times.end());
    const double gbps = static_cast<double>(cell.bytes()) / us / 1e3;
    const auto found = peer.find(cell.Key());
    const double peer_us = found == peer.end() ? 0 : found->second;
    if (options.json) {
      absl::StrAppend(&json, separator, "{\"kernel\": \"", ToString(cell.op), "\", \"dtype\": \"",
                      attention::ToString(cell.dtype), "\", \"heads\": ", cell.heads, ", \"head_dim\": ", cell.head_dim,
                      ", \"tokens\": ", cell.tokens, ", \"states\": ", cell.states, ", \"samples\": ", times.size(),
                      ", \"min_us\": ", least, ", \"median_us\": ", us, ", \"gbps\": ", gbps,
                      ", \"of_copy\": ", gbps / copy);
      if (peer_us > 0) absl::StrAppend(&json, ", \"peer_us\": ", peer_us, ", \"speedup\": ", peer_us / us);
      absl::StrAppend(&json, "}");
      separator = ",\n ";
      continue;
    }
    std::printf("%-26s %-8s %5d %8d %7d %6d %10.3f %10.3f %8.1f %8.3f", ToString(cell.op),
                attention::ToString(cell.dtype), cell.heads, cell.head_dim, cell.tokens, cell.states, least, us, gbps,
                gbps / copy);
    if (peer_us > 0) {
      std::printf(" %10.3f %8.2f\n", peer_us, peer_us / us);
    } else {
      std::printf(" %10s %8s\n", "-", "-");
    }
    std::fflush(stdout);
  }
  if (options.json) std::printf("%s]}\n", json.c_str());
  return absl::OkStatus();
}

// False: `argument` is not one of ours.
bool Parse(const char* argument, Options& options) {
  if (std::strcmp(argument, "--json") == 0) return options.json = true;
  if (std::strcmp(argument, "--forms") == 0) return options.forms = true;
  return TextArgument(argument, "--peer=", options.peer) ||
         NumberArgument(argument, "--samples=", 1, options.samples) ||
         NumberArgument(argument, "--device=", 0, options.device);
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  using namespace pristine::benchmarks;  // NOLINT(build/namespaces): all of it is this program
  return Main(argc, argv, "usage: merge_benchmark [--samples=N] [--device=N] [--peer=FILE] [--forms] [--json]\n",
              &Parse, &Run);
}
