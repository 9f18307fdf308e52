// Gated Delta Net prefill against its floor and what others have published for the same card and shapes, inside graphs.
//
// Floor: the larger of the bytes that must move (q, k, v, out, gates and states once, at what a copy kernel reaches)
// and the products of the fused chunked form (163,840 FLOP per token and value head, at what cuBLAS reaches in
// bfloat16). A graph holds several launches over different tokens, so that inputs do not come from the L2 cache;
// figures are per launch. Before a row is timed, outputs and final state of one head are compared with the recurrence
// in double, under both sets of gates: "mixed" has a quarter of its heads without decay, the rest as Mamba initialises
// them; "slow" has decays uniform in (0.9, 1).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/bfloat16.h"
#include "pristine/attention/gdn/prefill.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/gdn_prefill_peers.h"
#include "tests/gdn/prefill_reference.h"

namespace pristine::benchmarks {
namespace {

using attention::BFloat16;
using attention::DType;
using namespace attention::gdn;  // NOLINT(build/namespaces)

constexpr int kSamples = 20;
constexpr double kBandwidth = 4.27;  // TB/s
constexpr double kFlops = 790;       // TFLOP/s
constexpr double kFlopPerToken = 163840;
constexpr int32_t kMaxTokens = 32768, kMaxQkHeads = 32, kMaxVHeads = 64;
constexpr size_t kCheckedTokens = 1024;  // of out; what comes first does not depend on what follows
constexpr size_t kCheckedState = 8192;   // a longer sequence's state is not checked

absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

// "28672+4096", "1x8192", "2048x4".
std::vector<int32_t> Lengths(const std::string& text) {
  if (const size_t x = text.find('x'); x != std::string::npos) {
    const int32_t first = std::atoi(text.c_str()), second = std::atoi(text.c_str() + x + 1);
    return first == 1 ? std::vector<int32_t>{second} : std::vector<int32_t>(static_cast<size_t>(second), first);
  }
  std::vector<int32_t> lengths = {std::atoi(text.c_str())};
  for (size_t plus = text.find('+'); plus != std::string::npos; plus = text.find('+', plus + 1)) {
    lengths.push_back(std::atoi(text.c_str() + plus + 1));
  }
  return lengths;
}

struct Array {
  std::vector<BFloat16> values;
  DeviceBuffer memory;
};

class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Create() {
    auto bench = std::make_unique<Bench>();
    PRISTINE_ASSIGN_OR_RETURN(bench->device_, CreateCudaDevice(0));
    PRISTINE_ASSIGN_OR_RETURN(bench->stream_, bench->device_->CreateStream());
    PRISTINE_RETURN_IF_ERROR(bench->Fill(bench->q_, size_t{kMaxTokens} * kMaxQkHeads, true));
    PRISTINE_RETURN_IF_ERROR(bench->Fill(bench->k_, size_t{kMaxTokens} * kMaxQkHeads, true));
    PRISTINE_RETURN_IF_ERROR(bench->Fill(bench->v_, size_t{kMaxTokens} * kMaxVHeads, false));
    bench->beta_.resize(size_t{kMaxTokens} * kMaxVHeads);
    for (float& beta : bench->beta_) beta = static_cast<float>(bench->Next() * 0.5 + 0.5);
    PRISTINE_ASSIGN_OR_RETURN(bench->beta_memory_, bench->Upload(bench->beta_.data(), bench->beta_.size() * 4));
    PRISTINE_ASSIGN_OR_RETURN(bench->out_, bench->device_->Allocate(bench->v_.values.size() * 2, "out"));
    return bench;
  }

  const std::string& device_name() const { return device_->name(); }

  absl::Status Row(const PrefillPeers& peers) {
    const std::vector<int32_t> lengths = Lengths(peers.lengths);
    const int32_t requests = static_cast<int32_t>(lengths.size());
    std::vector<int32_t> cu(1), slots;
    for (const int32_t length : lengths) {
      cu.push_back(cu.back() + length);
      slots.push_back(static_cast<int32_t>(slots.size()) + 1);
    }
    const Extent bucket = {requests, cu.back()};
    if (bucket.tokens < 1 || bucket.tokens > kMaxTokens || peers.qk_heads > kMaxQkHeads || peers.v_heads > kMaxVHeads) {
      return absl::InvalidArgumentError(absl::StrCat(peers.qk_heads, "/", peers.v_heads, " ", peers.lengths,
                                                     ": at most ", kMaxQkHeads, "/", kMaxVHeads, " heads and ",
                                                     kMaxTokens, " tokens"));
    }
    PRISTINE_ASSIGN_OR_RETURN(
        const std::unique_ptr<Prefill> prefill,
        Prefill::Create(*device_, {.largest = bucket, .qk_heads = peers.qk_heads, .v_heads = peers.v_heads}));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<StatePool> pool,
                              StatePool::Create(*device_, DType::kFloat32, peers.v_heads, requests));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer cu_memory, Upload(cu.data(), cu.size() * 4));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer slot_memory, Upload(slots.data(), slots.size() * 4));
    PrefillTensors tensors;
    tensors.cu_seqlens = cu_memory.As<const int32_t>();
    tensors.initial_slots = tensors.final_slots = slot_memory.As<const int32_t>();
    const auto at = [&](int32_t first_token) {
      const auto skip = [&](const DeviceBuffer& from, int32_t heads, size_t row) {
        const size_t bytes = static_cast<size_t>(first_token) * static_cast<size_t>(heads) * row;
        return from.As<std::byte>().Sub(bytes, from.bytes() - bytes);
      };
      tensors.q = {skip(q_.memory, peers.qk_heads, 256), 0};
      tensors.k = {skip(k_.memory, peers.qk_heads, 256), 0};
      tensors.v = {skip(v_.memory, peers.v_heads, 256), 0};
      tensors.out = skip(out_, peers.v_heads, 256);
      const size_t gates = static_cast<size_t>(first_token) * static_cast<size_t>(peers.v_heads);
      tensors.g = g_memory_.As<const float>().Sub(gates, g_.size() - gates);
      tensors.beta = beta_memory_.As<const float>().Sub(gates, beta_.size() - gates);
    };
    double us[2] = {}, error = 0;
    for (const bool slow : {false, true}) {
      PRISTINE_RETURN_IF_ERROR(DrawGates(peers.v_heads, slow));
      PRISTINE_RETURN_IF_ERROR(stream_->Fill(pool->view().states, std::byte{0}));
      PRISTINE_RETURN_IF_ERROR(stream_->Fill(out_.As<std::byte>(), std::byte{0xFF}));
      at(0);
      PRISTINE_RETURN_IF_ERROR(prefill->Run(*stream_, bucket, tensors, pool->view()));
      PRISTINE_ASSIGN_OR_RETURN(const double found, Check(peers, cu, pool->view()));
      error = std::max(error, found);
      const int launches = std::clamp(kMaxTokens / bucket.tokens, 2, 8);
      PRISTINE_ASSIGN_OR_RETURN(us[slow], Time(launches, [&](Stream& stream) -> absl::Status {
                                  for (int l = 0; l < launches; ++l) {
                                    at(l % (kMaxTokens / bucket.tokens) * bucket.tokens);
                                    PRISTINE_RETURN_IF_ERROR(prefill->Run(stream, bucket, tensors, pool->view()));
                                  }
                                  return absl::OkStatus();
                                }));
    }
    const double tokens = bucket.tokens, heads = peers.v_heads;
    const double bytes =
        tokens * (512.0 * peers.qk_heads + (512 + 8) * heads) + 8.0 * requests * heads * kStateElements;
    const double floor = std::max(bytes / kBandwidth, tokens * heads * kFlopPerToken / kFlops) / 1e6;
    std::printf("%2d/%-2d %-12s %8.1f %8.1f %8.1f %6.2f %8.0f %6.2f %8.0f %6.2f %8.0f %6.2f %8.4f\n", peers.qk_heads,
                peers.v_heads, peers.lengths, us[0], us[1], floor, us[0] / floor, peers.fla * 1e3,
                peers.fla * 1e3 / us[0], peers.flash_infer * 1e3, peers.flash_infer * 1e3 / us[0],
                peers.flash_qla * 1e3, peers.flash_qla * 1e3 / us[0], error);
    std::fflush(stdout);
    return absl::OkStatus();
  }

 private:
  double Next() {  // in [-1, 1); xorshift64, since there are hundreds of millions
    seed_ ^= seed_ << 13;
    seed_ ^= seed_ >> 7;
    seed_ ^= seed_ << 17;
    return static_cast<double>(static_cast<int64_t>(seed_)) * 0x1p-63;
  }
  absl::StatusOr<DeviceBuffer> Upload(const void* values, size_t bytes) {
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer memory, device_->Allocate(bytes, "input"));
    PRISTINE_RETURN_IF_ERROR(
        stream_->CopyFromHost(memory.As<std::byte>(), {static_cast<const std::byte*>(values), bytes}));
    PRISTINE_RETURN_IF_ERROR(stream_->Synchronize());
    return memory;
  }
  absl::Status Fill(Array& array, size_t rows, bool normalise) {
    array.values.resize(rows * kHeadDim);
    for (size_t r = 0; r < rows; ++r) {
      float row[kHeadDim], sum = 0;
      for (float& x : row) {
        x = static_cast<float>(Next());
        sum += x * x;
      }
      const float scale = normalise ? 1 / std::sqrt(sum) : 1;
      for (size_t i = 0; i < kHeadDim; ++i) {
        array.values[r * kHeadDim + i] = attention::FromFloat<BFloat16>(row[i] * scale);
      }
    }
    PRISTINE_ASSIGN_OR_RETURN(array.memory, Upload(array.values.data(), array.values.size() * 2));
    return absl::OkStatus();
  }
  absl::Status DrawGates(int32_t heads, bool slow) {
    g_.resize(size_t{kMaxTokens} * kMaxVHeads);
    for (size_t i = 0; i < g_.size(); ++i) {
      const size_t head = i % static_cast<size_t>(heads);
      const double x = Next() * 0.5 + 0.5;
      if (slow) {
        g_[i] = static_cast<float>(std::log(0.9 + 0.1 * x));
      } else {  // A in 1 to 16 over the heads, dt in 0.001 to 0.1, log-uniform
        g_[i] = head % 4 == 0 ? 0.f
                              : static_cast<float>(-(1 + 15.0 * static_cast<double>(head) / heads) * 1e-3 *
                                                   std::exp(x * std::log(100)));
      }
    }
    PRISTINE_ASSIGN_OR_RETURN(g_memory_, Upload(g_.data(), g_.size() * sizeof(float)));
    return absl::OkStatus();
  }

  // The last sequence and head against the recurrence, which starts from zeros; the larger relative RMS error.
  absl::StatusOr<double> Check(const PrefillPeers& peers, const std::vector<int32_t>& cu, const StateView& states) {
    const size_t begin = static_cast<size_t>(cu[cu.size() - 2]);
    const size_t length = static_cast<size_t>(cu.back()) - begin;
    const bool with_state = length <= kCheckedState;
    const size_t tokens = with_state ? length : std::min(length, kCheckedTokens);
    const size_t qk_heads = static_cast<size_t>(peers.qk_heads), heads = static_cast<size_t>(peers.v_heads);
    testing::HeadInputs in;
    in.scale = PrefillConfig().scale;
    for (size_t t = begin; t < begin + tokens; ++t) {
      for (size_t i = 0; i < kHeadDim; ++i) {
        in.q.push_back(attention::ToFloat(q_.values[(t * qk_heads + qk_heads - 1) * kHeadDim + i]));
        in.k.push_back(attention::ToFloat(k_.values[(t * qk_heads + qk_heads - 1) * kHeadDim + i]));
        in.v.push_back(attention::ToFloat(v_.values[(t * heads + heads - 1) * kHeadDim + i]));
      }
      in.g.push_back(g_[t * heads + heads - 1]);
      in.beta.push_back(beta_[t * heads + heads - 1]);
    }
    std::vector<double> state(kStateElements);
    const std::vector<double> expected = testing::RecurrentReference(in, state);
    std::vector<BFloat16> out(tokens * heads * kHeadDim);
    std::vector<float> got_state(kStateElements);
    PRISTINE_RETURN_IF_ERROR(
        stream_->CopyToHost({reinterpret_cast<std::byte*>(out.data()), out.size() * 2},
                            out_.As<const std::byte>().Sub(begin * heads * kHeadDim * 2, out.size() * 2)));
    const size_t state_bytes = kStateElements * sizeof(float);
    PRISTINE_RETURN_IF_ERROR(
        stream_->CopyToHost({reinterpret_cast<std::byte*>(got_state.data()), state_bytes},
                            states.states.Sub((cu.size() * heads - 1) * state_bytes, state_bytes)));
    PRISTINE_RETURN_IF_ERROR(stream_->Synchronize());
    double error = 0, size = 0, state_error = 0, state_size = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double got = attention::ToFloat(out[(i / kHeadDim * heads + heads - 1) * kHeadDim + i % kHeadDim]);
      error += (got - expected[i]) * (got - expected[i]);
      size += expected[i] * expected[i];
    }
    for (size_t i = 0; i < state.size(); ++i) {
      state_error += (got_state[i] - state[i]) * (got_state[i] - state[i]);
      state_size += state[i] * state[i];
    }
    const double result = std::max(std::sqrt(error / size), with_state ? std::sqrt(state_error / state_size) : 0.0);
    if (!(result < 0.005)) {
      return absl::InternalError(absl::StrCat(peers.qk_heads, "/", peers.v_heads, " ", peers.lengths,
                                              " differs from the recurrence by ", result));
    }
    return result;
  }

  // Median time of one of `launches` equal parts of what `body` queues, in us.
  absl::StatusOr<double> Time(int launches, absl::FunctionRef<absl::Status(Stream&)> body) {
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(*stream_, body));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    cudaEvent_t begin, end;
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&begin), "cudaEventCreate"));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&end), "cudaEventCreate"));
    const auto native = static_cast<cudaStream_t>(stream_->native());
    std::vector<double> times;
    for (int i = 0; i < kSamples + 3; ++i) {
      PRISTINE_RETURN_IF_ERROR(exec->Launch(*stream_));  // the GPU is busy when the timed launch arrives
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(begin, native), "cudaEventRecord"));
      PRISTINE_RETURN_IF_ERROR(exec->Launch(*stream_));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(end, native), "cudaEventRecord"));
      PRISTINE_RETURN_IF_ERROR(stream_->Synchronize());
      float ms = 0;
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime"));
      if (i >= 3) times.push_back(ms * 1e3 / launches);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  Array q_, k_, v_;
  std::vector<float> g_, beta_;
  DeviceBuffer g_memory_, beta_memory_, out_;
  uint64_t seed_ = 0x9E3779B97F4A7C15;
};

absl::Status Run(const std::vector<std::string>& wanted) {
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Bench> bench, Bench::Create());
  std::printf("%s, prefill, bfloat16, float32 states, us per launch; floors at %.2f TB/s and %.0f TFLOP/s\n",
              bench->device_name().c_str(), kBandwidth, kFlops);
  std::printf("%-5s %-12s %8s %8s %8s %6s %8s %6s %8s %6s %8s %6s %8s\n", "heads", "lengths", "mixed", "slow", "floor",
              "/floor", "FLA", "faster", "FlashInf", "faster", "FlashQLA", "faster", "rms");
  std::vector<std::string> parts;
  for (const std::string& text : wanted) {
    PrefillPeers own = {};
    int lengths = 0;
    if (std::sscanf(text.c_str(), "%d/%d=%n", &own.qk_heads, &own.v_heads, &lengths) < 2 || lengths == 0) {
      parts.push_back(text);
      continue;
    }
    own.lengths = text.c_str() + lengths;
    PRISTINE_RETURN_IF_ERROR(bench->Row(own));
  }
  if (parts.empty() && !wanted.empty()) return absl::OkStatus();
  for (const PrefillPeers& peers : kPrefillPeers) {
    const std::string name = absl::StrCat(peers.qk_heads, "/", peers.v_heads, " ", peers.lengths);
    const auto names = [&](const std::string& part) { return name.find(part) != std::string::npos; };
    if (!parts.empty() && std::none_of(parts.begin(), parts.end(), names)) continue;
    PRISTINE_RETURN_IF_ERROR(bench->Row(peers));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  if (argc > 1 && argv[1][0] == '-') {
    std::printf(
        "usage: gdn_prefill_benchmark [ROWS...]\nTimes Gated Delta Net prefill on the first GPU, after checking it. "
        "each of ROWS: "
        "a part of the rows' names, such as\n\"16/32\" or \"16/32 1x8192\", or a row without peers, such as "
        "\"16/32=4096+2048+2048\"; default: all the names.\n"
        "Exit: 0 done, 1 a wrong result or an error, 2 usage.\n");
    return argc == 2 && std::string(argv[1]) == "--help" ? 0 : 2;
  }
  const absl::Status status = pristine::benchmarks::Run({argv + 1, argv + argc});
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
