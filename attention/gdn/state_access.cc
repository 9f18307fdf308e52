#include "pristine/attention/gdn/state_access.h"

#include <functional>

#include "absl/strings/str_cat.h"
#include "attention/gdn/check.h"
#include "attention/gdn/kernels/state_copy.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::attention::gdn {
namespace {

void StateCopyWrites(const StateCopyParams& p, WriteList& writes) {
  const bool gather = p.gathered_indices != nullptr;
  const int32_t last = gather ? p.rows - 1 : p.slots - 1;
  const int64_t stride = gather ? p.gathered_stride : p.pool_stride;
  writes.Add(gather ? p.gathered : p.pool,
             static_cast<size_t>(last * stride + p.elements) * SizeOf(gather ? p.gathered_dtype : p.pool_dtype));
  if (gather) writes.Add(p.gathered_indices, static_cast<size_t>(p.rows) * sizeof(int32_t));
}

constexpr Kernel<StateCopyParams> Named(const char* name) {
  return {name, &StateCopyHost, PRISTINE_CUDA(&StateCopyCuda), &StateCopyWrites};
}
constexpr Kernel<StateCopyParams> kGather = Named("gdn_gather_states");
constexpr Kernel<StateCopyParams> kScatter = Named("gdn_scatter_states");

bool Overlap(DeviceSpan<const std::byte> a, DeviceSpan<const std::byte> b) {
  const std::less<const std::byte*> before;
  return before(a.address(), b.address() + b.size()) && before(b.address(), a.address() + a.size());
}

absl::Status Check(const char* op, int32_t rows, DeviceSpan<const int32_t> cache_indices, const StateView& pool,
                   const StateView& gathered, StateCopyParams& params) {
  constexpr int32_t kMaxRows = 65535;  // of a grid's y
  if (rows < 1 || rows > kMaxRows) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": rows is ", rows, ", must be in [1, ", kMaxRows, "]"));
  }
  PRISTINE_RETURN_IF_ERROR(CheckStates(op, "pool", pool, pool.v_heads));
  PRISTINE_RETURN_IF_ERROR(CheckStates(op, "gathered", gathered, pool.v_heads, rows));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(op, "cache_indices", cache_indices.address(), cache_indices.bytes(),
                                       sizeof(int32_t), rows, sizeof(int32_t)));
  if (Overlap(pool.states, gathered.states)) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": pool and gathered overlap, must be memory of their own"));
  }
  params.pool = pool.states.address();
  params.gathered = gathered.states.address();
  params.cache_indices = cache_indices.address();
  params.pool_stride = pool.slot_stride;
  params.gathered_stride = gathered.slot_stride;
  params.elements = pool.v_heads * kStateElements;
  params.rows = rows;
  params.slots = pool.slots;
  params.pool_dtype = pool.dtype;
  params.gathered_dtype = gathered.dtype;
  params.clamp_to_zero = pool.padded_rows == PaddedRows::kClampToZero;
  return absl::OkStatus();
}

}  // namespace

StateAccessPolicy ChooseStateAccess(const DeviceCaps& caps, DType state_dtype, AccessRule rule) {
  const bool pool = rule == AccessRule::kMeasured || caps.backend == Backend::kHost || caps.sm_major >= 10;
  if (pool) return {StateAccess::kInPlace, state_dtype};
  return {StateAccess::kGatherScatter, DType::kFloat32};
}

absl::Status GatherStates(Stream& stream, int32_t rows, DeviceSpan<const int32_t> cache_indices, const StateView& pool,
                          const StateView& gathered, DeviceSpan<int32_t> gathered_indices) {
  StateCopyParams params = {};
  PRISTINE_RETURN_IF_ERROR(Check(kGather.name, rows, cache_indices, pool, gathered, params));
  PRISTINE_RETURN_IF_ERROR(CheckTensor(kGather.name, "gathered_indices", gathered_indices.address(),
                                       gathered_indices.bytes(), sizeof(int32_t), rows, sizeof(int32_t)));
  if (Overlap(AsBytes(gathered_indices), AsBytes(cache_indices))) {
    return absl::InvalidArgumentError(
        absl::StrCat(kGather.name, ": gathered_indices and cache_indices overlap, must be memory of their own"));
  }
  params.gathered_indices = gathered_indices.address();
  return Launch(stream, kGather, params);
}

absl::Status ScatterStates(Stream& stream, int32_t rows, DeviceSpan<const int32_t> cache_indices,
                           const StateView& gathered, const StateView& pool) {
  StateCopyParams params = {};
  PRISTINE_RETURN_IF_ERROR(Check(kScatter.name, rows, cache_indices, pool, gathered, params));
  return Launch(stream, kScatter, params);
}

}  // namespace pristine::attention::gdn
