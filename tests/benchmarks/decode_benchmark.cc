// How long decode takes over a paged KV cache, against the time that a copy of the same bytes would take and, with
// --peer=FILE, against the fastest of another library's paths for the same cells.
//
// Each cell has as many KV caches as fill 256 MiB, so that one is out of the L2 cache when its turn comes again; pages
// are handed out in a scrambled order; queries, outputs and page tables stay. At least 20 launches over all caches make
// up a graph; a sample is the time between an event before and one after it, over its launches. Before anything is
// timed, heads of three rows are compared with the definition in double, over all of the row. Bytes count KV, queries
// and outputs once. Without a peer file there are a few cells of our own; --ragged times one long request among short
// ones against an even batch of the same bytes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "attention/kernels/bfloat16.h"
#include "attention/kernels/float8.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/paged_decode.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/launch_ring.h"

namespace pristine::benchmarks {
namespace {

using attention::BFloat16;
using attention::DecodeScheduler;
using attention::DType;
using attention::Float8E4M3;

constexpr int64_t kRotation = int64_t{256} << 20;  // bytes between two uses of a cache
constexpr int64_t kBudget = int64_t{100} << 30;    // of a cell's caches
constexpr double kCopyBytesPerUs = 4.267e6;        // read + written, measured on an H200

struct Options {
  std::string peer;
  int samples = 7;
  int q_len = 1;
  int64_t every = 1;  // of the peer's cells
  bool ragged = false;
  DecodeScheduler scheduler = DecodeScheduler::kDevice;
};

struct Cell {
  bool float8;
  int32_t q_heads, kv_heads, head_dim, page_size, batch, length;
  double peer_us = 0;       // 0: none
  int32_t last_length = 0;  // of the last request, the others' is length; 0: length too

  DType kv_dtype() const { return float8 ? DType::kFloat8E4M3 : DType::kBFloat16; }
  int32_t LengthOf(int32_t row) const { return row + 1 == batch && last_length > 0 ? last_length : length; }
  int64_t FirstPage(int32_t row) const { return int64_t{row} * ((length - 1) / page_size + 1); }
  int64_t pages() const { return FirstPage(batch - 1) + (LengthOf(batch - 1) - 1) / page_size + 1; }
  int64_t page_elements() const { return int64_t{page_size} * kv_heads * head_dim; }
  int64_t cache_bytes() const {  // K alone, or V
    return pages() * page_elements() * static_cast<int64_t>(attention::SizeOf(kv_dtype()));
  }
  int64_t caches() const { return (kRotation + 2 * cache_bytes() - 1) / (2 * cache_bytes()); }
  int64_t kv_bytes() const { return 2 * caches() * cache_bytes(); }
  std::string Key() const {
    return absl::StrCat(float8 ? "fp8_e4m3" : "bf16", ",", q_heads, ",", kv_heads, ",", head_dim, ",", page_size, ",",
                        batch, ",", length);
  }
};

// The cells of the file in its order, each with its fastest path.
absl::StatusOr<std::vector<Cell>> ReadPeer(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  std::vector<Cell> cells;
  std::map<std::string, size_t> found;
  std::string line;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#' || line.rfind("path,", 0) == 0) continue;
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream fields(line);
    std::string peer_path, kv;
    Cell cell = {};
    fields >> peer_path >> kv >> cell.q_heads >> cell.kv_heads >> cell.head_dim >> cell.page_size >> cell.batch >>
        cell.length >> cell.peer_us;
    if (!fields) return absl::InvalidArgumentError(absl::StrCat(path, ": cannot understand ", line));
    cell.float8 = kv == "fp8_e4m3";
    const auto [at, is_new] = found.emplace(cell.Key(), cells.size());
    if (is_new) {
      cells.push_back(cell);
    } else {
      cells[at->second].peer_us = std::min(cells[at->second].peer_us, cell.peer_us);
    }
  }
  return cells;
}

std::vector<Cell> OwnCells() {
  std::vector<Cell> cells;
  for (const bool float8 : {false, true}) {
    for (const int32_t page_size : {1, 16, 32, 64, 128}) {
      for (const auto& [batch, length] : {std::pair{1, 1024}, {8, 1024}, {1, 16384}, {32, 1024}, {32, 8192}}) {
        cells.push_back({float8, 32, 8, 128, page_size, batch, length});
      }
    }
  }
  return cells;
}

// What queries and caches repeat; its odd size lets no two pages be alike.
class RandomBlock {
 public:
  static constexpr int64_t kMostValues = 256;  // that Values gives at once

  explicit RandomBlock(bool float8) : bytes_((size_t{16} << 20) - 272) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<float> value(-1.7f, 1.7f);
    for (size_t at = 0; at < bytes_.size(); at += float8 ? 1 : 2) {
      const float x = value(random);
      if (float8) {
        const Float8E4M3 narrow = attention::FromFloat<Float8E4M3>(x);
        bytes_[at] = std::byte{narrow.bits};
        values_.push_back(ToFloat(narrow));
      } else {
        const BFloat16 narrow = attention::FromFloat<BFloat16>(x);
        std::memcpy(&bytes_[at], &narrow, 2);
        values_.push_back(ToFloat(narrow));
      }
    }
    elements_ = static_cast<int64_t>(values_.size());
    values_.reserve(values_.size() + kMostValues);
    std::copy_n(values_.begin(), kMostValues, std::back_inserter(values_));
  }

  absl::Status FillWith(Stream& stream, DeviceSpan<std::byte> to) const {
    const size_t first = std::min(bytes_.size(), to.size());
    PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(to.Sub(0, first), absl::MakeConstSpan(bytes_).first(first)));
    for (size_t at = first; at < to.size(); at += bytes_.size()) {
      const size_t size = std::min(bytes_.size(), to.size() - at);
      PRISTINE_RETURN_IF_ERROR(stream.Copy(to.Sub(at, size), {to.address(), size}));
    }
    return stream.Synchronize();
  }
  // The kMostValues elements from `index` on of a tensor that is filled with it.
  const float* Values(int64_t index) const { return &values_[static_cast<size_t>(index % elements_)]; }

 private:
  std::vector<std::byte> bytes_;
  std::vector<float> values_;  // of the bytes, and again the first ones
  int64_t elements_ = 0;
};

// What cells share. All have their caches at the same place: what was allocated behind a cell of 34 GB was 4 % slower.
struct Inputs {
  const RandomBlock bf16{false}, fp8{true};
  DeviceBuffer kv;

  absl::Status Allocate(Device& device, absl::Span<const Cell> cells) {
    int64_t most = 0;
    for (const Cell& cell : cells) {
      if (cell.kv_bytes() <= kBudget) most = std::max(most, cell.kv_bytes());
    }
    PRISTINE_ASSIGN_OR_RETURN(kv, device.Allocate(most, "kv"));
    return absl::OkStatus();
  }
};

class Workload {
 public:
  static absl::StatusOr<std::unique_ptr<Workload>> Create(Device& device, Stream& stream, const Cell& cell,
                                                          const Options& options, const Inputs& inputs) {
    std::unique_ptr<Workload> work(new Workload(stream, cell, options.q_len, inputs));
    PRISTINE_ASSIGN_OR_RETURN(work->manager_, BufferManager::Create(device));
    const Extent bucket = work->bucket_;
    PRISTINE_ASSIGN_OR_RETURN(
        work->plan_, attention::DecodePlan::Create(*work->manager_, {.buckets = {bucket},
                                                                     .q_len = options.q_len,
                                                                     .q_heads = cell.q_heads,
                                                                     .kv_heads = cell.kv_heads,
                                                                     .head_dim = cell.head_dim,
                                                                     .dtype = DType::kBFloat16,
                                                                     .kv_dtype = cell.kv_dtype(),
                                                                     .page_size = cell.page_size,
                                                                     .max_row_tokens = cell.LengthOf(cell.batch - 1),
                                                                     .derived_from = {},
                                                                     .scheduler = options.scheduler}));
    PRISTINE_ASSIGN_OR_RETURN(work->decode_, attention::PagedDecode::Create(*work->plan_, work->Scale()));
    PRISTINE_RETURN_IF_ERROR(work->manager_->Seal());
    PRISTINE_RETURN_IF_ERROR(work->Allocate(device));

    // The prologue leaves the plan where every launch finds it; the first launch loads the kernel, which a capture need
    // not survive.
    std::vector<int32_t> lengths(static_cast<size_t>(cell.batch), cell.length);
    lengths.back() = cell.LengthOf(cell.batch - 1);
    PRISTINE_RETURN_IF_ERROR(work->manager_->BeginStep(bucket, bucket));
    PRISTINE_RETURN_IF_ERROR(work->plan_->Plan(bucket, lengths));
    PRISTINE_RETURN_IF_ERROR(work->manager_->BeforeReplay(stream, bucket, bucket));
    PRISTINE_RETURN_IF_ERROR(work->manager_->RecordPrologue(stream, bucket));
    PRISTINE_RETURN_IF_ERROR(work->decode_->Run(stream, bucket, work->Tensors(0)));
    const double bytes = work->bytes();
    work->launches_ = std::max<int64_t>(cell.caches(), std::clamp<int64_t>(static_cast<int64_t>(5e10 / bytes), 4, 20));
    PRISTINE_ASSIGN_OR_RETURN(
        const std::unique_ptr<Graph> captured, Capture(stream, [&](Stream& capturing) -> absl::Status {
          for (int64_t i = 0; i < work->launches_; ++i) {
            PRISTINE_RETURN_IF_ERROR(work->decode_->Run(capturing, bucket, work->Tensors(i % cell.caches())));
          }
          return absl::OkStatus();
        }));
    PRISTINE_ASSIGN_OR_RETURN(work->exec_, captured->Instantiate());
    return work;
  }

  double bytes() const {
    return 2.0 * static_cast<double>(cell_.cache_bytes()) + 2.0 * static_cast<double>(q_.As<const std::byte>().size());
  }

  // A head of the first row, of the last, and of one between, over the first cache.
  absl::Status Check() {
    PRISTINE_RETURN_IF_ERROR(stream_.Fill(out_.As<std::byte>(), std::byte{0xff}));
    PRISTINE_RETURN_IF_ERROR(decode_->Run(stream_, bucket_, Tensors(0)));
    std::vector<std::byte> outs(out_.As<const std::byte>().size());
    PRISTINE_RETURN_IF_ERROR(stream_.CopyToHost(absl::MakeSpan(outs), out_.As<const std::byte>()));
    PRISTINE_RETURN_IF_ERROR(stream_.Synchronize());
    const int32_t rows[] = {0, cell_.batch / 2, cell_.batch - 1};
    for (int i = 0; i < 3; ++i) {
      PRISTINE_RETURN_IF_ERROR(CheckHead(outs, rows[i], i * (q_len_ - 1) / 2, i * (cell_.q_heads - 1) / 2));
    }
    return absl::OkStatus();
  }

  // Microseconds of a launch.
  absl::StatusOr<double> Time(int samples) {
    std::vector<double> times(static_cast<size_t>(samples) + 1);
    PRISTINE_ASSIGN_OR_RETURN(LaunchRing ring, LaunchRing::Create());
    const cudaStream_t native = static_cast<cudaStream_t>(stream_.native());
    for (double& time : times) {
      PRISTINE_RETURN_IF_ERROR(ring.Begin(native, &time));
      PRISTINE_RETURN_IF_ERROR(exec_->Launch(stream_));
      PRISTINE_RETURN_IF_ERROR(ring.End(native));
    }
    PRISTINE_RETURN_IF_ERROR(ring.Drain());
    times.erase(times.begin());
    return Summarize(times).median / static_cast<double>(launches_);
  }

 private:
  Workload(Stream& stream, const Cell& cell, int32_t q_len, const Inputs& inputs)
      : stream_(stream), cell_(cell), q_len_(q_len), bucket_{cell.batch, cell.batch * q_len}, inputs_(inputs) {}
  float Scale() const { return 1 / std::sqrt(static_cast<float>(cell_.head_dim)); }

  absl::Status Allocate(Device& device) {
    const int64_t heads = int64_t{cell_.batch} * q_len_ * cell_.q_heads;
    PRISTINE_ASSIGN_OR_RETURN(q_, device.Allocate(heads * cell_.head_dim * 2, "q"));
    PRISTINE_ASSIGN_OR_RETURN(out_, device.Allocate(heads * cell_.head_dim * 2, "out"));
    PRISTINE_ASSIGN_OR_RETURN(lse_, device.Allocate(heads * 4, "lse"));
    PRISTINE_RETURN_IF_ERROR(inputs_.bf16.FillWith(stream_, q_.As<std::byte>()));
    PRISTINE_RETURN_IF_ERROR(KvBlock().FillWith(stream_, inputs_.kv.As<std::byte>().Sub(0, cell_.kv_bytes())));
    pages_.resize(static_cast<size_t>(cell_.pages()));
    std::iota(pages_.begin(), pages_.end(), 0);
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937_64(7));
    std::vector<int32_t> indptr(static_cast<size_t>(cell_.batch) + 1);
    for (int32_t row = 0; row < cell_.batch; ++row) indptr[row] = static_cast<int32_t>(cell_.FirstPage(row));
    indptr.back() = static_cast<int32_t>(cell_.pages());
    std::vector<int32_t> lengths(static_cast<size_t>(cell_.batch), cell_.length);
    lengths.back() = cell_.LengthOf(cell_.batch - 1);
    PRISTINE_RETURN_IF_ERROR(Put(device, indptr, kv_indptr_));
    PRISTINE_RETURN_IF_ERROR(Put(device, pages_, kv_indices_));
    return Put(device, lengths, lengths_);
  }
  absl::Status Put(Device& device, const std::vector<int32_t>& values, DeviceBuffer& to) {
    PRISTINE_ASSIGN_OR_RETURN(to, device.Allocate(values.size() * 4, "page table"));
    PRISTINE_RETURN_IF_ERROR(stream_.CopyFromHost(
        to.As<std::byte>(), {reinterpret_cast<const std::byte*>(values.data()), values.size() * 4}));
    return stream_.Synchronize();
  }
  DeviceSpan<const std::byte> Cache(int64_t index, bool values) const {
    return inputs_.kv.As<const std::byte>().Sub((2 * index + (values ? 1 : 0)) * cell_.cache_bytes(),
                                                cell_.cache_bytes());
  }
  attention::DecodeTensors Tensors(int64_t cache) const {
    attention::DecodeTensors tensors;
    tensors.q = q_.As<const std::byte>();
    tensors.k = Cache(cache, false);
    tensors.v = Cache(cache, true);
    tensors.out = out_.As<std::byte>();
    tensors.lse = lse_.As<attention::LseBase2>();
    tensors.kv_indptr = kv_indptr_.As<const int32_t>();
    tensors.kv_indices = kv_indices_.As<const int32_t>();
    tensors.lengths = lengths_.As<const int32_t>();
    return tensors;
  }

  const RandomBlock& KvBlock() const { return cell_.float8 ? inputs_.fp8 : inputs_.bf16; }

  absl::Status CheckHead(const std::vector<std::byte>& outs, int32_t row, int32_t token, int32_t head) const {
    const int32_t dim = cell_.head_dim, kv_head = head / (cell_.q_heads / cell_.kv_heads);
    const int64_t place = ((int64_t{row} * q_len_ + token) * cell_.q_heads + head) * dim;
    const int64_t values = cell_.cache_bytes() / static_cast<int64_t>(attention::SizeOf(cell_.kv_dtype()));
    const int32_t end = cell_.LengthOf(row) - q_len_ + token + 1;
    std::vector<double> sum(static_cast<size_t>(dim));
    std::vector<float> out(sum.size());
    for (int32_t d = 0; d < dim; ++d) {
      BFloat16 narrow;
      std::memcpy(&narrow, &outs[static_cast<size_t>(2 * (place + d))], 2);
      out[d] = ToFloat(narrow);
    }
    const float* const q = inputs_.bf16.Values(place);
    double mass = 0;
    for (int32_t p = 0; p < end; ++p) {
      const int64_t page = pages_[static_cast<size_t>(cell_.FirstPage(row) + p / cell_.page_size)];
      const int64_t at = page * cell_.page_elements() + (int64_t{p % cell_.page_size} * cell_.kv_heads + kv_head) * dim;
      const float* const k = KvBlock().Values(at);
      const float* const v = KvBlock().Values(values + at);
      double score = 0;
      for (int32_t d = 0; d < dim; ++d) score += double{q[d]} * k[d];
      const double weight = std::exp(score * Scale());  // scores of these values are small
      mass += weight;
      for (int32_t d = 0; d < dim; ++d) sum[d] += weight * v[d];
    }
    double error = 0, norm = 0;
    for (int32_t d = 0; d < dim; ++d) {
      error += (out[d] - sum[d] / mass) * (out[d] - sum[d] / mass);
      norm += sum[d] / mass * (sum[d] / mass);
    }
    if (std::sqrt(error / norm) <= 8e-3) return absl::OkStatus();  // NaN does not pass
    return absl::DataLossError(absl::StrCat(cell_.Key(), ": row ", row, ", token ", token, ", head ", head,
                                            ": relative RMS ", std::sqrt(error / norm)));
  }

  Stream& stream_;
  const Cell cell_;
  const int32_t q_len_;
  const Extent bucket_;
  const Inputs& inputs_;
  std::vector<int32_t> pages_;
  DeviceBuffer q_, out_, lse_, kv_indptr_, kv_indices_, lengths_;
  std::unique_ptr<BufferManager> manager_;
  std::unique_ptr<attention::DecodePlan> plan_;
  std::unique_ptr<attention::PagedDecode> decode_;
  std::unique_ptr<GraphExec> exec_;
  int64_t launches_ = 0;
};

// Geometric mean of speedups.
struct Mean {
  double logs = 0;
  int count = 0;
  void Add(double ratio) { logs += std::log(ratio), ++count; }
  double value() const { return count == 0 ? 0 : std::exp(logs / count); }
};

// Microseconds of a cell whose results are right.
absl::StatusOr<double> Measure(Device& device, Stream& stream, const Cell& cell, const Options& options,
                               const Inputs& inputs, double* floor = nullptr) {
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Workload> work,
                            Workload::Create(device, stream, cell, options, inputs));
  PRISTINE_RETURN_IF_ERROR(work->Check());
  if (floor != nullptr) *floor = work->bytes() / kCopyBytesPerUs;
  return work->Time(options.samples);
}

// One request of 64K among 63 of 1K, and 64 of 2032: the same bytes.
absl::Status RunRagged(Device& device, Stream& stream, const Options& options, Inputs& inputs) {
  constexpr int32_t kBatch = 64, kLong = 65536, kShort = 1024;
  constexpr int32_t kEven = (kLong + (kBatch - 1) * kShort) / kBatch;
  std::printf("%-40s %10s %10s %8s\n", "ragged: 1 x 64K among 63 x 1K", "us", "even us", "ratio");
  for (const bool float8 : {false, true}) {
    const Cell even = {float8, 32, 8, 128, 16, kBatch, kEven};
    Cell ragged = even;
    ragged.length = kShort, ragged.last_length = kLong;
    PRISTINE_RETURN_IF_ERROR(inputs.Allocate(device, {even, ragged}));
    PRISTINE_ASSIGN_OR_RETURN(const double us, Measure(device, stream, ragged, options, inputs));
    PRISTINE_ASSIGN_OR_RETURN(const double even_us, Measure(device, stream, even, options, inputs));
    std::printf("%-40s %10.2f %10.2f %8.3f\n", float8 ? "fp8_e4m3,32,8,128,16" : "bf16,32,8,128,16", us, even_us,
                us / even_us);
  }
  return absl::OkStatus();
}

absl::Status Run(const Options& options) {
  std::vector<Cell> cells = OwnCells();
  if (!options.peer.empty()) {
    PRISTINE_ASSIGN_OR_RETURN(cells, ReadPeer(options.peer));
  }
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Device> device, CreateCudaDevice(0));
  PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device->CreateStream());
  Inputs inputs;
  if (options.ragged) return RunRagged(*device, *stream, options, inputs);
  PRISTINE_RETURN_IF_ERROR(inputs.Allocate(*device, cells));
  std::printf("%-40s %10s %10s %8s %10s %8s\n", "cell", "us", "floor us", "of copy", "peer us", "speedup");
  Mean bf16, fp8;
  std::vector<std::string> slower;
  const Timer since_start;
  double reported_us = 0;
  for (size_t i = 0; i < cells.size(); i += static_cast<size_t>(options.every)) {
    const Cell& cell = cells[i];
    if (since_start.Microseconds() > reported_us + 5e6) {
      reported_us = since_start.Microseconds();
      std::fprintf(stderr, "cell %zu of %zu after %.0f s\n", i, cells.size(), reported_us / 1e6);
    }
    if (cell.kv_bytes() > kBudget) {
      std::printf("%-40s left out: more than %lld GiB\n", cell.Key().c_str(), static_cast<long long>(kBudget >> 30));
      continue;
    }
    double floor = 0;
    PRISTINE_ASSIGN_OR_RETURN(const double us, Measure(*device, *stream, cell, options, inputs, &floor));
    std::printf("%-40s %10.2f %10.2f %8.3f", cell.Key().c_str(), us, floor, floor / us);
    if (cell.peer_us > 0) {
      const double speedup = cell.peer_us / us;
      std::printf(" %10.2f %8.2f", cell.peer_us, speedup);
      (cell.float8 ? fp8 : bf16).Add(speedup);
      if (speedup < 1) slower.push_back(absl::StrCat(cell.Key(), " ", speedup));
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  if (bf16.count + fp8.count == 0) return absl::OkStatus();
  std::printf("geometric mean of the speedups: bf16 %.3f over %d cells, fp8 %.3f over %d\n", bf16.value(), bf16.count,
              fp8.value(), fp8.count);
  std::printf("slower than the peer: %zu\n", slower.size());
  for (const std::string& cell : slower) std::printf("  %s\n", cell.c_str());
  return absl::OkStatus();
}

constexpr char kUsage[] =
    R"(usage: decode_benchmark [--peer=FILE [--every=N]] [--ragged] [--samples=N] [--q-len=N] [--scheduler=device|host]
Times PagedDecode on the first GPU, after checking its results. Half a minute for the 236 cells of a peer's file.
  --peer=FILE    the cells of another library's figures (path,kv_dtype,q_heads,kv_heads,head_dim,page_size,batch,
                 kv_len,us,...), and ours against its fastest path; without it, cells of our own
  --every=N      each Nth of these cells; an odd N meets all lengths
  --ragged       instead: one request of 64K among 63 of 1K, against an even batch of the same bytes
  --samples=N    samples of each cell, of which the median counts (default 7)
  --q-len=N      query tokens of each request (default 1)
  --scheduler=S  who cuts rows up: device (default) or host
Exit: 0 done, 1 a wrong result or an error, 2 usage.
)";

bool ParseNumber(const char* argument, const char* name, int64_t least, int64_t& value) {
  const size_t length = std::strlen(name);
  if (std::strncmp(argument, name, length) != 0) return false;
  const char* const end = argument + std::strlen(argument);
  const auto [parsed, error] = std::from_chars(argument + length, end, value);
  return error == std::errc() && parsed == end && value >= least;
}

bool Parse(const char* argument, Options& options) {
  int64_t value = 0;
  if (std::strncmp(argument, "--peer=", 7) == 0) {
    options.peer = argument + 7;
  } else if (std::strcmp(argument, "--ragged") == 0) {
    options.ragged = true;
  } else if (std::strcmp(argument, "--scheduler=host") == 0) {
    options.scheduler = DecodeScheduler::kHost;
  } else if (std::strcmp(argument, "--scheduler=device") == 0) {
    options.scheduler = DecodeScheduler::kDevice;
  } else if (ParseNumber(argument, "--samples=", 1, value)) {
    options.samples = static_cast<int>(std::min<int64_t>(value, 1000));
  } else if (ParseNumber(argument, "--q-len=", 1, value)) {
    options.q_len = static_cast<int>(std::min<int64_t>(value, 1000));
  } else if (ParseNumber(argument, "--every=", 1, value)) {
    options.every = value;
  } else {
    return false;
  }
  return true;
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  pristine::benchmarks::Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) {
      std::fputs(pristine::benchmarks::kUsage, stdout);
      return 0;
    }
    if (!pristine::benchmarks::Parse(argv[i], options)) {
      std::fprintf(stderr, "unknown argument %s\n%s", argv[i], pristine::benchmarks::kUsage);
      return 2;
    }
  }
  const absl::Status status = pristine::benchmarks::Run(options);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
