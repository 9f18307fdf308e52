#include "pristine/attention/merge_states.h"

#include <cstddef>
#include <limits>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "attention/kernels/merge.h"
#include "attention/merge_variants.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

constexpr int32_t kMaxHeads = 65535;
constexpr uintptr_t kAlignment = 16;  // of vector loads
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Takes `steps` * `stride` from `left`; false if it is not there. No product that overflows.
bool Take(int64_t steps, int64_t stride, int64_t& left) {
  if (steps == 0) return true;
  if (stride > left / steps) return false;
  left -= steps * stride;
  return true;
}

// Who is asked about: merge_state: a. Two texts and no string, so that a call that goes well allocates nothing.
struct Name {
  const char* op;
  const char* tensor;
  std::string Text() const { return absl::StrCat(op, ": ", tensor); }
};

absl::Status CheckAligned(const Name& name, const char* part, const void* address, uintptr_t alignment) {
  if (address != nullptr && reinterpret_cast<uintptr_t>(address) % alignment == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name.Text(), part, " must be aligned to ", alignment, " bytes and not null"));
}

// Checks one tensor pair against `rows` > 0 rows, and puts strides where 0 stood. StatesT: States or MutableStates.
template <class StatesT>
absl::Status Resolve(const Name& name, const MergeShape& shape, int64_t rows, bool needs_lse, StatesT& states) {
  const int64_t element = static_cast<int64_t>(SizeOf(shape.dtype));
  const int64_t row = int64_t{shape.heads} * shape.head_dim;
  if (states.v_stride == 0) states.v_stride = row;
  if (states.lse_stride == 0) states.lse_stride = shape.heads;
  if (states.lse_head_stride == 0) states.lse_head_stride = 1;
  if (states.v_stride < row || states.v_stride % (static_cast<int64_t>(kAlignment) / element) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name.Text(), ".v_stride is ", states.v_stride,
                                                   ", must be 0 or at least heads * head_dim = ", row,
                                                   " and a multiple of ", static_cast<int64_t>(kAlignment) / element));
  }
  if (states.lse_stride < 1 || states.lse_head_stride < 1) {
    return absl::InvalidArgumentError(absl::StrCat(name.Text(), ".lse_stride is ", states.lse_stride,
                                                   " and lse_head_stride ", states.lse_head_stride,
                                                   ", both must be at least 0"));
  }
  const int64_t v_size = static_cast<int64_t>(states.v.bytes()) / element;
  int64_t left = v_size - row;
  if (left < 0 || !Take(rows - 1, states.v_stride, left)) {
    return absl::InvalidArgumentError(absl::StrCat(name.Text(), ".v has ", v_size, " elements, needs ", rows,
                                                   " rows of ", row, ", ", states.v_stride, " apart"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckAligned(name, ".v", states.v.address(), kAlignment));
  if (!needs_lse && states.lse.empty()) return absl::OkStatus();
  left = static_cast<int64_t>(states.lse.size()) - 1;
  if (left < 0 || !Take(rows - 1, states.lse_stride, left) || !Take(shape.heads - 1, states.lse_head_stride, left)) {
    return absl::InvalidArgumentError(absl::StrCat(name.Text(), ".lse has ", states.lse.size(), " elements, needs ",
                                                   rows, " rows, ", states.lse_stride, " apart, of ", shape.heads,
                                                   " heads, ", states.lse_head_stride, " apart"));
  }
  return CheckAligned(name, ".lse", states.lse.address(), sizeof(float));
}

// A written element has one writer: the strides of an output must not fold rows and heads onto each other.
absl::Status CheckDistinct(const Name& name, const MergeShape& shape, int64_t rows, const MutableStates& out) {
  if (out.lse.empty() || rows == 1 || shape.heads == 1) return absl::OkStatus();
  // Resolve has seen that the products fit.
  if (out.lse_stride > (shape.heads - 1) * out.lse_head_stride || out.lse_head_stride > (rows - 1) * out.lse_stride) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(name.Text(), ".lse_stride ", out.lse_stride, " and lse_head_stride ",
                                                 out.lse_head_stride, " put several of ", rows, " rows and ",
                                                 shape.heads, " heads at one place"));
}

MergeInput Input(const States& states) {
  return {.v = states.v.address(),
          .lse = reinterpret_cast<const float*>(states.lse.address()),
          .v_stride = states.v_stride,
          .lse_stride = states.lse_stride,
          .lse_head_stride = states.lse_head_stride};
}
MergeOutput Output(const MutableStates& states) {
  return {.v = states.v.address(),
          .lse = states.lse.empty() ? nullptr : reinterpret_cast<float*>(states.lse.address()),
          .v_stride = states.v_stride,
          .lse_stride = states.lse_stride,
          .lse_head_stride = states.lse_head_stride};
}

// What every merge checks first.
absl::StatusOr<const MergeVariant*> CheckCall(const char* op, const MergeShape& shape, int32_t rows,
                                              const ReportRing& reports) {
  if (rows < 0) return absl::InvalidArgumentError(absl::StrCat(op, ": rows is ", rows, ", must be at least 0"));
  if (shape.heads < 1 || shape.heads > kMaxHeads) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": heads is ", shape.heads, ", must be in [1, ", kMaxHeads, "]"));
  }
  if (reports.records == nullptr || reports.count == nullptr || reports.capacity == 0) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": reports is empty, must be a BufferManager's report_ring"));
  }
  const MergeVariant* const variant = FindMergeVariant(shape.dtype, shape.head_dim);
  if (variant == nullptr) {
    return absl::UnimplementedError(absl::StrCat(op, ": no kernel for ", ToString(shape.dtype), " with head_dim ",
                                                 shape.head_dim, "; there are ", MergeVariantNames()));
  }
  return variant;
}

absl::Status LaunchPair(Stream& stream, const MergeVariant& variant, const MergeShape& shape,
                        const MergePairParams& params) {
  const bool block_per_token =
      ChooseMergeForm(shape.dtype, shape.head_dim, shape.heads, params.rows) == MergeForm::kBlockPerToken;
  return Launch(stream, block_per_token ? variant.block_per_token : variant.token_head, params);
}

absl::Status LaunchSets(Stream& stream, const char* op, const MergeVariant& variant, const MergeShape& shape,
                        States states, MutableStates out, MergeSetsParams params) {
  if (params.num_states > 0) {
    PRISTINE_RETURN_IF_ERROR(Resolve({op, "states"}, shape, params.num_states, true, states));
  }
  PRISTINE_RETURN_IF_ERROR(Resolve({op, "out"}, shape, params.rows, false, out));
  PRISTINE_RETURN_IF_ERROR(CheckDistinct({op, "out"}, shape, params.rows, out));
  params.states = Input(states);
  params.out = Output(out);
  params.heads = shape.heads;
  params.head_dim = shape.head_dim;
  return Launch(stream, variant.sets, params);
}

void ConvertLseWrites(const ConvertLseParams& p, WriteList& writes) {
  writes.Add(p.to, static_cast<size_t>(p.count) * sizeof(float));
}
constexpr Kernel<ConvertLseParams> kConvertLse = {"convert_lse", &ConvertLseHost, PRISTINE_CUDA(&ConvertLseCuda),
                                                  &ConvertLseWrites};

absl::Status LaunchConvert(Stream& stream, size_t from_size, size_t to_size, const ConvertLseParams& params) {
  if (from_size != to_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("convert_lse: from has ", from_size, " elements, to has ", to_size, ", both must have as many"));
  }
  if (from_size == 0) return absl::OkStatus();
  PRISTINE_RETURN_IF_ERROR(CheckAligned({"convert_lse", "from"}, "", params.from, sizeof(float)));
  PRISTINE_RETURN_IF_ERROR(CheckAligned({"convert_lse", "to"}, "", params.to, sizeof(float)));
  return Launch(stream, kConvertLse, params);
}

float ValueOf(EmptyLse empty) { return empty == EmptyLse::kPlusInfinity ? kInfinity : -kInfinity; }

}  // namespace

absl::Status MergeState(Stream& stream, const MergeShape& shape, int32_t rows, const States& a, const States& b,
                        const MutableStates& out, const ReportRing& reports) {
  PRISTINE_ASSIGN_OR_RETURN(const MergeVariant* const variant, CheckCall("merge_state", shape, rows, reports));
  if (rows == 0) return absl::OkStatus();
  States first = a, second = b;
  MutableStates merged = out;
  PRISTINE_RETURN_IF_ERROR(Resolve({"merge_state", "a"}, shape, rows, true, first));
  PRISTINE_RETURN_IF_ERROR(Resolve({"merge_state", "b"}, shape, rows, true, second));
  PRISTINE_RETURN_IF_ERROR(Resolve({"merge_state", "out"}, shape, rows, false, merged));
  PRISTINE_RETURN_IF_ERROR(CheckDistinct({"merge_state", "out"}, shape, rows, merged));
  return LaunchPair(stream, *variant, shape,
                    {.a = Input(first),
                     .b = Input(second),
                     .out = Output(merged),
                     .mask = nullptr,
                     .rows = rows,
                     .heads = shape.heads,
                     .head_dim = shape.head_dim,
                     .reports = reports});
}

absl::Status MergeStateInPlace(Stream& stream, const MergeShape& shape, int32_t rows, const MutableStates& a,
                               const States& b, DeviceSpan<const uint8_t> mask, const ReportRing& reports) {
  PRISTINE_ASSIGN_OR_RETURN(const MergeVariant* const variant, CheckCall("merge_state_in_place", shape, rows, reports));
  if (rows == 0) return absl::OkStatus();
  MutableStates merged = a;
  States second = b;
  PRISTINE_RETURN_IF_ERROR(Resolve({"merge_state_in_place", "a"}, shape, rows, true, merged));
  PRISTINE_RETURN_IF_ERROR(CheckDistinct({"merge_state_in_place", "a"}, shape, rows, merged));
  PRISTINE_RETURN_IF_ERROR(Resolve({"merge_state_in_place", "b"}, shape, rows, true, second));
  if (!mask.empty() && (mask.address() == nullptr || static_cast<int64_t>(mask.size()) < rows)) {
    return absl::InvalidArgumentError(absl::StrCat("merge_state_in_place: mask has ", mask.size(),
                                                   " bytes, must be empty or have one for each of ", rows, " rows"));
  }
  const States first = {.v = merged.v,
                        .lse = merged.lse,
                        .v_stride = merged.v_stride,
                        .lse_stride = merged.lse_stride,
                        .lse_head_stride = merged.lse_head_stride};
  return LaunchPair(stream, *variant, shape,
                    {.a = Input(first),
                     .b = Input(second),
                     .out = Output(merged),
                     .mask = mask.empty() ? nullptr : mask.address(),
                     .rows = rows,
                     .heads = shape.heads,
                     .head_dim = shape.head_dim,
                     .reports = reports});
}

absl::Status MergeStates(Stream& stream, const MergeShape& shape, int32_t rows, int32_t states_per_row,
                         const States& states, const MutableStates& out, const ReportRing& reports) {
  PRISTINE_ASSIGN_OR_RETURN(const MergeVariant* const variant, CheckCall("merge_states", shape, rows, reports));
  if (states_per_row < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("merge_states: states_per_row is ", states_per_row, ", must be at least 0"));
  }
  if (rows == 0) return absl::OkStatus();
  MergeSetsParams params = {};
  params.num_states = int64_t{rows} * states_per_row;
  params.states_per_row = states_per_row;
  params.rows = rows;
  params.reports = reports;
  return LaunchSets(stream, "merge_states", *variant, shape, states, out, params);
}

absl::Status MergeRaggedStates(Stream& stream, const MergeShape& shape, int32_t rows, DeviceSpan<const int32_t> indptr,
                               int32_t num_states, const States& states, const MutableStates& out,
                               const ReportRing& reports) {
  PRISTINE_ASSIGN_OR_RETURN(const MergeVariant* const variant, CheckCall("merge_ragged_states", shape, rows, reports));
  if (num_states < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("merge_ragged_states: num_states is ", num_states, ", must be at least 0"));
  }
  if (rows == 0) return absl::OkStatus();
  if (static_cast<int64_t>(indptr.size()) < int64_t{rows} + 1) {
    return absl::InvalidArgumentError(absl::StrCat("merge_ragged_states: indptr has ", indptr.size(),
                                                   " elements, needs rows + 1 = ", int64_t{rows} + 1));
  }
  PRISTINE_RETURN_IF_ERROR(CheckAligned({"merge_ragged_states", "indptr"}, "", indptr.address(), sizeof(int32_t)));
  MergeSetsParams params = {};
  params.indptr = indptr.address();
  params.num_states = num_states;
  params.rows = rows;
  params.reports = reports;
  return LaunchSets(stream, "merge_ragged_states", *variant, shape, states, out, params);
}

absl::Status ConvertLse(Stream& stream, DeviceSpan<const LseNatural> from, EmptyLse empty, DeviceSpan<LseBase2> to) {
  return LaunchConvert(stream, from.size(), to.size(),
                       {.from = reinterpret_cast<const float*>(from.address()),
                        .to = reinterpret_cast<float*>(to.address()),
                        .count = static_cast<int64_t>(from.size()),
                        .factor = kLog2E,
                        .empty_from = ValueOf(empty),
                        .empty_to = -kInfinity});
}

absl::Status ConvertLse(Stream& stream, DeviceSpan<const LseBase2> from, DeviceSpan<LseNatural> to, EmptyLse empty) {
  return LaunchConvert(stream, from.size(), to.size(),
                       {.from = reinterpret_cast<const float*>(from.address()),
                        .to = reinterpret_cast<float*>(to.address()),
                        .count = static_cast<int64_t>(from.size()),
                        .factor = kLn2,
                        .empty_from = -kInfinity,
                        .empty_to = ValueOf(empty)});
}

}  // namespace pristine::attention
