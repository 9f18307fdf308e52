#include "pristine/attention/step_metadata.h"

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
      {"max_requests", config.max_requests}, {"max_tokens", config.max_tokens},
      {"page_size", config.page_size},       {"num_pages", config.num_pages},
      {"max_length", config.max_length},     {"max_step_pages", config.max_step_pages},
      {"worst_length", config.worst_length}};
  for (const auto& [what, size] : sizes) {
    if (size < 1) {
      return absl::InvalidArgumentError(absl::StrCat(config.name, ": ", what, " is ", size, ", must be at least 1"));
    }
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
  const int64_t pages = int64_t{config.max_requests} * ((int64_t{config.worst_length} - 1) / config.page_size + 1);
  if (pages > config.max_step_pages) {
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
  const auto add = [&](Buffer<int32_t>& buffer, const BufferSpec& spec,
                       const std::vector<int32_t>& original) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(buffer, manager.Register<int32_t>(spec, original));
    return absl::OkStatus();
  };
  const int32_t pages_each = (config.worst_length - 1) / config.page_size + 1;
  std::vector<int32_t> indptr(config.max_requests + 1);
  for (int32_t i = 0; i <= config.max_requests; ++i) indptr[i] = i * pages_each;
  const std::vector<int32_t> lengths(config.max_requests, config.worst_length);
  const std::vector<int32_t> pages(config.max_step_pages, config.dummy_page);
  const std::vector<int32_t> slots(config.max_tokens, -1);
  const std::vector<int32_t> positions(config.max_tokens, 0);

  PRISTINE_RETURN_IF_ERROR(add(metadata->lengths_,
                               {.name = config.name + ".lengths",
                                .role = Role::kRefilled,
                                .kind = Kind::kLength,
                                .axis = Axis::Requests(),
                                .limit = config.max_length},
                               lengths));
  PRISTINE_RETURN_IF_ERROR(add(metadata->kv_indptr_,
                               {.name = config.name + ".kv_indptr",
                                .role = Role::kRefilled,
                                .kind = Kind::kIndptr,
                                .axis = Axis::RequestsPlusOne(),
                                .limit = config.max_step_pages},
                               indptr));
  PRISTINE_RETURN_IF_ERROR(add(metadata->kv_indices_,
                               {.name = config.name + ".kv_indices",
                                .role = Role::kRefilled,
                                .kind = Kind::kPageTable,
                                .axis = Axis::Pages(),
                                .limit = config.num_pages,
                                .dummy = config.dummy_page},
                               pages));
  PRISTINE_RETURN_IF_ERROR(add(metadata->slots_,
                               {.name = config.name + ".slots",
                                .role = Role::kRefilled,
                                .kind = Kind::kSlot,
                                .axis = Axis::Tokens(),
                                .limit = config.num_pages * config.page_size},
                               slots));
  PRISTINE_RETURN_IF_ERROR(add(metadata->positions_,
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
    PRISTINE_RETURN_IF_ERROR(add(metadata->qo_indptr_,
                                 {.name = config.name + ".qo_indptr",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kIndptr,
                                  .axis = Axis::RequestsPlusOne(),
                                  .limit = config.max_tokens},
                                 qo_indptr));
  }
  if (config.state_slots > 0) {
    PRISTINE_RETURN_IF_ERROR(add(metadata->state_slots_,
                                 {.name = config.name + ".state_slots",
                                  .role = Role::kRefilled,
                                  .kind = Kind::kSlot,
                                  .axis = Axis::Requests(),
                                  .limit = config.state_slots},
                                 std::vector<int32_t>(config.max_requests, -1)));
  }
  registration.Keep();
  return metadata;
}

absl::Status StepMetadata::Refill(const StepValues& values) {
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "kv_indptr", values.kv_indptr.size(),
                                     static_cast<int64_t>(values.lengths.size()) + 1, "one more than lengths"));
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "kv_indices", values.kv_indices.size(), values.kv_indptr.back(),
                                     "the last value of kv_indptr"));
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
  PRISTINE_RETURN_IF_ERROR(CheckSize(config_, "state_slots", values.state_slots.size(),
                                     stateful ? static_cast<int64_t>(values.lengths.size()) : 0,
                                     stateful ? "as many as lengths" : "config.state_slots is 0"));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(lengths_, values.lengths));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(kv_indptr_, values.kv_indptr));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(kv_indices_, values.kv_indices));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(slots_, values.slots));
  PRISTINE_RETURN_IF_ERROR(manager_.Refill(positions_, values.positions));
  if (config_.ragged) {
    PRISTINE_RETURN_IF_ERROR(manager_.Refill(qo_indptr_, values.qo_indptr));
  }
  return stateful ? manager_.Refill(state_slots_, values.state_slots) : absl::OkStatus();
}

}  // namespace pristine::attention
