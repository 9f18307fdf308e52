#include "pristine/attention/append_kv.h"

#include "absl/strings/str_cat.h"
#include "attention/kernels/append_kv.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention {
namespace {

void AppendKvWrites(const AppendKvParams& p, WriteList& writes) {
  writes.Add(p.k, p.num_slots * p.row_bytes);
  writes.Add(p.v, p.num_slots * p.row_bytes);
}

constexpr Kernel<AppendKvParams> kAppendKv = {"append_kv", &AppendKvHost, PRISTINE_CUDA(&AppendKvCuda),
                                              &AppendKvWrites};

absl::Status CheckBytes(const char* what, const void* address, size_t found, int64_t needed) {
  if (static_cast<int64_t>(found) < needed) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: ", what, " has ", found, " bytes, needs ", needed));
  }
  if (needed > 0 && (address == nullptr || reinterpret_cast<uintptr_t>(address) % 4 != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: ", what, " must be aligned to 4 bytes and not null"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status AppendKv(Stream& stream, int32_t tokens, const AppendKvTensors& tensors) {
  if (tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: tokens is ", tokens, ", must be at least 0"));
  }
  if (tensors.kv_heads < 1 || tensors.head_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("append_kv: kv_heads is ", tensors.kv_heads, " and head_dim ",
                                                   tensors.head_dim, ", both must be at least 1"));
  }
  const int64_t row_bytes = int64_t{tensors.kv_heads} * tensors.head_dim * static_cast<int64_t>(SizeOf(tensors.dtype));
  if (row_bytes % 4 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_kv: a row has ", row_bytes, " bytes, must be a multiple of 4"));
  }
  if (tokens == 0) return absl::OkStatus();
  const int64_t needed = tokens * row_bytes;
  PRISTINE_RETURN_IF_ERROR(CheckBytes("k_new", tensors.k_new.address(), tensors.k_new.bytes(), needed));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("v_new", tensors.v_new.address(), tensors.v_new.bytes(), needed));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("slots", tensors.slots.address(), tensors.slots.bytes(), int64_t{tokens} * 4));
  PRISTINE_RETURN_IF_ERROR(CheckBytes("k", tensors.k.address(), tensors.k.bytes(), row_bytes));
  PRISTINE_RETURN_IF_ERROR(
      CheckBytes("v", tensors.v.address(), tensors.v.bytes(), tensors.k.bytes() / row_bytes * row_bytes));
  return Launch(stream, kAppendKv,
                AppendKvParams{.k_new = tensors.k_new.address(),
                               .v_new = tensors.v_new.address(),
                               .slots = tensors.slots.address(),
                               .k = tensors.k.address(),
                               .v = tensors.v.address(),
                               .num_slots = static_cast<int64_t>(tensors.k.bytes()) / row_bytes,
                               .row_bytes = row_bytes,
                               .tokens = tokens});
}

}  // namespace pristine::attention
