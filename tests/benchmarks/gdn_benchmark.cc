// Gated Delta Net against its floor: decode (in place and gathered), the QKV split and the convolution, inside graphs.
//
// The floor is the traffic that cannot be avoided, divided by what a copy kernel reaches on an H200. A decode reads
// and writes each state once; a split reads and writes each element once. Each graph holds several launches over
// different memory, so that nothing that is timed comes from the L2 cache; figures are per launch. Outputs are compared
// with the Host functions before anything is timed.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/gdn/kernels/causal_conv1d.h"
#include "attention/gdn/kernels/qkv_split.h"
#include "attention/gdn/kernels/recurrent.h"
#include "attention/kernels/bfloat16.h"
#include "pristine/attention/gdn/causal_conv1d.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/attention/gdn/recurrent.h"
#include "pristine/attention/gdn/state_access.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::benchmarks {
namespace {

using attention::BFloat16;
using attention::DType;
using namespace attention::gdn;  // NOLINT(build/namespaces)

constexpr int kLaunches = 10;  // per graph
constexpr int kSamples = 30;
constexpr double kBandwidth = 4.27;  // TB/s, read and written, of a large copy by kernel on an H200
constexpr int32_t kQkHeads = 16;
constexpr int32_t kVHeads = 32;
constexpr int64_t kChannels = 2 * int64_t{kQkHeads} * kHeadDim + int64_t{kVHeads} * kHeadDim;

absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

// Median time of one of `launches` equal parts of what `body` queues, in us.
absl::StatusOr<double> Time(Stream& stream, int launches, absl::FunctionRef<absl::Status(Stream&)> body) {
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(stream, body));
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
  cudaEvent_t begin, end;
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&begin), "cudaEventCreate"));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&end), "cudaEventCreate"));
  const auto native = static_cast<cudaStream_t>(stream.native());
  std::vector<double> times;
  for (int i = 0; i < kSamples + 5; ++i) {
    PRISTINE_RETURN_IF_ERROR(exec->Launch(stream));  // the GPU is busy when the timed launch arrives
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(begin, native), "cudaEventRecord"));
    PRISTINE_RETURN_IF_ERROR(exec->Launch(stream));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(end, native), "cudaEventRecord"));
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    float ms = 0;
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime"));
    if (i >= 5) times.push_back(ms * 1e3 / launches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

absl::StatusOr<DeviceBuffer> Upload(Device& device, Stream& stream, const void* values, size_t bytes) {
  PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer memory, device.Allocate(bytes, "input"));
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(memory.As<std::byte>(), {static_cast<const std::byte*>(values), bytes}));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return memory;
}

// Repeats after a prime number of values: the time on the GPU's machine goes into measuring.
std::vector<BFloat16> Random(size_t count, std::mt19937& random) {
  constexpr size_t kPeriod = 1048573;
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<BFloat16> values(count);
  for (size_t i = 0; i < count; ++i) {
    values[i] = i < kPeriod ? attention::FromFloat<BFloat16>(uniform(random)) : values[i - kPeriod];
  }
  return values;
}

struct DecodeInputs {
  std::vector<BFloat16> mixed, a, b;
  std::vector<float> per_head = std::vector<float>(kVHeads, -0.5f);
  DeviceBuffer mixed_memory, a_memory, b_memory, per_head_memory;

  RecurrentInputs Of(DeviceSpan<const int32_t> indices) const {
    const auto part = [&](int64_t first) -> Rows {
      const DeviceSpan<const std::byte> all = mixed_memory.As<const std::byte>();
      const size_t skip = static_cast<size_t>(first) * sizeof(BFloat16);
      return {all.Sub(skip, all.size() - skip), kChannels};
    };
    return {.qk_heads = kQkHeads,
            .q = part(0),
            .k = part(int64_t{kQkHeads} * kHeadDim),
            .v = part(2 * int64_t{kQkHeads} * kHeadDim),
            .gates = {DType::kBFloat16,
                      kVHeads,
                      {a_memory.As<const std::byte>(), 0},
                      {b_memory.As<const std::byte>(), 0},
                      per_head_memory.As<const float>(),
                      per_head_memory.As<const float>()},
            .cache_indices = indices};
  }
};

absl::StatusOr<DecodeInputs> MakeInputs(Device& device, Stream& stream, int32_t rows, std::mt19937& random) {
  DecodeInputs inputs;
  inputs.mixed = Random(static_cast<size_t>(rows) * kChannels, random);
  inputs.a = Random(static_cast<size_t>(rows) * kVHeads, random);
  inputs.b = Random(static_cast<size_t>(rows) * kVHeads, random);
  const auto upload = [&](DeviceBuffer& to, const auto& values) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(to, Upload(device, stream, values.data(), values.size() * sizeof(values[0])));
    return absl::OkStatus();
  };
  PRISTINE_RETURN_IF_ERROR(upload(inputs.mixed_memory, inputs.mixed));
  PRISTINE_RETURN_IF_ERROR(upload(inputs.a_memory, inputs.a));
  PRISTINE_RETURN_IF_ERROR(upload(inputs.b_memory, inputs.b));
  PRISTINE_RETURN_IF_ERROR(upload(inputs.per_head_memory, inputs.per_head));
  return inputs;
}

// Two requests on zero states, against the Host function: the second decode of the same token sees what the first left.
absl::Status CheckDecode(Device& device, Stream& stream, const DecodeInputs& inputs, DType state_dtype) {
  constexpr int32_t kRows = 2;
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<StatePool> pool,
                            StatePool::Create(device, state_dtype, kVHeads, kRows));
  const int32_t indices[kRows] = {2, 1};
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer slots, Upload(device, stream, indices, sizeof(indices)));
  constexpr size_t kOut = size_t{kRows} * kVHeads * kHeadDim;
  PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out, device.Allocate(kOut * sizeof(BFloat16), "out"));
  for (int i = 0; i < 2; ++i) {
    PRISTINE_RETURN_IF_ERROR(
        Decode(stream, kRows, inputs.Of(slots.As<const int32_t>()), pool->view(), out.As<std::byte>()));
  }
  std::vector<BFloat16> got(kOut), expected(kOut);
  PRISTINE_RETURN_IF_ERROR(stream.CopyToHost({reinterpret_cast<std::byte*>(got.data()), kOut * sizeof(BFloat16)},
                                             out.As<const std::byte>()));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  std::vector<std::byte> states(pool->view().states.size());
  RecurrentParams host = {};
  host.q = inputs.mixed.data();
  host.k = inputs.mixed.data() + kQkHeads * kHeadDim;
  host.v = inputs.mixed.data() + 2 * kQkHeads * kHeadDim;
  host.q_stride = host.k_stride = host.v_stride = kChannels;
  host.gates = {inputs.a.data(),
                inputs.b.data(),
                inputs.per_head.data(),
                inputs.per_head.data(),
                nullptr,
                nullptr,
                kVHeads,
                kVHeads,
                kRows,
                kVHeads,
                DType::kBFloat16};
  host.out = expected.data();
  host.states = states.data();
  host.cache_indices = indices;
  host.slot_stride = pool->view().slot_stride;
  host.slots = pool->view().slots;
  host.rows = kRows;
  host.tokens = 1;
  host.qk_heads = kQkHeads;
  host.v_heads = kVHeads;
  host.scale = RecurrentInputs().scale;
  host.state_dtype = state_dtype;
  host.store = true;
  RecurrentHost(host);
  RecurrentHost(host);
  double error = 0, size = 0;
  for (size_t i = 0; i < kOut; ++i) {
    const double e = ToFloat(expected[i]), g = ToFloat(got[i]);
    error += (e - g) * (e - g);
    size += e * e;
  }
  if (!(std::sqrt(error / size) < 5e-3)) {
    return absl::InternalError(absl::StrCat("decode differs from the Host function by ", std::sqrt(error / size)));
  }
  return absl::OkStatus();
}

absl::Status BenchDecode(Device& device, Stream& stream) {
  // FLA (Triton) on this card with float32 states, published with the project's targets.
  constexpr double kFla[] = {2.9, 10.2, 36.0, 67.9, 131, 258};
  constexpr int32_t kBatches[] = {1, 8, 32, 64, 128, 256};
  std::mt19937 random(1);
  std::printf("\ndecode, %d/%d heads, bfloat16 in and out, us per launch\n", kQkHeads, kVHeads);
  std::printf("%-10s %6s %9s %9s %9s %9s\n", "state", "batch", "ours", "floor", "ours/fl.", "FLA fp32");
  for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
    PRISTINE_ASSIGN_OR_RETURN(const DecodeInputs two, MakeInputs(device, stream, 2, random));
    PRISTINE_RETURN_IF_ERROR(CheckDecode(device, stream, two, state));
    for (size_t i = 0; i < std::size(kBatches); ++i) {
      const int32_t rows = kBatches[i];
      const int32_t slots = std::max(rows, 128) * (rows >= 128 ? 2 : 1) * 2;  // at least 256 MB of states
      PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<StatePool> pool,
                                StatePool::Create(device, state, kVHeads, slots));
      PRISTINE_ASSIGN_OR_RETURN(const DecodeInputs inputs, MakeInputs(device, stream, rows, random));
      const int launches = std::max(kLaunches, 128 / rows);  // over 128 MB of states and more
      std::vector<int32_t> indices(static_cast<size_t>(launches) * rows);
      for (size_t j = 0; j < indices.size(); ++j) indices[j] = 1 + static_cast<int32_t>(j) % slots;
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer index_memory,
                                Upload(device, stream, indices.data(), indices.size() * sizeof(int32_t)));
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out,
                                device.Allocate(size_t(rows) * kVHeads * kHeadDim * sizeof(BFloat16), "out"));
      PRISTINE_ASSIGN_OR_RETURN(
          const double us, Time(stream, launches, [&](Stream& s) -> absl::Status {
            for (int l = 0; l < launches; ++l) {
              const auto at = index_memory.As<const int32_t>().Sub(static_cast<size_t>(l) * rows, rows);
              PRISTINE_RETURN_IF_ERROR(Decode(s, rows, inputs.Of(at), pool->view(), out.As<std::byte>()));
            }
            return absl::OkStatus();
          }));
      const double bytes = 2.0 * rows * kVHeads * kStateElements * static_cast<double>(SizeOf(state));
      const double floor = bytes / kBandwidth / 1e6;
      std::printf("%-10s %6d %9.2f %9.2f %9.2f ", ToString(state), rows, us, floor, us / floor);
      if (state == DType::kFloat32) {
        std::printf("%9.1f\n", kFla[i]);
      } else {
        std::printf("%9s\n", "-");
      }
    }
  }
  return absl::OkStatus();
}

// Decode in place against gather, decode, scatter (state_access.h). Checked first: the same bits.
absl::Status BenchAccess(Device& device, Stream& stream) {
  std::mt19937 random(3);
  std::printf("\ndecode, access to the states, us per launch\n");
  std::printf("%-10s %6s %9s %16s\n", "state", "batch", "in place", "gather, scatter");
  for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
    for (const int32_t rows : {1, 32, 256}) {
      const int32_t slots = 512;
      const int launches = std::min(10, slots / rows);
      PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<StatePool> pool,
                                StatePool::Create(device, state, kVHeads, slots));
      PRISTINE_ASSIGN_OR_RETURN(const DecodeInputs inputs, MakeInputs(device, stream, rows, random));
      std::vector<int32_t> indices(static_cast<size_t>(launches) * rows);
      for (size_t j = 0; j < indices.size(); ++j) indices[j] = 1 + static_cast<int32_t>(j * 7) % slots;
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer index_memory,
                                Upload(device, stream, indices.data(), indices.size() * sizeof(int32_t)));
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer own, device.Allocate(size_t(rows) * sizeof(int32_t), "own indices"));
      const size_t state_bytes = size_t{kVHeads} * kStateElements * SizeOf(state);
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer gathered, device.Allocate(rows * state_bytes, "gathered"));
      const StateView view = {
          state, kVHeads, rows, kVHeads * kStateElements, gathered.As<std::byte>(), PaddedRows::kSkip};
      const size_t out_bytes = size_t(rows) * kVHeads * kHeadDim * sizeof(BFloat16);
      PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out, device.Allocate(out_bytes, "out"));
      const auto at = [&](int l) { return index_memory.As<const int32_t>().Sub(static_cast<size_t>(l) * rows, rows); };
      const auto in_place = [&](Stream& s, int l) {
        return Decode(s, rows, inputs.Of(at(l)), pool->view(), out.As<std::byte>());
      };
      const auto by_gather = [&](Stream& s, int l) -> absl::Status {
        PRISTINE_RETURN_IF_ERROR(GatherStates(s, rows, at(l), pool->view(), view, own.As<int32_t>()));
        PRISTINE_RETURN_IF_ERROR(Decode(s, rows, inputs.Of(own.As<const int32_t>()), view, out.As<std::byte>()));
        return ScatterStates(s, rows, at(l), view, pool->view());
      };
      std::vector<std::byte> results[2];
      for (int way = 0; way < 2; ++way) {
        PRISTINE_RETURN_IF_ERROR(stream.Fill(pool->view().states, std::byte{0}));
        for (int i = 0; i < 2; ++i) PRISTINE_RETURN_IF_ERROR(way == 0 ? in_place(stream, 0) : by_gather(stream, 0));
        results[way].resize(out_bytes);
        PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(results[way]), out.As<const std::byte>()));
        PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
      }
      if (results[0] != results[1]) return absl::InternalError("the two ways to the states give different outputs");
      const auto time = [&](const auto& way) {
        return Time(stream, launches, [&](Stream& s) -> absl::Status {
          for (int l = 0; l < launches; ++l) PRISTINE_RETURN_IF_ERROR(way(s, l));
          return absl::OkStatus();
        });
      };
      PRISTINE_ASSIGN_OR_RETURN(const double own_us, time(in_place));
      PRISTINE_ASSIGN_OR_RETURN(const double gather_us, time(by_gather));
      std::printf("%-10s %6d %9.2f %16.2f\n", ToString(state), rows, own_us, gather_us);
    }
  }
  return absl::OkStatus();
}

absl::Status BenchConv(Device& device, Stream& stream) {
  std::mt19937 random(4);
  std::printf("\nconvolution of width 4 with silu, bfloat16, 8 requests\n");
  std::printf("%-26s %6s %6s %9s %9s %9s\n", "output", "T", "dim", "us", "floor us", "us/floor");
  const auto bench = [&](int32_t tokens, int32_t dim, bool fused) -> absl::Status {
    constexpr int32_t kRequests = 8, kHeads = 32;
    const size_t count = size_t(tokens) * dim;
    const std::vector<BFloat16> x = Random(count, random), weight = Random(size_t{4} * dim, random),
                                a = Random(size_t(tokens) * kHeads, random);
    const std::vector<float> per_head(kHeads, -0.5f);
    std::vector<int32_t> cu, slots;
    for (int32_t r = 0; r <= kRequests; ++r) {
      cu.push_back(static_cast<int32_t>(int64_t{tokens} * r / kRequests));
      slots.push_back(r + 1);
    }
    const auto upload = [&](const auto& values) {
      return Upload(device, stream, values.data(), values.size() * sizeof(values[0]));
    };
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer x_memory, upload(x));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer weight_memory, upload(weight));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer a_memory, upload(a));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer head_memory, upload(per_head));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer cu_memory, upload(cu));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer slot_memory, upload(slots));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out, device.Allocate(count * sizeof(BFloat16), "out"));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer gates, device.Allocate(a.size() * 2 * sizeof(float), "gates"));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<StatePool> pool,
                              StatePool::Create(device, DType::kFloat32, 1, kRequests, {.conv_dim = dim}));
    const DeviceSpan<std::byte> all = out.As<std::byte>();
    const size_t q_bytes = size_t(tokens) * 2048 * sizeof(BFloat16);
    ConvOutputs outputs;
    if (fused) {
      outputs.q_dim = outputs.k_dim = 2048;
      outputs.v_dim = dim - 4096;
      outputs.q = all.Sub(0, q_bytes);
      outputs.k = all.Sub(q_bytes, q_bytes);
      outputs.v = all.Sub(2 * q_bytes, all.size() - 2 * q_bytes);
      outputs.norm_head_dim = 128;
      outputs.gates = {DType::kBFloat16,
                       kHeads,
                       {a_memory.As<const std::byte>(), 0},
                       {a_memory.As<const std::byte>(), 0},
                       head_memory.As<const float>(),
                       head_memory.As<const float>()};
      outputs.g = gates.As<float>().Sub(0, a.size());
      outputs.beta = gates.As<float>().Sub(a.size(), a.size());
    } else {
      outputs.out = all;
    }
    const ConvInputs inputs = {.x = {x_memory.As<const std::byte>(), 0},
                               .weight = weight_memory.As<const std::byte>(),
                               .cache_indices = slot_memory.As<const int32_t>()};
    const auto run = [&](Stream& s) {
      return CausalConv1d(s, tokens, {kRequests, cu_memory.As<const int32_t>(), {}}, inputs, pool->conv_view(),
                          outputs);
    };
    PRISTINE_RETURN_IF_ERROR(run(stream));
    std::vector<BFloat16> got(count);
    PRISTINE_RETURN_IF_ERROR(
        stream.CopyToHost({reinterpret_cast<std::byte*>(got.data()), count * sizeof(BFloat16)}, all));
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    // The first request's tokens.
    const int32_t checked = cu[1], dims[3] = {fused ? 2048 : dim, fused ? 2048 : 0, fused ? dim - 4096 : 0};
    std::vector<BFloat16> expected(size_t(checked) * dim), states(size_t{2} * dim * 3);
    CausalConv1dParams host = {};
    host.x = x.data();
    host.weight = weight.data();
    host.states = states.data();
    host.cache_indices = slots.data();
    host.cu_seqlens = cu.data();
    for (int32_t i = 0, first = 0; i < (fused ? 3 : 1); first += dims[i++]) {
      host.out[i] = expected.data() + size_t(checked) * first;
      host.out_dim[i] = dims[i];
    }
    host.norm_head_dim = outputs.norm_head_dim;
    host.x_stride = dim;
    host.slot_stride = int64_t{3} * dim;
    host.tokens = checked;
    host.dim = dim;
    host.slots = 2;
    host.requests = 1;
    host.dtype = DType::kBFloat16;
    CausalConv1dHost(host);
    for (int32_t i = 0, first = 0; i < 3; first += dims[i++]) {
      for (size_t j = 0; j < size_t(checked) * dims[i]; ++j) {
        const double e = ToFloat(expected[size_t(checked) * first + j]), g = ToFloat(got[size_t(tokens) * first + j]);
        if (!(std::abs(e - g) <= 1.2e-2 * std::abs(e) + 1e-6)) {
          return absl::InternalError(absl::StrCat("convolution differs from the Host function at element ", j));
        }
      }
    }
    PRISTINE_ASSIGN_OR_RETURN(const double us, Time(stream, kLaunches, [&](Stream& s) -> absl::Status {
                                for (int l = 0; l < kLaunches; ++l) PRISTINE_RETURN_IF_ERROR(run(s));
                                return absl::OkStatus();
                              }));
    const double floor = 2.0 * static_cast<double>(count) * sizeof(BFloat16) / kBandwidth / 1e6;
    std::printf("%-26s %6d %6d %9.2f %9.2f %9.2f\n", fused ? "q, k, v, norm and gates" : "token-major", tokens, dim, us,
                floor, us / floor);
    return absl::OkStatus();
  };
  for (const int32_t tokens : {8192, 8191}) {
    for (const int32_t dim : {6144, 8192, 12288}) {
      for (const bool fused : {false, true}) PRISTINE_RETURN_IF_ERROR(bench(tokens, dim, fused));
    }
  }
  return absl::OkStatus();
}

absl::Status BenchSplit(Device& device, Stream& stream) {
  std::mt19937 random(2);
  std::printf("\nQKV split, bfloat16, q and k 2048 channels each\n");
  std::printf("%-12s %6s %6s %6s %9s %9s %9s\n", "input", "norm", "T", "dim", "us", "floor us", "of copy");
  const auto bench = [&](int32_t tokens, int32_t dim, bool transposed, int32_t norm) -> absl::Status {
    const size_t count = size_t(tokens) * dim;
    const std::vector<BFloat16> values = Random(count, random);
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer mixed,
                              Upload(device, stream, values.data(), count * sizeof(BFloat16)));
    PRISTINE_ASSIGN_OR_RETURN(const DeviceBuffer out, device.Allocate(count * sizeof(BFloat16) + 64, "out"));
    QkvSplitTensors tensors;
    tensors.q_dim = tensors.k_dim = 2048;
    tensors.v_dim = dim - 4096;
    tensors.mixed = mixed.As<const std::byte>();
    tensors.stride_t = transposed ? 1 : dim;
    tensors.stride_d = transposed ? tokens : 1;
    tensors.norm_head_dim = norm;
    const size_t q_bytes = size_t(tokens) * 2048 * sizeof(BFloat16);
    const DeviceSpan<std::byte> all = out.As<std::byte>();
    tensors.q = all.Sub(0, q_bytes);
    tensors.k = all.Sub(q_bytes, q_bytes);
    tensors.v = all.Sub(2 * q_bytes, count * sizeof(BFloat16) - 2 * q_bytes);
    PRISTINE_RETURN_IF_ERROR(QkvSplit(stream, tokens, tensors));
    std::vector<BFloat16> got(count), expected(count);
    PRISTINE_RETURN_IF_ERROR(stream.CopyToHost({reinterpret_cast<std::byte*>(got.data()), count * sizeof(BFloat16)},
                                               all.Sub(0, count * sizeof(BFloat16))));
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    QkvSplitParams host = {};
    host.mixed = values.data();
    host.out[0] = expected.data();
    host.out[1] = expected.data() + size_t(tokens) * 2048;
    host.out[2] = expected.data() + size_t(tokens) * 4096;
    host.dim[0] = host.dim[1] = 2048;
    host.dim[2] = dim - 4096;
    host.dtype = DType::kBFloat16;
    host.stride_t = tensors.stride_t;
    host.stride_d = tensors.stride_d;
    host.tokens = tokens;
    host.norm_head_dim = norm;
    QkvSplitHost(host);
    for (size_t i = 0; i < count; ++i) {
      const double e = ToFloat(expected[i]), g = ToFloat(got[i]);
      if (norm == 0 ? std::memcmp(&expected[i], &got[i], sizeof(BFloat16)) != 0
                    : !(std::abs(e - g) <= 8e-3 * std::abs(e))) {
        return absl::InternalError(absl::StrCat("split differs from the Host function at element ", i));
      }
    }
    PRISTINE_ASSIGN_OR_RETURN(const double us, Time(stream, kLaunches, [&](Stream& s) -> absl::Status {
                                for (int l = 0; l < kLaunches; ++l) {
                                  PRISTINE_RETURN_IF_ERROR(QkvSplit(s, tokens, tensors));
                                }
                                return absl::OkStatus();
                              }));
    const double floor = 2.0 * static_cast<double>(count) * sizeof(BFloat16) / kBandwidth / 1e6;
    std::printf("%-12s %6s %6d %6d %9.2f %9.2f %9.2f\n", transposed ? "transposed" : "contiguous",
                norm == 0 ? "-" : "q, k", tokens, dim, us, floor, floor / us);
    return absl::OkStatus();
  };
  for (const int32_t tokens : {8192, 8191}) {
    for (const int32_t dim : {6144, 8192, 12288}) {
      for (const bool transposed : {false, true}) PRISTINE_RETURN_IF_ERROR(bench(tokens, dim, transposed, 0));
    }
  }
  PRISTINE_RETURN_IF_ERROR(bench(8192, 8192, false, 128));
  return bench(8192, 8192, true, 128);
}

absl::Status Run() {
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Device> device, CreateCudaDevice(0));
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device->CreateStream());
  std::printf("%s, floors at %.2f TB/s\n", device->name().c_str(), kBandwidth);
  // One that fails does not cost the figures of the others.
  absl::Status status = BenchDecode(*device, *stream);
  status.Update(BenchSplit(*device, *stream));
  status.Update(BenchConv(*device, *stream));
  status.Update(BenchAccess(*device, *stream));
  return status;
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  if (argc > 1) {
    std::printf(
        "usage: gdn_benchmark\nTimes Gated Delta Net decode and the QKV split on the first GPU, after checking them.\n"
        "Exit: 0 done, 1 a wrong result or an error, 2 usage.\n");
    return std::string(argv[1]) == "--help" ? 0 : 2;
  }
  const absl::Status status = pristine::benchmarks::Run();
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
