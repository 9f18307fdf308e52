#include "pristine/attention/sparse_page_table.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/kernels/sparse_to_csr.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void SparseToCsrWrites(const SparseToCsrParams& p, WriteList& writes) {
  writes.Add(p.indptr, (static_cast<size_t>(p.rows) + 1) * sizeof(int32_t));
  writes.Add(p.indices, static_cast<size_t>(p.rows) * p.row_bound * sizeof(int32_t));
  writes.Add(p.reports.count, sizeof(*p.reports.count));
  writes.Add(p.reports.records, p.reports.capacity * sizeof(*p.reports.records));
}

constexpr Kernel<SparseToCsrParams> kSparseToCsr = {"sparse_page_table", &SparseToCsrHost,
                                                    PRISTINE_CUDA(&SparseToCsrCuda), &SparseToCsrWrites};

absl::Status Validate(const SparseConfig& config, const StepMetadataConfig& step) {
  const std::pair<const char*, int32_t> positive[] = {
      {"groups", config.groups}, {"block", config.block}, {"topk", config.topk}};
  for (const auto& [what, value] : positive) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": ", what, " is ", value, ", must be at least 1"));
    }
  }
  if (config.dense_len < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": dense_len is ", config.dense_len, ", must be at least 0"));
  }
  const int64_t tokens = int64_t{config.topk} * config.block;
  const int64_t bound = std::max<int64_t>(config.dense_len - 1, tokens);
  const int64_t rows = int64_t{config.groups} * step.max_requests;
  const std::pair<const char*, int64_t> sizes[] = {
      {"topk * block", tokens},
      {"groups * max_requests * R", rows > kMaxInt32 ? rows : rows * bound},
      {"groups * max_requests * topk", rows > kMaxInt32 ? rows : rows * config.topk},
      {"groups * num_pages * page_size", int64_t{config.groups} * (int64_t{step.num_pages} * step.page_size)}};
  for (const auto& [what, size] : sizes) {
    if (size > kMaxInt32) {
      return absl::InvalidArgumentError(
          absl::StrCat(config.name, ": ", what, " is ", size, ", must be at most ", kMaxInt32));
    }
  }
  if (SparseRowLength(config, step.worst_length) != bound) {
    return absl::InvalidArgumentError(absl::StrCat(
        config.name, ": rows have up to R = ", bound, " tokens, but ", step.name, ".worst_length = ", step.worst_length,
        " gives ", SparseRowLength(config, step.worst_length), "; captures must see the worst case"));
  }
  return absl::OkStatus();
}

}  // namespace

int32_t SparseRowBound(const SparseConfig& config) {
  return std::max(config.dense_len - 1, config.topk * config.block);
}

int32_t SparseRowLength(const SparseConfig& config, int32_t length) {
  const int32_t attended = config.topk * config.block;
  if (length < config.dense_len || length <= attended) return length;
  if (length % config.block == 0) return attended;
  return attended - config.block + length % config.block;
}

absl::StatusOr<std::unique_ptr<SparsePageTable>> SparsePageTable::Create(BufferManager& manager, StepMetadata& metadata,
                                                                         const SparseConfig& config) {
  PRISTINE_RETURN_IF_ERROR(Validate(config, metadata.config()));
  std::unique_ptr<SparsePageTable> sparse(new SparsePageTable(manager, metadata, config));
  const int32_t rows = config.groups * metadata.config().max_requests;
  const int32_t bound = SparseRowBound(config);
  sparse->staging_.resize(static_cast<size_t>(rows) + 1);
  for (int32_t row = 0; row <= rows; ++row) sparse->staging_[row] = row * bound;

  RegistrationScope registration(manager);
  BufferSpec spec = {.name = config.name + ".kv_indptr",
                     .role = Role::kRefilled,
                     .kind = Kind::kIndptr,
                     .axis = Axis::RequestsPlusOne(config.groups),
                     .limit = rows * bound};
  const absl::Span<const int32_t> worst = sparse->staging_;
  PRISTINE_ASSIGN_OR_RETURN(sparse->kv_indptr_, manager.Register<int32_t>(spec, worst));
  spec.name = config.name + ".kv_indptr_ws";
  spec.role = Role::kRestored;
  PRISTINE_ASSIGN_OR_RETURN(sparse->kv_indptr_ws_, manager.Register<int32_t>(spec, worst));

  const std::vector<int32_t> indices(static_cast<size_t>(rows) * bound, 0);
  PRISTINE_ASSIGN_OR_RETURN(
      sparse->kv_indices_,
      manager.Register<int32_t>({.name = config.name + ".kv_indices", .role = Role::kScratch}, indices));
  registration.Keep();
  return sparse;
}

absl::StatusOr<Buffer<int32_t>> SparsePageTable::RegisterTable(const std::string& name) {
  const StepMetadataConfig& step = metadata_.config();
  const std::vector<int32_t> blocks(size_t{1} * config_.groups * step.max_requests * config_.topk, 0);
  return manager_.Register<int32_t>({.name = name,
                                     .role = Role::kRefilled,
                                     .kind = Kind::kPageTable,
                                     .axis = Axis::Rows(config_.topk, config_.groups),
                                     .limit = (step.max_length - 1) / config_.block + 1},
                                    blocks);
}

absl::Status SparsePageTable::Refill(absl::Span<const int32_t> plan_lengths) {
  if (plan_lengths.size() >= staging_.size()) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ": ", plan_lengths.size(), " plan lengths, at most ",
                                                   staging_.size() - 1, " rows are registered"));
  }
  int64_t sum = 0;
  staging_[0] = 0;
  for (size_t i = 0; i < plan_lengths.size(); ++i) {
    if (plan_lengths[i] < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(config_.name, ": plan length ", i, " is ", plan_lengths[i], ", must be at least 0"));
    }
    sum += plan_lengths[i];
    if (sum > kMaxInt32) {
      return absl::InvalidArgumentError(
          absl::StrCat(config_.name, ": plan lengths add up to ", sum, " at ", i, ", must be at most ", kMaxInt32));
    }
    staging_[i + 1] = static_cast<int32_t>(sum);
  }
  return manager_.Refill(kv_indptr_, absl::MakeConstSpan(staging_).first(plan_lengths.size() + 1));
}

absl::Status SparsePageTable::Run(Stream& stream, const Extent& bucket, const Buffer<int32_t>& table) const {
  const StepMetadataConfig& step = metadata_.config();
  if (bucket.requests < 1 || bucket.requests > step.max_requests) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ": bucket ", bucket.ToString(),
                                                   " must have 1 to max_requests = ", step.max_requests, " requests"));
  }
  const int32_t rows = config_.groups * bucket.requests;
  if (static_cast<int64_t>(table.live.size()) < int64_t{rows} * config_.topk) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ": table ", manager_.name(table.id), " has ",
                                                   table.live.size(), " values, needs ", int64_t{rows} * config_.topk));
  }
  const SparseToCsrParams params = {.lengths = metadata_.lengths().live.address(),
                                    .page_indptr = metadata_.kv_indptr().live.address(),
                                    .page_indices = metadata_.kv_indices().live.address(),
                                    .table = table.live.address(),
                                    .indptr = kv_indptr_ws_.live.address(),
                                    .indices = kv_indices_.live.address(),
                                    .reports = manager_.report_ring(bucket),
                                    .lengths_id = metadata_.lengths().id,
                                    .rows = rows,
                                    .row_bound = SparseRowBound(config_),
                                    .groups = config_.groups,
                                    .block = config_.block,
                                    .topk = config_.topk,
                                    .dense_len = config_.dense_len,
                                    .max_length = step.max_length,
                                    .page_size = step.page_size,
                                    .page_indices_size = step.max_step_pages,
                                    .num_pages = step.num_pages,
                                    .dummy_page = step.dummy_page};
  PRISTINE_RETURN_IF_ERROR(Launch(stream, kSparseToCsr, params));
  return manager_.CheckEqual(stream, kv_indptr_, kv_indptr_ws_, bucket);
}

}  // namespace pristine::attention
