// How fast PagedPrefill is, in TFLOP/s and, where few queries meet a long cache, in bytes of K and V read once.
//
// Pages hold 16 tokens and are scattered. A graph holds eight launches; graphs are queued one after the other, and a
// sample is the time between an event before and one after a graph, over its launches. Before anything is timed,
// sampled heads of what the graph wrote are compared with the definition in double. FLOPs are 4 * q_heads * head_dim
// for each query and position it attends, with half of the square counted where a query meets its own chunk (4 * B * H
// * S^2 * D / 2 for a whole prompt), as those who measured the peers count.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/float16.h"
#include "attention/kernels/float8.h"
#include "attention/prefill_variants.h"
#include "pristine/attention/paged_prefill.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/arguments.h"

namespace pristine::benchmarks {
namespace {

using attention::DType;
using attention::PagedPrefill;
using attention::PrefillVariant;

constexpr int32_t kPageSize = 16;
constexpr int kLaunches = 8;  // of a graph
constexpr int kCheckedHeads = 24;
constexpr float kKScale = 0.5f, kVScale = 2.0f;  // of float8 KV

struct Options {
  int device = 0;
  int samples = 20;
  bool variants = false;  // every variant that the device can run, not only the one it gets
  bool json = false;
};

struct Cell {
  const char* name;
  DType dtype, kv_dtype;
  int32_t requests, qo_len, length;  // qo_len < 0: request r has 1 + r % -qo_len queries
  int32_t q_heads, kv_heads, head_dim;
  double flash, cudnn;  // TFLOP/s of PyTorch's SDPA on contiguous K and V, where measured

  int32_t QoLen(int32_t request) const { return qo_len > 0 ? qo_len : 1 + request % -qo_len; }
  int64_t pages() const { return int64_t{requests} * ((length + kPageSize - 1) / kPageSize); }
};

constexpr DType kBf16 = DType::kBFloat16, kF16 = DType::kFloat16, kF8 = DType::kFloat8E4M3;
constexpr Cell kCells[] = {
    {"prompt 1 x 4K", kBf16, kBf16, 1, 4096, 4096, 32, 8, 128, 273, 525},
    {"prompt 1 x 16K", kBf16, kBf16, 1, 16384, 16384, 32, 8, 128, 333, 571},
    {"prompt 8 x 4K", kBf16, kBf16, 8, 4096, 4096, 32, 8, 128, 321, 531},
    {"prompt 16 x 1K", kBf16, kBf16, 16, 1024, 1024, 32, 8, 128, 266, 474},
    {"prompt 8 x 4K", kF16, kF16, 8, 4096, 4096, 32, 8, 128, 0, 0},
    {"prompt 8 x 4K", kBf16, kF8, 8, 4096, 4096, 32, 8, 128, 0, 0},
    {"prompt 8 x 4K", kBf16, kBf16, 8, 4096, 4096, 32, 8, 64, 0, 0},
    {"prompt 8 x 4K", kBf16, kBf16, 8, 4096, 4096, 16, 4, 256, 0, 0},
    {"chunk 1 x 2K of 16K", kBf16, kBf16, 1, 2048, 16384, 32, 8, 128, 0, 0},
    {"draft 64 x 1...8 of 4K", kBf16, kBf16, 64, -8, 4096, 32, 8, 128, 0, 0},
    {"draft 64 x 1...8 of 4K", kBf16, kF8, 64, -8, 4096, 32, 8, 128, 0, 0},
    {"draft 8 x 1...8 of 4K", kBf16, kBf16, 8, -8, 4096, 32, 8, 128, 0, 0},
};

absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

void Encode(float value, DType dtype, std::byte* to) {
  if (dtype == kF16) {
    const attention::Float16 narrow = attention::FromFloat<attention::Float16>(value);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else if (dtype == kBf16) {
    const attention::BFloat16 narrow = attention::FromFloat<attention::BFloat16>(value);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    const attention::Float8E4M3 narrow = attention::FromFloat<attention::Float8E4M3>(value);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}
float Decode(const std::byte* from, DType dtype) {
  uint16_t bits = 0;
  std::memcpy(&bits, from, dtype == kF8 ? 1 : 2);
  if (dtype == kF16) return attention::ToFloat(attention::Float16{bits});
  if (dtype == kBf16) return attention::ToFloat(attention::BFloat16{bits});
  return attention::ToFloat(attention::Float8E4M3{static_cast<uint8_t>(bits)});
}

// A device tensor that repeats a block of random values; its odd size lets no two heads or pages be alike.
class RandomTensor {
 public:
  static absl::StatusOr<RandomTensor> Create(Device& device, Stream& stream, int64_t elements, DType dtype, int seed) {
    RandomTensor tensor;
    tensor.dtype_ = dtype;
    const size_t element = attention::SizeOf(dtype), size = static_cast<size_t>(elements) * element;
    tensor.block_.resize(std::min(size, (size_t{4} << 20) - 272));
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<float> value(-1.7f, 1.7f);
    for (size_t at = 0; at < tensor.block_.size(); at += element) Encode(value(random), dtype, &tensor.block_[at]);
    PRISTINE_ASSIGN_OR_RETURN(tensor.memory_, device.Allocate(size, "random"));
    const DeviceSpan<std::byte> all = tensor.memory_.As<std::byte>();
    for (size_t at = 0; at < size; at += tensor.block_.size()) {
      const size_t count = std::min(tensor.block_.size(), size - at);
      PRISTINE_RETURN_IF_ERROR(
          stream.CopyFromHost(all.Sub(at, count), absl::MakeConstSpan(tensor.block_).first(count)));
    }
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    return tensor;
  }
  DeviceSpan<const std::byte> span() const { return memory_.As<const std::byte>(); }
  float At(int64_t element) const {
    const size_t byte = static_cast<size_t>(element) * attention::SizeOf(dtype_);
    return Decode(&block_[byte % block_.size()], dtype_);
  }

 private:
  DType dtype_ = kBf16;
  std::vector<std::byte> block_;
  DeviceBuffer memory_;
};

class Workload {
 public:
  static absl::StatusOr<std::unique_ptr<Workload>> Create(Device& device, Stream& stream, const Cell& cell,
                                                          const PrefillVariant* variant) {
    std::unique_ptr<Workload> work(new Workload(stream, cell));
    for (int32_t r = 0; r < cell.requests; ++r) {
      work->qo_indptr_.push_back(work->qo_indptr_.back() + cell.QoLen(r));
      work->kv_indptr_.push_back(static_cast<int32_t>(cell.pages() / cell.requests * (r + 1)));
    }
    work->kv_indices_.resize(cell.pages());
    std::iota(work->kv_indices_.begin(), work->kv_indices_.end(), 0);
    std::shuffle(work->kv_indices_.begin(), work->kv_indices_.end(), std::mt19937_64(1));
    const std::vector<int32_t> lengths(cell.requests, cell.length);

    const attention::PagedPrefillConfig config = {.q_heads = cell.q_heads,
                                                  .kv_heads = cell.kv_heads,
                                                  .head_dim = cell.head_dim,
                                                  .dtype = cell.dtype,
                                                  .kv_dtype = cell.kv_dtype,
                                                  .page_size = kPageSize,
                                                  .scale = work->Scale()};
    PRISTINE_ASSIGN_OR_RETURN(work->prefill_, variant == nullptr ? PagedPrefill::Create(device, config)
                                                                 : PagedPrefill::Create(device, config, *variant));
    const int64_t heads = int64_t{work->tokens()} * cell.q_heads;
    const int64_t pool = cell.pages() * kPageSize * cell.kv_heads * cell.head_dim;
    PRISTINE_ASSIGN_OR_RETURN(work->q_, RandomTensor::Create(device, stream, heads * cell.head_dim, cell.dtype, 1));
    PRISTINE_ASSIGN_OR_RETURN(work->k_, RandomTensor::Create(device, stream, pool, cell.kv_dtype, 2));
    PRISTINE_ASSIGN_OR_RETURN(work->v_, RandomTensor::Create(device, stream, pool, cell.kv_dtype, 3));
    PRISTINE_ASSIGN_OR_RETURN(work->out_, device.Allocate(work->q_.span().size(), "out"));
    PRISTINE_ASSIGN_OR_RETURN(work->lse_, device.Allocate(heads * 4, "lse"));
    attention::PrefillTensors& t = work->tensors_;
    t = {.q = work->q_.span(),
         .k = work->k_.span(),
         .v = work->v_.span(),
         .out = work->out_.As<std::byte>(),
         .lse = work->lse_.As<attention::LseBase2>()};
    PRISTINE_RETURN_IF_ERROR(work->Put(device, work->qo_indptr_, t.qo_indptr));
    PRISTINE_RETURN_IF_ERROR(work->Put(device, work->kv_indptr_, t.kv_indptr));
    PRISTINE_RETURN_IF_ERROR(work->Put(device, work->kv_indices_, t.kv_indices));
    PRISTINE_RETURN_IF_ERROR(work->Put(device, lengths, t.lengths));
    if (cell.kv_dtype == kF8) {
      PRISTINE_RETURN_IF_ERROR(work->Put(device, std::vector<float>{kKScale}, t.k_scale));
      PRISTINE_RETURN_IF_ERROR(work->Put(device, std::vector<float>{kVScale}, t.v_scale));
    }
    PRISTINE_RETURN_IF_ERROR(stream.Fill(work->out_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(work->Run(stream));  // a first launch loads the kernel, which a capture need not survive
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(stream, [&](Stream& capturing) {
                                for (int i = 0; i < kLaunches; ++i) PRISTINE_RETURN_IF_ERROR(work->Run(capturing));
                                return absl::OkStatus();
                              }));
    PRISTINE_ASSIGN_OR_RETURN(work->exec_, graph->Instantiate());
    return work;
  }

  // Compares heads of the first and last query and of some between with the definition.
  absl::Status Check() {
    PRISTINE_RETURN_IF_ERROR(exec_->Launch(stream_));
    std::vector<std::byte> out(out_.As<std::byte>().size());
    std::vector<float> lse(lse_.As<float>().size());
    PRISTINE_RETURN_IF_ERROR(stream_.CopyToHost(absl::MakeSpan(out), out_.As<const std::byte>()));
    PRISTINE_RETURN_IF_ERROR(
        stream_.CopyToHost({reinterpret_cast<std::byte*>(lse.data()), lse.size() * 4}, lse_.As<const std::byte>()));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    std::mt19937_64 random(4);
    for (int i = 0; i < kCheckedHeads; ++i) {
      const int32_t token = i == 0 ? 0 : i == 1 ? tokens() - 1 : static_cast<int32_t>(random() % tokens());
      const int32_t head = static_cast<int32_t>(random() % cell_.q_heads);
      const int64_t place = int64_t{token} * cell_.q_heads + head;
      double expected_lse = 0;
      const std::vector<double> expected = Expected(token, head, expected_lse);
      double error = 0, norm = 0;
      for (int32_t d = 0; d < cell_.head_dim; ++d) {
        const size_t element = attention::SizeOf(cell_.dtype);
        const double actual = Decode(&out[(place * cell_.head_dim + d) * element], cell_.dtype);
        error += (actual - expected[d]) * (actual - expected[d]);
        norm += expected[d] * expected[d];
      }
      const double tolerance = cell_.dtype == kF16 && cell_.kv_dtype == kF16 ? 2e-3 : 8e-3;
      // Written so that NaN does not pass.
      if (!(std::sqrt(error / norm) <= tolerance) || !(std::abs(lse[place] - expected_lse) <= 1e-3)) {
        return absl::DataLossError(absl::StrCat(cell_.name, ": token ", token, ", head ", head, ": relative RMS ",
                                                std::sqrt(error / norm), ", LSE ", lse[place], ", expected ",
                                                expected_lse));
      }
    }
    return absl::OkStatus();
  }

  // Median microseconds of a launch.
  absl::StatusOr<double> Time(int samples) {
    const cudaStream_t native = static_cast<cudaStream_t>(stream_.native());
    std::vector<cudaEvent_t> events(samples + 2);
    for (cudaEvent_t& event : events) PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventCreate(&event), "cudaEventCreate"));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(events[0], native), "cudaEventRecord"));
    for (size_t i = 1; i < events.size(); ++i) {
      PRISTINE_RETURN_IF_ERROR(exec_->Launch(stream_));
      PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventRecord(events[i], native), "cudaEventRecord"));
    }
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    std::vector<double> times;
    for (size_t i = 1; i + 1 < events.size(); ++i) {  // the first graph is not counted
      float milliseconds = 0;
      PRISTINE_RETURN_IF_ERROR(
          Cuda(cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]), "cudaEventElapsedTime"));
      times.push_back(1000.0 * milliseconds / kLaunches);
    }
    for (cudaEvent_t event : events) PRISTINE_RETURN_IF_ERROR(Cuda(cudaEventDestroy(event), "cudaEventDestroy"));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  double flops() const {
    double pairs = 0;
    for (int32_t r = 0; r < cell_.requests; ++r) {
      const double queries = cell_.QoLen(r);
      pairs += queries * (cell_.length - queries) + queries * queries / 2;
    }
    return 4 * pairs * cell_.q_heads * cell_.head_dim;
  }
  double kv_bytes() const {
    return 2.0 * cell_.requests * cell_.length * cell_.kv_heads * cell_.head_dim * attention::SizeOf(cell_.kv_dtype);
  }
  const char* kernel_name() const { return prefill_->kernel_name(); }

 private:
  Workload(Stream& stream, const Cell& cell) : stream_(stream), cell_(cell) {}
  int32_t tokens() const { return qo_indptr_.back(); }
  float Scale() const { return 1 / std::sqrt(static_cast<float>(cell_.head_dim)); }
  absl::Status Run(Stream& stream) { return prefill_->Run(stream, {cell_.requests, tokens()}, tensors_); }

  template <class T>
  absl::Status Put(Device& device, const std::vector<T>& values, DeviceSpan<const T>& span) {
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer buffer, device.Allocate(values.size() * sizeof(T), "array"));
    PRISTINE_RETURN_IF_ERROR(stream_.CopyFromHost(
        buffer.As<std::byte>(), {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)}));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    span = buffer.As<const T>();
    arrays_.push_back(std::move(buffer));
    return absl::OkStatus();
  }

  std::vector<double> Expected(int32_t token, int32_t head, double& lse) const {
    const int32_t r =
        static_cast<int32_t>(std::upper_bound(qo_indptr_.begin(), qo_indptr_.end(), token) - qo_indptr_.begin()) - 1;
    const int32_t position = cell_.length - qo_indptr_[r + 1] + token, dim = cell_.head_dim;
    const bool scaled = cell_.kv_dtype == kF8;
    const auto element = [&](int32_t p) {
      const int64_t slot = int64_t{kv_indices_[kv_indptr_[r] + p / kPageSize]} * kPageSize + p % kPageSize;
      return (slot * cell_.kv_heads + head / (cell_.q_heads / cell_.kv_heads)) * dim;
    };
    std::vector<double> weights(position + 1), out(dim, 0.0);
    for (int32_t p = 0; p <= position; ++p) {
      double score = 0;
      for (int32_t d = 0; d < dim; ++d) {
        score += double{q_.At((int64_t{token} * cell_.q_heads + head) * dim + d)} * k_.At(element(p) + d);
      }
      weights[p] = score * Scale() * (scaled ? kKScale : 1.0f);
    }
    const double top = *std::max_element(weights.begin(), weights.end());
    double mass = 0;
    for (double& weight : weights) mass += weight = std::exp(weight - top);
    for (int32_t p = 0; p <= position; ++p) {
      for (int32_t d = 0; d < dim; ++d) out[d] += weights[p] / mass * v_.At(element(p) + d) * (scaled ? kVScale : 1.0f);
    }
    lse = (top + std::log(mass)) / std::log(2.0);
    return out;
  }

  Stream& stream_;
  const Cell cell_;
  std::vector<int32_t> qo_indptr_ = {0}, kv_indptr_ = {0}, kv_indices_;
  RandomTensor q_, k_, v_;
  DeviceBuffer out_, lse_;
  std::vector<DeviceBuffer> arrays_;
  attention::PrefillTensors tensors_;
  std::unique_ptr<PagedPrefill> prefill_;
  std::unique_ptr<GraphExec> exec_;
};

absl::Status Run(const Options& options) {
  PRISTINE_ASSIGN_OR_RETURN(const auto device, CreateCudaDevice(options.device));
  PRISTINE_RETURN_IF_ERROR(Cuda(cudaSetDevice(options.device), "cudaSetDevice"));
  PRISTINE_ASSIGN_OR_RETURN(const auto stream, device->CreateStream());
  if (!options.json) {
    std::printf("%s. Median of %d graphs, outputs checked.\n\n", device->name().c_str(), options.samples);
    std::printf("%-24s %-36s %10s %9s %9s %9s %9s\n", "cell", "kernel", "us", "TFLOP/s", "KV GB/s", "of flash",
                "of cuDNN");
  }
  std::string json = absl::StrCat("{\"device\": \"", device->name(), "\", \"cells\": [");
  const char* separator = "\n ";
  for (const Cell& cell : kCells) {
    for (const PrefillVariant& variant : attention::PrefillVariants()) {
      const PrefillVariant* const chosen =
          attention::FindPrefillVariant(cell.dtype, cell.kv_dtype, cell.head_dim, device->compute_capability());
      if (&variant != chosen && (!options.variants || variant.dtype != cell.dtype || variant.only_capability != 0 ||
                                 variant.kv_dtype != cell.kv_dtype || variant.head_dim != cell.head_dim)) {
        continue;
      }
      PRISTINE_ASSIGN_OR_RETURN(const auto work, Workload::Create(*device, *stream, cell, &variant));
      PRISTINE_RETURN_IF_ERROR(work->Check());
      PRISTINE_ASSIGN_OR_RETURN(const double us, work->Time(options.samples));
      const double tflops = work->flops() / us / 1e6, gbps = work->kv_bytes() / us / 1e3;
      if (options.json) {
        absl::StrAppend(&json, separator, "{\"cell\": \"", cell.name, "\", \"kernel\": \"", work->kernel_name(),
                        "\", \"us\": ", us, ", \"tflops\": ", tflops, ", \"kv_gbps\": ", gbps);
        if (cell.flash > 0) {
          absl::StrAppend(&json, ", \"of_flash\": ", tflops / cell.flash, ", \"of_cudnn\": ", tflops / cell.cudnn);
        }
        absl::StrAppend(&json, "}");
        separator = ",\n ";
        continue;
      }
      std::printf("%-24s %-36s %10.1f %9.1f %9.0f", cell.name, work->kernel_name(), us, tflops, gbps);
      if (cell.flash > 0) {
        std::printf(" %9.2f %9.2f\n", tflops / cell.flash, tflops / cell.cudnn);
      } else {
        std::printf(" %9s %9s\n", "-", "-");
      }
      std::fflush(stdout);
    }
  }
  if (options.json) std::printf("%s]}\n", json.c_str());
  return absl::OkStatus();
}

// False: `argument` is not one of ours.
bool Parse(const char* argument, Options& options) {
  if (std::strcmp(argument, "--json") == 0) return options.json = true;
  if (std::strcmp(argument, "--variants") == 0) return options.variants = true;
  return NumberArgument(argument, "--samples=", 1, options.samples) ||
         NumberArgument(argument, "--device=", 0, options.device);
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  using namespace pristine::benchmarks;  // NOLINT(build/namespaces): all of it is this program
  return Main(argc, argv, "usage: prefill_benchmark [--samples=N] [--device=N] [--variants] [--json]\n", &Parse, &Run);
}
