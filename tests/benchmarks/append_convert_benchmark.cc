// How long AppendKv and the conversion of a sparse page table take, against the bytes that they must move; and the
// host's planner, which takes no device (--only=plan).
//
// As in merge_benchmark: each cell has as many sets of arrays as fill 256 MiB, launches over all sets make up graphs,
// and a sample is the time between an event before and one after a graph, over its launches. Before anything is timed,
// the arrays that a graph wrote are compared, byte by byte, with what the Host functions leave. Bytes count what is
// read or written once.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/append_kv.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/attention/append_kv.h"
#include "pristine/attention/decode_plan.h"
#include "pristine/attention/sparse_page_table.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/benchmarks/arguments.h"
#include "tests/benchmarks/graph_timer.h"

namespace pristine::benchmarks {
namespace {

using attention::DType;
using attention::KvLayout;
using attention::SparseToCsrParams;
using Bytes = std::vector<std::byte>;
using Ints = std::vector<int32_t>;

constexpr int64_t kRotation = int64_t{256} << 20;  // bytes between two uses of a set
constexpr int64_t kMinLaunches = 20, kMaxLaunches = 1024;
constexpr double kCopyBandwidth = 4270;  // GB/s, read and written bytes together: what floors are made of

struct Options {
  int device = 0;
  int samples = 30;
  bool json = false;
  std::string only;  // append, convert or plan
};

struct Row {
  std::string name;
  std::string cell;
  double floor_us = 0, min_us = 0, median_us = 0;
};

void Print(const Options& options, const Row& row, const char*& separator) {
  if (options.json) {
    std::printf("%s{\"name\": \"%s\", \"cell\": \"%s\", \"floor_us\": %.4f, \"min_us\": %.4f, \"median_us\": %.4f}",
                separator, row.name.c_str(), row.cell.c_str(), row.floor_us, row.min_us, row.median_us);
    separator = ",\n ";
    return;
  }
  std::printf("%-22s %-44s %10.3f %10.3f %10.3f %8.3f\n", row.name.c_str(), row.cell.c_str(), row.floor_us, row.min_us,
              row.median_us, row.floor_us / row.median_us);
  std::fflush(stdout);
}

Bytes AsBytes(const Ints& values) {
  Bytes bytes(values.size() * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

absl::StatusOr<Bytes> Read(Stream& stream, DeviceSpan<const std::byte> from) {
  Bytes bytes(from.size());
  PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(bytes), from));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return bytes;
}

absl::Status Compare(const std::string& what, const Bytes& found, const Bytes& expected) {
  const auto [at, other] = std::mismatch(found.begin(), found.end(), expected.begin(), expected.end());
  if (at == found.end() && other == expected.end()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(what, ": byte ", at - found.begin(), " is not what the Host function leaves"));
}

// Captures launch(stream, set) over all sets, checks once, and times. `bytes`: of one set.
template <class LaunchSet, class Check>
absl::Status Measure(Stream& stream, const Options& options, int64_t bytes, LaunchSet launch, Check check, Row& row) {
  const int64_t sets = (kRotation + bytes - 1) / bytes;
  PRISTINE_RETURN_IF_ERROR(launch(stream, 0));  // loads the kernel, which a capture need not survive
  const int64_t launches = std::clamp(sets, kMinLaunches, kMaxLaunches);
  std::vector<std::unique_ptr<GraphExec>> execs;
  for (int64_t graph = 0; graph * launches < sets; ++graph) {
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> captured,
                              Capture(stream, [&](Stream& capturing) -> absl::Status {
                                for (int64_t i = 0; i < launches; ++i) {
                                  PRISTINE_RETURN_IF_ERROR(launch(capturing, (graph * launches + i) % sets));
                                }
                                return absl::OkStatus();
                              }));
    PRISTINE_ASSIGN_OR_RETURN(auto exec, captured->Instantiate());
    execs.push_back(std::move(exec));
  }
  for (const auto& exec : execs) PRISTINE_RETURN_IF_ERROR(exec->Launch(stream));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  PRISTINE_RETURN_IF_ERROR(check(int64_t{0}));
  PRISTINE_RETURN_IF_ERROR(check(sets - 1));
  PRISTINE_ASSIGN_OR_RETURN(std::vector<double> times, GraphTimer::Time(stream, execs, options.samples));
  row.floor_us = static_cast<double>(bytes) / kCopyBandwidth / 1e3;
  row.median_us = Median(times) / static_cast<double>(launches);
  row.min_us = *std::min_element(times.begin(), times.end()) / static_cast<double>(launches);
  return absl::OkStatus();
}

// --- AppendKv ---

struct AppendCell {
  DType dtype;
  bool quantizes;
  KvLayout layout;
  int32_t kv_heads, tokens;
};
constexpr int32_t kHeadDim = 128, kPageSize = 16;

absl::StatusOr<Row> MeasureAppend(Device& device, Stream& stream, const Options& options, const AppendCell& cell) {
  const int64_t row = int64_t{cell.kv_heads} * kHeadDim;
  const int64_t new_bytes = cell.tokens * row * static_cast<int64_t>(SizeOf(cell.dtype));
  const int32_t pages = (cell.tokens + kPageSize - 1) / kPageSize;
  const int64_t element = cell.quantizes ? 1 : static_cast<int64_t>(SizeOf(cell.dtype));
  const int64_t pool_bytes = int64_t{pages} * kPageSize * row * element;
  const int64_t bytes = 2 * (new_bytes + cell.tokens * row * element) + int64_t{cell.tokens} * 4;
  const int64_t sets = (kRotation + bytes - 1) / bytes;

  std::mt19937_64 random(1);
  Ints order(pages), slots(cell.tokens);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int32_t t = 0; t < cell.tokens; ++t) slots[t] = order[t / kPageSize] * kPageSize + t % kPageSize;
  Bytes rows(new_bytes), scales(8);
  const Bytes slot_bytes = AsBytes(slots);
  for (size_t i = 0; i + 8 <= rows.size(); i += 8) {
    const uint64_t bits = random() & 0x3fff3fff3fff3fff;  // no infinities, no NaN
    std::memcpy(&rows[i], &bits, 8);
  }
  const float factors[] = {0.5f, 3.0f};
  std::memcpy(scales.data(), factors, 8);

  struct Memory {
    DeviceBuffer k_new, v_new, k, v, slots, scales;
  };
  const auto allocate = [&](Device& on, Stream& by, int64_t count) -> absl::StatusOr<Memory> {
    Memory m;
    PRISTINE_ASSIGN_OR_RETURN(m.k_new, on.Allocate(count * new_bytes, "k_new"));
    PRISTINE_ASSIGN_OR_RETURN(m.v_new, on.Allocate(count * new_bytes, "v_new"));
    PRISTINE_ASSIGN_OR_RETURN(m.k, on.Allocate(count * pool_bytes, "k"));
    PRISTINE_ASSIGN_OR_RETURN(m.v, on.Allocate(count * pool_bytes, "v"));
    PRISTINE_ASSIGN_OR_RETURN(m.slots, on.Allocate(slots.size() * 4, "slots"));
    PRISTINE_ASSIGN_OR_RETURN(m.scales, on.Allocate(8, "scales"));
    PRISTINE_RETURN_IF_ERROR(by.Fill(m.k.As<std::byte>(), std::byte{1}));
    PRISTINE_RETURN_IF_ERROR(by.Fill(m.v.As<std::byte>(), std::byte{1}));
    PRISTINE_RETURN_IF_ERROR(by.CopyFromHost(m.slots.As<std::byte>(), slot_bytes));
    PRISTINE_RETURN_IF_ERROR(by.CopyFromHost(m.scales.As<std::byte>(), scales));
    for (int64_t set = 0; set < count; ++set) {
      for (const DeviceBuffer* buffer : {&m.k_new, &m.v_new}) {
        const DeviceSpan<std::byte> to = buffer->As<std::byte>().Sub(set * new_bytes, new_bytes);
        if (set == 0) {
          PRISTINE_RETURN_IF_ERROR(by.CopyFromHost(to, rows));
        } else {
          PRISTINE_RETURN_IF_ERROR(by.Copy(to, buffer->As<const std::byte>().Sub(0, new_bytes)));
        }
      }
    }
    PRISTINE_RETURN_IF_ERROR(by.Synchronize());
    return m;
  };
  const auto append = [&](Stream& by, const Memory& m, int64_t set) {
    attention::AppendKvTensors t = {.dtype = cell.dtype, .layout = cell.layout, .page_size = kPageSize};
    t.kv_heads = cell.kv_heads;
    t.head_dim = kHeadDim;
    t.k_new = m.k_new.As<const std::byte>().Sub(set * new_bytes, new_bytes);
    t.v_new = m.v_new.As<const std::byte>().Sub(set * new_bytes, new_bytes);
    t.slots = m.slots.As<const int32_t>();
    t.k = m.k.As<std::byte>().Sub(set * pool_bytes, pool_bytes);
    t.v = m.v.As<std::byte>().Sub(set * pool_bytes, pool_bytes);
    if (cell.quantizes) {
      t.kv_dtype = DType::kFloat8E4M3;
      t.k_scale = m.scales.As<const float>().Sub(0, 1);
      t.v_scale = m.scales.As<const float>().Sub(1, 1);
    }
    return AppendKv(by, cell.tokens, t);
  };

  PRISTINE_ASSIGN_OR_RETURN(const auto host, CreateHostDevice());
  PRISTINE_ASSIGN_OR_RETURN(const auto host_stream, host->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(const Memory expected, allocate(*host, *host_stream, 1));
  PRISTINE_RETURN_IF_ERROR(append(*host_stream, expected, 0));
  PRISTINE_ASSIGN_OR_RETURN(const Bytes expected_k, Read(*host_stream, expected.k.As<const std::byte>()));
  PRISTINE_ASSIGN_OR_RETURN(const Bytes expected_v, Read(*host_stream, expected.v.As<const std::byte>()));
  PRISTINE_ASSIGN_OR_RETURN(const Memory memory, allocate(device, stream, sets));
  Row result = {.name = cell.quantizes ? "AppendKv to float8" : "AppendKv",
                .cell = absl::StrCat(ToString(cell.dtype), ", ", ToString(cell.layout), ", ", cell.kv_heads,
                                     " heads of 128, ", cell.tokens, " tokens")};
  const auto check = [&](int64_t set) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(const Bytes k,
                              Read(stream, memory.k.As<const std::byte>().Sub(set * pool_bytes, pool_bytes)));
    PRISTINE_ASSIGN_OR_RETURN(const Bytes v,
                              Read(stream, memory.v.As<const std::byte>().Sub(set * pool_bytes, pool_bytes)));
    PRISTINE_RETURN_IF_ERROR(Compare(absl::StrCat(result.cell, ", k of set ", set), k, expected_k));
    return Compare(absl::StrCat(result.cell, ", v of set ", set), v, expected_v);
  };
  PRISTINE_RETURN_IF_ERROR(Measure(
      stream, options, bytes, [&](Stream& by, int64_t set) { return append(by, memory, set); }, check, result));
  return result;
}

// --- conversion ---

struct ConvertCell {
  int32_t page_size, requests, topk;
};

constexpr Kernel<SparseToCsrParams> kSparseToCsr = {"sparse_page_table", &attention::SparseToCsrHost,
                                                    &attention::SparseToCsrCuda,
                                                    [](const SparseToCsrParams&, WriteList&) {}};

absl::StatusOr<Row> MeasureConvert(Device& device, Stream& stream, const Options& options, const ConvertCell& cell) {
  constexpr int32_t kGroups = 2, kBlock = 64, kMaxLength = 32768;
  const int32_t num_pages = (1 << 20) / cell.page_size;
  const int32_t rows = kGroups * cell.requests, bound = cell.topk * kBlock;
  std::mt19937_64 random(2);
  Ints lengths, page_indptr = {0}, pages, table;
  int64_t tokens = 0;
  for (int32_t r = 0; r < cell.requests; ++r) {
    const int32_t length = bound + 1 + static_cast<int32_t>(random() % (kMaxLength - bound));
    const int32_t last = (length - 1) / kBlock;
    lengths.push_back(length);
    page_indptr.push_back(page_indptr.back() + (length - 1) / cell.page_size + 1);
    for (int32_t g = 0; g < kGroups; ++g) {
      for (int32_t i = 0; i + 1 < cell.topk; ++i) table.push_back(static_cast<int32_t>(random() % last));
      table.push_back(last);
      tokens += (cell.topk - 1) * kBlock + (length - 1) % kBlock + 1;
    }
  }
  for (int32_t i = 0; i < page_indptr.back(); ++i) pages.push_back(static_cast<int32_t>(random() % num_pages));
  const int64_t page_entries = cell.page_size == 1 ? tokens : static_cast<int64_t>(table.size());
  const int64_t bytes = 4 * (tokens + page_entries + static_cast<int64_t>(table.size() + lengths.size() * 2) + rows);
  const int64_t sets = (kRotation + bytes - 1) / bytes;
  const int64_t set_indices = int64_t{rows} * bound, set_indptr = (rows + 1 + 3) / 4 * 4;

  PRISTINE_ASSIGN_OR_RETURN(const auto manager, BufferManager::Create(device));
  std::vector<DeviceBuffer> memory;
  const auto put = [&](const Ints& values, int64_t count) -> absl::StatusOr<int32_t*> {
    PRISTINE_ASSIGN_OR_RETURN(DeviceBuffer buffer, device.Allocate(count * 4, "array"));
    const Bytes value_bytes = AsBytes(values);
    if (!values.empty()) {
      PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(buffer.As<std::byte>(), value_bytes));
    }
    PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
    memory.push_back(std::move(buffer));
    return memory.back().As<int32_t>().address();
  };
  SparseToCsrParams params = {.lengths = lengths.data(),
                              .page_indptr = page_indptr.data(),
                              .page_indices = pages.data(),
                              .table = table.data(),
                              .indptr = nullptr,
                              .indices = nullptr,
                              .reports = manager->report_ring({cell.requests, cell.requests}),
                              .lengths_id = 0,
                              .rows = rows,
                              .row_bound = bound,
                              .groups = kGroups,
                              .block = kBlock,
                              .topk = cell.topk,
                              .dense_len = 0,
                              .max_length = kMaxLength,
                              .page_size = cell.page_size,
                              .page_indices_size = static_cast<int64_t>(pages.size()),
                              .num_pages = num_pages,
                              .dummy_page = 0};
  Ints indptr(rows + 1), indices(set_indices, 0);
  params.indptr = indptr.data();
  params.indices = indices.data();
  attention::SparseToCsrHost(params);

  const Ints nothing;
  PRISTINE_ASSIGN_OR_RETURN(params.lengths, put(lengths, lengths.size()));
  PRISTINE_ASSIGN_OR_RETURN(params.page_indptr, put(page_indptr, page_indptr.size()));
  PRISTINE_ASSIGN_OR_RETURN(params.page_indices, put(pages, pages.size()));
  PRISTINE_ASSIGN_OR_RETURN(params.table, put(table, table.size()));
  PRISTINE_ASSIGN_OR_RETURN(int32_t* const all_indptr, put(nothing, sets * set_indptr));
  PRISTINE_ASSIGN_OR_RETURN(int32_t* const all_indices, put(nothing, sets * set_indices));
  PRISTINE_RETURN_IF_ERROR(stream.Fill(memory.back().As<std::byte>(), std::byte{0}));
  Row result = {.name = "conversion to CSR",
                .cell = absl::StrCat(cell.requests, " requests, topk ", cell.topk, ", page_size ", cell.page_size)};
  const auto launch = [&](Stream& by, int64_t set) {
    SparseToCsrParams p = params;
    p.indptr = all_indptr + set * set_indptr;
    p.indices = all_indices + set * set_indices;
    return Launch(by, kSparseToCsr, p);
  };
  const auto check = [&](int64_t set) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(
        const Bytes found_indptr,
        Read(stream, {reinterpret_cast<const std::byte*>(all_indptr + set * set_indptr), indptr.size() * 4}));
    PRISTINE_ASSIGN_OR_RETURN(const Bytes found,
                              Read(stream, {reinterpret_cast<const std::byte*>(all_indices + set * set_indices),
                                            static_cast<size_t>(set_indices) * 4}));
    PRISTINE_RETURN_IF_ERROR(Compare(absl::StrCat(result.cell, ", indptr"), found_indptr, AsBytes(indptr)));
    return Compare(absl::StrCat(result.cell, ", indices"), found, AsBytes(indices));
  };
  PRISTINE_RETURN_IF_ERROR(Measure(stream, options, bytes, launch, check, result));
  return result;
}

// --- the host's planner ---

Row MeasurePlan(const std::string& name, const Ints& lengths) {
  constexpr int kMultiprocessors = 132, kCalls = 64, kRounds = 400;
  attention::DecodePlanConfig config;
  const Extent bucket = {static_cast<int32_t>(lengths.size()), static_cast<int32_t>(lengths.size())};
  config.buckets = {bucket};
  config.q_heads = 32;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.page_size = 16;
  config.max_row_tokens = 1 << 20;
  std::vector<attention::WorkItem> items(MaxItems(config, bucket, kMultiprocessors));
  Ints indptr(lengths.size() + 1);
  std::vector<double> times;
  int64_t count = 0;
  for (int round = 0; round < kRounds; ++round) {
    const Timer timer;
    for (int call = 0; call < kCalls; ++call) {
      count += *PlanItems(config, bucket, kMultiprocessors, lengths, absl::MakeSpan(items), absl::MakeSpan(indptr));
    }
    times.push_back(timer.Microseconds() / kCalls);
  }
  return {.name = "DecodePlan, CPU",
          .cell = absl::StrCat(name, ", ", count / (kCalls * kRounds), " items"),
          .floor_us = 0,
          .min_us = *std::min_element(times.begin(), times.end()),
          .median_us = Median(times)};
}

std::vector<Row> MeasurePlans() {
  std::mt19937_64 random(3);
  Ints even(256, 1024), ragged(256), needle(256, 1024), large(256);
  for (int32_t& length : ragged) length = static_cast<int32_t>(random() % 8192);
  for (int32_t& length : large) length = static_cast<int32_t>(random() % 131072);
  needle[100] = 65536;
  return {MeasurePlan("256 requests of 1K", even), MeasurePlan("256 requests below 8K", ragged),
          MeasurePlan("256 requests below 128K", large), MeasurePlan("one of 64K among 255 of 1K", needle)};
}

absl::Status Run(const Options& options) {
  const auto wants = [&](const char* what) { return options.only.empty() || options.only == what; };
  const char* separator = "\n ";
  if (!options.json) {
    std::printf("%-22s %-44s %10s %10s %10s %8s\n", "op", "cell", "floor us", "min us", "median us", "of floor");
  } else {
    std::printf("{\"rows\": [");
  }
  if (wants("plan")) {
    for (const Row& row : MeasurePlans()) Print(options, row, separator);
  }
  if (wants("append") || wants("convert")) {
    PRISTINE_ASSIGN_OR_RETURN(const auto device, CreateCudaDevice(options.device));
    PRISTINE_RETURN_IF_ERROR(Cuda(cudaSetDevice(options.device), "cudaSetDevice"));
    PRISTINE_ASSIGN_OR_RETURN(const auto stream, device->CreateStream());
    if (wants("append")) {
      for (const int32_t heads : {1, 8}) {
        for (const int32_t tokens : {1, 64, 256, 4096, 65536}) {
          std::vector<AppendCell> cells = {{DType::kBFloat16, false, KvLayout::kNHD, heads, tokens},
                                           {DType::kBFloat16, true, KvLayout::kNHD, heads, tokens}};
          if (heads == 8) cells.push_back({DType::kBFloat16, false, KvLayout::kHND, heads, tokens});
          for (const AppendCell& cell : cells) {
            PRISTINE_ASSIGN_OR_RETURN(const Row row, MeasureAppend(*device, *stream, options, cell));
            Print(options, row, separator);
          }
        }
      }
    }
    if (wants("convert")) {
      for (const int32_t page_size : {1, 64}) {
        for (const int32_t topk : {16, 96}) {
          for (const int32_t requests : {1, 16, 64, 256, 1024}) {
            PRISTINE_ASSIGN_OR_RETURN(const Row row,
                                      MeasureConvert(*device, *stream, options, {page_size, requests, topk}));
            Print(options, row, separator);
          }
        }
      }
    }
  }
  if (options.json) std::printf("]}\n");
  return absl::OkStatus();
}

// False: `argument` is not one of ours.
bool Parse(const char* argument, Options& options) {
  if (std::strcmp(argument, "--json") == 0) return options.json = true;
  for (const char* only : {"append", "convert", "plan"}) {
    if (argument == absl::StrCat("--only=", only)) {
      options.only = only;
      return true;
    }
  }
  return NumberArgument(argument, "--samples=", 1, options.samples) ||
         NumberArgument(argument, "--device=", 0, options.device);
}

}  // namespace
}  // namespace pristine::benchmarks

int main(int argc, char** argv) {
  using namespace pristine::benchmarks;  // NOLINT(build/namespaces): all of it is this program
  return Main(argc, argv,
              "usage: append_convert_benchmark [--samples=N] [--device=N] [--only=append|convert|plan] [--json]\n",
              &Parse, &Run);
}
