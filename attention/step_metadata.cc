#include "pristine/attention/step_metadata.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

absl::Status Validate(const StepMetadataConfig& config) {
  const std::pair<const char*, int32_t> sizes[] = {
      {"max_requests", config.max_requests}, {"max_tokens", config.max_tokens}, {"page_size", config.page_size},
      {"num_pages", config.num_pages},       {"max_length", config.max_length}, {"worst_length", config.worst_length}};
  for (const auto& [what, size] : sizes) {
    if (size < 1) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": ", what, " is ", size, ", must be at least 1"));
    }
  }
  if (config.max_requests == kMaxInt32) {  // an indptr has one entry more
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": max_requests is ", config.max_requests, ", must be less"));
  }
  if (config.worst_length > config.max_length) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": worst_length is ", config.worst_length,
                                                   ", must be at most max_length ", config.max_length));
  }
  if (config.dummy_page < 0 || config.dummy_page >= config.num_pages) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": dummy_page is ", config.dummy_page,
                                                   ", must be in [0, num_pages = ", config.num_pages, ")"));
  }
  if (config.state_slots < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.name, ": state_slots is ", config.state_slots, ", must be at least 0 (0: none)"));
  }
  if (int64_t{config.num_pages} * config.page_size > kMaxInt32) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": num_pages * page_size is ",
                                                   int64_t{config.num_pages} * config.page_size,
                                                   " slots, must be at most ", kMaxInt32));
  }
  if (config.block_table_width != 0) {
    const int32_t needed = (config.max_length - 1) / config.page_size + 1, most = kMaxInt32 / config.max_requests;
    if (config.block_table_width < needed || config.block_table_width > most) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": block_table_width is ", config.block_table_width,
                                                     ", must be in [", needed, " (the pages of max_length), ", most,
                                                     "], or 0: none"));
    }
    if (config.max_step_pages == 0) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": max_step_pages is ", config.max_step_pages,
                                                   ", must be 0 with a block table, which stands for kv_indices"));
  }
  const int64_t pages = int64_t{config.max_requests} * ((int64_t{config.worst_length} - 1) / config.page_size + 1);
  if (config.max_step_pages < pages) {
    return absl::InvalidArgumentError(absl::StrCat(config.name, ": max_step_pages is ", config.max_step_pages,
                                                   ", the worst case (max_requests of worst_length) needs ", pages));
  }
  return absl::OkStatus();
}

absl::Status CheckSize(const StepMetadataConfig& config, const char* what, size_t found, int64_t expected,
                       const char* why) {
  if (static_cast<int64_t>(found) == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(config.name, ".", what, " has ", found, " values, must have ", expected, " (", why, ")"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepMetadata>> StepMetadata::Create(BufferManager& manager,
                                                                   const StepMetadataConfig& given) {
  StepMetadataConfig config = given;
  if (config.worst_length == 0) config.worst_length = config.max_length;
  PRISTINE_RETURN_IF_ERROR(Validate(config));
  std::unique_ptr<StepMetadata> metadata(new StepMetadata(manager, config));

  RegistrationScope registration(manager);
  PRISTINE_RETURN_IF_ERROR(metadata->Register());
  registration.Keep();
  return metadata;
}

absl::Status StepMetadata::Register() {
  const StepMetadataConfig& config = config_;
  const auto add = [this](Buffer<int32_t>& buffer, const BufferSpec& spec,
                          const std::vector<int32_t>& original) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(buffer, manager_.Register<int32_t>(spec, original));
    return absl::OkStatus();
  };
  const std::vector<int32_t> lengths(config.max_requests, config.worst_length);
  const std::vector<int32_t> slots(config.max_tokens, -1);
  const std::vector<int32_t> positions(config.max_tokens, 0);

  PRISTINE_RETURN_IF_ERROR(add(lengths_,
                               {.name = config.name + ".lengths",
                                .role = Role::kRefilled,
                                .kind = Kind::kLength,
                                .axis = Axis::Requests(),
                                .limit = config.max_length},
                               lengths));
  if (config.block_table_width > 0) {
    staging_.assign(static_cast<size_t>(config.max_requests) * config.block_table_width, config.dummy_page);
    PRISTINE_RETURN_IF_ERROR(add(block_table_,
                                 {.name = config.name + ".block_table",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kPageTable,
                                  .axis = Axis::Rows(config.block_table_width),
                                  .limit = config.num_pages,
                                  .dummy = config.dummy_page},
                                 staging_));
  } else {
    const int32_t pages_each = (config.worst_length - 1) / config.page_size + 1;
    std::vector<int32_t> indptr(config.max_requests + 1);
    for (int32_t i = 0; i <= config.max_requests; ++i) indptr[i] = i * pages_each;
    const std::vector<int32_t> pages(config.max_step_pages, config.dummy_page);
    PRISTINE_RETURN_IF_ERROR(add(kv_indptr_,
                                 {.name = config.name + ".kv_indptr",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kIndptr,
                                  .axis = Axis::RequestsPlusOne(),
                                  .limit = config.max_step_pages},
                                 indptr));
    PRISTINE_RETURN_IF_ERROR(add(kv_indices_,
                                 {.name = config.name + ".kv_indices",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kPageTable,
                                  .axis = Axis::Pages(),
                                  .limit = config.num_pages,
                                  .dummy = config.dummy_page},
                                 pages));
  }
  PRISTINE_RETURN_IF_ERROR(add(slots_,
                               {.name = config.name + ".slots",
                                .role = Role::kRefilled,
                                .kind = Kind::kSlot,
                                .axis = Axis::Tokens(),
                                .limit = config.num_pages * config.page_size},
                               slots));
  PRISTINE_RETURN_IF_ERROR(add(positions_,
                               {.name = config.name + ".positions",
                                .role = Role::kRefilled,
                                .kind = Kind::kPosition,
                                .axis = Axis::Tokens(),
                                .limit = config.max_length},
                               positions));
  if (config.ragged) {
    // Evenly spaced: the last of max_requests ends at max_tokens.
    std::vector<int32_t> qo_indptr(config.max_requests + 1);
    for (int32_t i = 0; i <= config.max_requests; ++i) {
      qo_indptr[i] = static_cast<int32_t>(int64_t{config.max_tokens} * i / config.max_requests);
    }
    PRISTINE_RETURN_IF_ERROR(add(qo_indptr_,
                                 {.name = config.name + ".qo_indptr",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kIndptr,
                                  .axis = Axis::RequestsPlusOne(),
                                  .limit = config.max_tokens},
                                 qo_indptr));
  }
  if (config.state_slots > 0) {
    PRISTINE_RETURN_IF_ERROR(add(state_slots_,
                                 {.name = config.name + ".state_slots",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kSlot,
                                  .axis = Axis::Requests(),
                                  .limit = config.state_slots},
                                 std::vector<int32_t>(config.max_requests, -1)));
  }
  return absl::OkStatus();
}

absl::Status StepMetadata::CheckSizes(const StepValues& values) const {
  const int64_t requests = static_cast<int64_t>(values.lengths.size()), width = config_.block_table_width;
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "kv_indptr", values.kv_indptr.size(), width > 0 ? 0 : requests + 1,
                                     width > 0 ? "a block table stands for it" : "one more than lengths"));
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "kv_indices", values.kv_indices.size(),
                                     width > 0 ? 0 : values.kv_indptr.back(),
                                     width > 0 ? "a block table stands for it" : "the last value of kv_indptr"));
  PRISTINE_RETURN_IF_ERROR(
      CheckSize(config_, "block_table", values.block_table.size(), requests * width,
                width > 0 ? "block_table_width for each of lengths" : "config.block_table_width is 0"));
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "positions", values.positions.size(),
                                     static_cast<int64_t>(values.slots.size()), "as many as slots"));
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "qo_indptr", values.qo_indptr.size(),
                                     config_.ragged ? static_cast<int64_t>(values.lengths.size()) + 1 : 0,
                                     config_.ragged ? "one more than lengths" : "config.ragged is false"));
  if (config_.ragged && values.qo_indptr.back() != static_cast<int64_t>(values.slots.size())) {
    return absl::InvalidArgumentError(absl::StrCat(config_.name, ".qo_indptr ends at ", values.qo_indptr.back(),
                                                   ", must end at the number of slots, ", values.slots.size()));
  }
  const bool stateful = config_.state_slots > 0;
  return CheckSize(config_, "state_slots", values.state_slots.size(), stateful ? requests : 0,
                   stateful ? "as many as lengths" : "config.state_slots is 0");
}

absl::Status StepMetadata::RefillBlockTable(const StepValues& values) {
  const int32_t width = config_.block_table_width;
  for (size_t r = 0; r < values.lengths.size(); ++r) {
    // A length out of range is the device's to report.
    const int64_t pages = (std::max(values.lengths[r], 0) + int64_t{config_.page_size} - 1) / config_.page_size;
    const auto from = values.block_table.begin() + r * width;
    const auto to = staging_.begin() + r * width;
    const int64_t real = std::min<int64_t>(pages, width);
    std::copy(from, from + real, to);
    std::fill(to + real, to + width, config_.dummy_page);
  }
  return manager_.Refill(block_table_, absl::MakeConstSpan(staging_).first(values.block_table.size()));
}

absl::Status StepMetadata::Refill(const StepValues& values) {
  PRISTINE_RETURN_IF_ERROR(CheckSizes(values));
  // First: no more lengths than there is room for.
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(lengths_, values.lengths));
  if (config_.block_table_width > 0) {
    PRISTINE_RETURN_IF_ERROR(RefillBlockTable(values));
  } else {
    PRISTINE_RETURN_IF_ERROR(manager_.Refill(kv_indptr_, values.kv_indptr));
    PRISTINE_RETURN_IF_ERROR(manager_.Refill(kv_indices_, values.kv_indices));
  }
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(slots_, values.slots));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(positions_, values.positions));
  if (config_.ragged) {
    PRISTINE_RETURN_IF_ERROR(manager_.Refill(qo_indptr_, values.qo_indptr));
  }
  return config_.state_slots > 0 ? manager_.Refill(state_slots_, values.state_slots) : absl::OkStatus();
}

}  // namespace pristine::attention
