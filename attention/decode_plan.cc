#include "pristine/attention/decode_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/kernels/paged_decode.h"
#include "attention/kernels/plan_layout.h"
#include "attention/variants.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/trace.h"

namespace pristine::attention {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int32_t kMinChunk = 128;  // tokens; a smaller item costs more to merge than it saves
constexpr int32_t kChunkUnit = 16;

int64_t Rows(const DecodePlanConfig& config, const Extent& bucket) {
  return int64_t{config.rows_per_request} * bucket.requests;
}

// Of the grid that a device schedules on; 0 where the kernels' blocks do not share rows.
int32_t Blocks(const DecodePlanConfig& config, int multiprocessors) {
  const DecodeVariant* const variant =
      FindDecodeVariant(config.dtype, config.kv_dtype.value_or(config.dtype), config.head_dim);
  return variant == nullptr ? 0 : std::min(variant->blocks_per_multiprocessor * multiprocessors, kDecodeMaxBlocks);
}

int64_t MaxItems64(const DecodePlanConfig& config, const Extent& bucket, int multiprocessors) {
  const int64_t heads = std::max(1, config.kv_heads);
  return Rows(config, bucket) + (int64_t{2} * multiprocessors + heads - 1) / heads;
}

// The planned part of a row.
struct Planned {
  int32_t begin = 0, end = 0;
};
Planned PlannedRange(const DecodePlanConfig& config, int32_t length) {
  const int32_t end = std::min(length, config.max_row_tokens);
  const int64_t begin = config.window > 0 ? int64_t{end} - config.q_len + 1 - config.window : 0;
  return {static_cast<int32_t>(std::max<int64_t>(0, begin)), end};
}

// ceil(n / divisor) for n < 2^31 and divisor > 1, without a division: the planner asks some thousand times per step.
class CeilDivider {
 public:
  explicit CeilDivider(int32_t divisor)
      : before_(divisor - 1), reciprocal_(std::numeric_limits<uint64_t>::max() / static_cast<uint32_t>(divisor) + 1) {}
  int32_t operator()(int32_t n) const {
    const uint32_t sum = static_cast<uint32_t>(n) + before_;
    return static_cast<int32_t>((static_cast<unsigned __int128>(reciprocal_) * sum) >> 64);
  }

 private:
  uint32_t before_;
  uint64_t reciprocal_;
};

// Of rows of `sizes` tokens.
int64_t CountItems(absl::Span<const int32_t> sizes, int32_t chunk) {
  const CeilDivider items_of(chunk);
  int64_t count = 0;
  for (const int32_t size : sizes) count += items_of(size);
  return count;
}

absl::Status CheckLengths(const DecodePlanConfig& config, absl::Span<const int32_t> lengths) {
  int64_t sum = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int64_t next = sum + lengths[i];
    if (next < sum) {
      return absl::InvalidArgumentError(
          absl::StrCat(config.name, ": kv_indptr falls from ", sum, " at ", i, " to ", next, " at ", i + 1));
    }
    sum = next;
  }
  return absl::OkStatus();
}

absl::Status TooManyRows(const DecodePlanConfig& config, const Extent& bucket, size_t given) {
  return absl::InvalidArgumentError(
      absl::StrCat(config.name, ": ", given, " rows, bucket ", bucket.ToString(), " has ", Rows(config, bucket)));
}

// Moves the rows to the front that chunks in [short_chunk, long_chunk] cut into different numbers of items, and
// shortens `sizes` to them. Returns the items of the others.
int64_t KeepUndecided(int32_t short_chunk, int32_t long_chunk, absl::Span<int32_t>& sizes) {
  const CeilDivider most_of(short_chunk), fewest_of(long_chunk);
  int64_t decided = 0;
  size_t kept = 0;
  for (const int32_t size : sizes) {
    const int32_t fewest = fewest_of(size);
    const bool differs = most_of(size) != fewest;
    decided += differs ? 0 : fewest;
    sizes[kept] = size;
    kept += differs;
  }
  sizes = sizes.first(kept);
  return decided;
}

// The smallest chunk, in tokens, with which rows of `sizes` tokens need no more than `places` items. `places` is at
// least the number of rows, so a chunk as long as the longest row always does. `sizes` is left in no particular state.
int32_t SmallestChunk(const DecodePlanConfig& config, absl::Span<int32_t> sizes, int64_t places) {
  int64_t tokens = 0, rows = 0;
  int32_t longest = 0;
  for (const int32_t size : sizes) {
    tokens += size;
    longest = std::max(longest, size);
    rows += size > 0;
  }
  // Items start on page boundaries where there is no window.
  const int64_t unit = config.page_size * ((int64_t{kChunkUnit} - 1) / config.page_size + 1);
  const auto units = [unit](int64_t size) { return (size + unit - 1) / unit; };
  const auto chunk = [unit](int64_t count) { return static_cast<int32_t>(std::min(count * unit, kMaxInt32)); };
  // Fewer than tokens / places cannot do; tokens / (places - rows) does, since a row wastes less than one item.
  int64_t low = std::max(units(kMinChunk), units((tokens + places - 1) / places));
  int64_t high = units(longest);
  if (places > rows) high = std::min(high, units((tokens + places - rows - 1) / (places - rows)));
  high = std::max(high, low);
  // A pass over the rows is what costs. Rows waste half an item on average, which is a first guess; each pass tells
  // what they do waste, and so the next guess, made a bit too far until the chunk is between two that were tried. Few
  // rows are left that these two cut differently.
  int64_t probe = units(tokens / (places - rows / 2));
  int64_t margin = probe / 64 + 1;
  bool too_short = false, long_enough = false;
  while (low < high && !(too_short && long_enough)) {
    probe = std::min(std::max(probe, low), high - 1);
    const int64_t count = CountItems(sizes, chunk(probe));
    const double full = static_cast<double>(tokens) / static_cast<double>(chunk(probe));  // items, if none were wasted
    const double guess = static_cast<double>(tokens) / std::max(1.0, full + static_cast<double>(places - count));
    const int64_t next = units(static_cast<int64_t>(guess));
    if (count <= places) {
      high = probe;
      long_enough = true;
      probe = std::min(probe - 1, next - margin);
    } else {
      low = probe + 1;
      too_short = true;
      probe = std::max(probe + 1, next + margin);
    }
    margin *= 4;
  }
  if (low < high) places -= KeepUndecided(chunk(low - 1), chunk(high), sizes);
  while (low < high) {
    probe = (low + high) / 2;
    if (CountItems(sizes, chunk(probe)) <= places) {
      high = probe;
    } else {
      low = probe + 1;
    }
  }
  return chunk(low);
}

absl::Status Validate(const DecodePlanConfig& config, int multiprocessors) {
  const std::pair<const char*, int32_t> positive[] = {{"rows_per_request", config.rows_per_request},
                                                      {"q_len", config.q_len},
                                                      {"q_heads", config.q_heads},
                                                      {"kv_heads", config.kv_heads},
                                                      {"page_size", config.page_size},
                                                      {"max_row_tokens", config.max_row_tokens},
                                                      {"worst_row_tokens", config.worst_row_tokens}};
  for (const auto& [what, value] : positive) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": ", what, " is ", value, ", must be at least 1"));
    }
  }
  if (config.window < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": window is ", config.window, ", must be at least 0 (0: all)"));
  }
  if (config.worst_row_tokens > config.max_row_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": worst_row_tokens is ", config.worst_row_tokens,
                                                   ", must be at most max_row_tokens ", config.max_row_tokens));
  }
  if (config.q_heads % config.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": q_heads is ", config.q_heads,
                                                   ", must be a multiple of kv_heads ", config.kv_heads));
  }
  if (!(config.soft_cap >= 0) || !std::isfinite(config.soft_cap)) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": soft_cap is ", config.soft_cap, ", must be finite and at least 0 (0: none)"));
  }
  if (config.layout != KvLayout::kNHD && config.layout != KvLayout::kHND) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": layout is ", static_cast<int32_t>(config.layout), ", must be NHD or HND"));
  }
  if (config.q_len > kDecodeMaxQueries) {
    return absl::UnimplementedError(
        absl::StrCat(config.name, ": q_len is ", config.q_len, ", kernels take at most ", kDecodeMaxQueries));
  }
  if (config.q_heads / config.kv_heads > kDecodeMaxGroup) {
    return absl::UnimplementedError(absl::StrCat(config.name, ": ", config.q_heads / config.kv_heads,
                                                 " query heads per KV head, kernels take at most ", kDecodeMaxGroup));
  }
  if (config.kv_heads > 65535 || config.q_heads > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": q_heads is ", config.q_heads, ", must be at most 65535"));
  }
  const DType kv_dtype = config.kv_dtype.value_or(config.dtype);
  if (FindDecodeVariant(config.dtype, kv_dtype, config.head_dim) == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat(config.name, ": no kernel for ", ToString(config.dtype),
                     kv_dtype == config.dtype ? "" : absl::StrCat(" over ", ToString(kv_dtype)), " with head_dim ",
                     config.head_dim, "; there are ", DecodeVariantNames()));
  }
  if (config.buckets.empty()) return absl::InvalidArgumentError(absl::StrCat(config.name, ": no buckets"));
  for (size_t i = 0; i < config.buckets.size(); ++i) {
    const Extent& bucket = config.buckets[i];
    if (bucket.requests < 1 || bucket.tokens < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(config.name, ": bucket ", bucket.ToString(), " must have at least 1 of each"));
    }
    if (std::find(config.buckets.begin(), config.buckets.begin() + i, bucket) != config.buckets.begin() + i) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": bucket ", bucket.ToString(), " is given twice"));
    }
    if (Rows(config, bucket) > DecodeMaxRows(config.head_dim)) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": bucket ", bucket.ToString(), " has ",
                                                     Rows(config, bucket), " rows, must be at most ",
                                                     DecodeMaxRows(config.head_dim)));
    }
    const int32_t packed = config.q_heads / config.kv_heads * config.q_len;
    const int32_t tile =
        DecodeTile(static_cast<int32_t>(SizeOf(kv_dtype)), config.head_dim, DecodePassRows(config.head_dim, packed));
    const int64_t tiles = Rows(config, bucket) * DecodeUnits(config.kv_heads, config.head_dim, packed) *
                          ((int64_t{config.max_row_tokens} + tile - 1) / tile);
    if (config.scheduler == DecodeScheduler::kDevice) {
      if (tiles <= kMaxInt32) continue;
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": bucket ", bucket.ToString(), " has ", tiles,
                                                     " tiles of ", tile, " tokens at max_row_tokens ",
                                                     config.max_row_tokens, ", must be at most ", kMaxInt32));
    }
    const int64_t values =
        MaxItems64(config, bucket, multiprocessors) * config.q_len * config.q_heads * config.head_dim;
    if (values > kMaxInt32) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": bucket ", bucket.ToString(), " needs ", values,
                                                     " values of partial results, must be at most ", kMaxInt32));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int32_t MaxItems(const DecodePlanConfig& config, const Extent& bucket, int multiprocessors) {
  return static_cast<int32_t>(std::min(MaxItems64(config, bucket, multiprocessors), kMaxInt32));
}

absl::StatusOr<int32_t> PlanItems(const DecodePlanConfig& config, const Extent& bucket, int multiprocessors,
                                  absl::Span<const int32_t> lengths, absl::Span<WorkItem> items,
                                  absl::Span<int32_t> item_indptr) {
  const int64_t rows = Rows(config, bucket);
  const int64_t places = MaxItems(config, bucket, multiprocessors);
  if (static_cast<int64_t>(lengths.size()) > rows) return TooManyRows(config, bucket, lengths.size());
  if (static_cast<int64_t>(items.size()) < places || static_cast<int64_t>(item_indptr.size()) < rows + 1) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": room for ", items.size(), " items and ",
                                                   item_indptr.size(), " indptr values, needs ", places, " and ",
                                                   rows + 1));
  }
  PRISTINE_RETURN_IF_ERROR(CheckLengths(config, lengths));
  const absl::Span<int32_t> sizes = item_indptr.first(lengths.size());  // until it is written below
  for (size_t i = 0; i < lengths.size(); ++i) {
    const Planned planned = PlannedRange(config, lengths[i]);
    sizes[i] = planned.end - planned.begin;
  }
  const int32_t chunk = SmallestChunk(config, sizes, places);
  int32_t count = 0;
  item_indptr[0] = 0;
  for (int32_t row = 0; row < rows; ++row) {
    if (row < static_cast<int32_t>(lengths.size())) {
      const Planned planned = PlannedRange(config, lengths[row]);
      for (int64_t begin = planned.begin; begin < planned.end; begin += chunk) {
        items[count++] = {row, static_cast<int32_t>(begin),
                          static_cast<int32_t>(std::min<int64_t>(begin + chunk, planned.end))};
      }
    }
    item_indptr[row + 1] = count;
  }
  return count;
}

int64_t ScratchValues(const DecodePlanConfig& config, int multiprocessors) {
  if (config.scheduler == DecodeScheduler::kHost) {
    int64_t items = 0;
    for (const Extent& bucket : config.buckets) {
      items = std::max<int64_t>(items, MaxItems(config, bucket, multiprocessors));
    }
    return items * config.q_len * config.q_heads * (config.head_dim + 1);
  }
  const int64_t blocks = Blocks(config, multiprocessors);
  return 2 * blocks * (kDecodeTileRows * (config.head_dim + 1) + 1);
}

absl::StatusOr<std::unique_ptr<DecodePlan>> DecodePlan::Create(BufferManager& manager, const DecodePlanConfig& given) {
  DecodePlanConfig config = given;
  if (config.worst_row_tokens == 0) config.worst_row_tokens = config.max_row_tokens;
  if (!config.kv_dtype.has_value()) config.kv_dtype = config.dtype;
  PRISTINE_RETURN_IF_ERROR(Validate(config, manager.device().multiprocessors()));
  std::unique_ptr<DecodePlan> plan(new DecodePlan(manager, config));
  RegistrationScope registration(manager);
  if (config.scheduler == DecodeScheduler::kHost) {
    PRISTINE_RETURN_IF_ERROR(plan->RegisterHostPlans());
  } else {
    PRISTINE_RETURN_IF_ERROR(plan->RegisterDeviceScratch());
  }
  registration.Keep();
  return plan;
}

absl::Status DecodePlan::RegisterHostPlans() {
  const int multiprocessors = manager_.device().multiprocessors();
  int32_t most_items = 0;
  size_t most_words = 0;
  for (const Extent& bucket : config_.buckets) {
    const int32_t max_items = MaxItems(config_, bucket, multiprocessors);
    most_items = std::max(most_items, max_items);
    most_words = std::max<size_t>(most_words, PlanWords(static_cast<int32_t>(Rows(config_, bucket)), max_items));
  }
  staging_.resize(most_words);
  for (const Extent& bucket : config_.buckets) {
    Workspace workspace = {.bucket = bucket, .max_items = MaxItems(config_, bucket, multiprocessors), .values = {}};
    const std::vector<int32_t> worst(Rows(config_, bucket), config_.worst_row_tokens);
    PRISTINE_ASSIGN_OR_RETURN(const absl::Span<const int32_t> original, Fill(workspace, worst));
    PRISTINE_ASSIGN_OR_RETURN(
        workspace.values,
        manager_.Register<int32_t>({.name = absl::StrCat(config_.name, ".items_", bucket.requests, "_", bucket.tokens),
                                    .role = Role::kRefilled,
                                    .only_bucket = bucket,
                                    .derived_from = config_.derived_from},
                                   original));
    workspaces_.push_back(workspace);
  }
  return RegisterPartials(int64_t{most_items} * config_.q_len * config_.q_heads);
}

absl::Status DecodePlan::RegisterDeviceScratch() {
  for (const Extent& bucket : config_.buckets) workspaces_.push_back({.bucket = bucket, .max_items = 0, .values = {}});
  blocks_ = Blocks(config_, manager_.device().multiprocessors());
  if (blocks_ == 0) return absl::OkStatus();
  const std::vector<uint32_t> zeros(size_t{2} * blocks_);
  PRISTINE_ASSIGN_OR_RETURN(counters_,
                            manager_.Register<uint32_t>({.name = config_.name + ".counters", .role = Role::kRestored},
                                                        absl::MakeConstSpan(zeros)));
  return RegisterPartials(int64_t{2} * blocks_ * kDecodeTileRows);
}

absl::Status DecodePlan::RegisterPartials(int64_t count) {
  const std::vector<float> zeros(static_cast<size_t>(count) * config_.head_dim);
  PRISTINE_ASSIGN_OR_RETURN(partial_out_,
                            manager_.Register<float>({.name = config_.name + ".partial_out", .role = Role::kScratch},
                                                     absl::MakeConstSpan(zeros)));
  PRISTINE_ASSIGN_OR_RETURN(partial_lse_,
                            manager_.Register<float>({.name = config_.name + ".partial_lse", .role = Role::kScratch},
                                                     absl::MakeConstSpan(zeros).first(static_cast<size_t>(count))));
  return absl::OkStatus();
}

absl::StatusOr<absl::Span<const int32_t>> DecodePlan::Fill(const Workspace& workspace,
                                                           absl::Span<const int32_t> lengths) {
  static_assert(sizeof(WorkItem) == 3 * sizeof(int32_t));
  const int32_t rows = static_cast<int32_t>(Rows(config_, workspace.bucket));
  const absl::Span<int32_t> values =
      absl::MakeSpan(staging_).first(static_cast<size_t>(PlanWords(rows, workspace.max_items)));
  const absl::Span<WorkItem> items(reinterpret_cast<WorkItem*>(values.data() + PlanItemsAt(rows)),
                                   static_cast<size_t>(workspace.max_items));
  PRISTINE_ASSIGN_OR_RETURN(values[kPlanCount],
                            PlanItems(config_, workspace.bucket, manager_.device().multiprocessors(), lengths, items,
                                      values.subspan(kPlanItemIndptr, static_cast<size_t>(rows) + 1)));
  // The same plan is the same bytes.
  std::fill(items.begin() + values[kPlanCount], items.end(), WorkItem{0, 0, 0});
  return absl::Span<const int32_t>(values);
}

absl::Status DecodePlan::Plan(const Extent& bucket, absl::Span<const int32_t> lengths) {
  const ScopedRange range("plan");
  const Workspace* workspace = Find(bucket);
  if (workspace == nullptr) {
    return absl::NotFoundError(absl::StrCat(config_.name, ": no plan for bucket ", bucket.ToString()));
  }
  if (lengths.size() % static_cast<size_t>(config_.rows_per_request) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ": ", lengths.size(),
                                                   " rows, must be a multiple of rows_per_request ",
                                                   config_.rows_per_request));
  }
  if (config_.scheduler == DecodeScheduler::kDevice) {
    if (static_cast<int64_t>(lengths.size()) > Rows(config_, bucket)) {
      return TooManyRows(config_, bucket, lengths.size());
    }
    return CheckLengths(config_, lengths);
  }
  PRISTINE_ASSIGN_OR_RETURN(const absl::Span<const int32_t> values, Fill(*workspace, lengths));
  return manager_.Refill(workspace->values, values);
}

const DecodePlan::Workspace* DecodePlan::Find(const Extent& bucket) const {
  for (const Workspace& workspace : workspaces_) {
    if (workspace.bucket == bucket) return &workspace;
  }
  return nullptr;
}

}  // namespace pristine::attention
