// The functions that the Python package calls. Names, texts and extents come as they are; what they mean is checked
// here and below, so that each mistake is an error of Pristine's with the value in it.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <array>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "python/src/handles.h"
#include "python/src/status.h"

namespace pristine::python {
namespace {

namespace ffi = tvm::ffi;

int32_t Int32(const char* what, int64_t value) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    ThrowIfError(absl::InvalidArgumentError(absl::StrCat(what, " is ", value, "; it must fit in 32 bits")));
  }
  return static_cast<int32_t>(value);
}

Extent ToExtent(int64_t requests, int64_t tokens) { return {Int32("requests", requests), Int32("tokens", tokens)}; }

template <class E, size_t N>
E Named(const char* what, const ffi::String& text, const std::pair<const char*, E> (&names)[N]) {
  std::string accepted;
  for (const auto& [name, value] : names) {
    if (text == name) return value;
    absl::StrAppend(&accepted, accepted.empty() ? "" : ", ", name);
  }
  ThrowIfError(absl::InvalidArgumentError(absl::StrCat(what, " is \"", std::string(text), "\"; one of ", accepted)));
  return names[0].second;
}

constexpr std::pair<const char*, Role> kRoles[] = {{"constant", Role::kConstant},
                                                   {"restored", Role::kRestored},
                                                   {"refilled", Role::kRefilled},
                                                   {"scratch", Role::kScratch}};
constexpr std::pair<const char*, Kind> kKinds[] = {
    {"indptr", Kind::kIndptr},     {"length", Kind::kLength}, {"page_table", Kind::kPageTable}, {"slot", Kind::kSlot},
    {"position", Kind::kPosition}, {"mask", Kind::kMask},     {"opaque", Kind::kOpaque}};
constexpr std::pair<const char*, Axis::Unit> kUnits[] = {{"fixed", Axis::Unit::kFixed},
                                                         {"requests", Axis::Unit::kRequests},
                                                         {"requests_plus_one", Axis::Unit::kRequestsPlusOne},
                                                         {"tokens", Axis::Unit::kTokens},
                                                         {"pages", Axis::Unit::kPages}};
constexpr std::pair<const char*, ManagerOptions::Check> kChecks[] = {{"off", ManagerOptions::Check::kOff},
                                                                     {"sampled", ManagerOptions::Check::kSampled},
                                                                     {"always", ManagerOptions::Check::kAlways}};
constexpr std::pair<const char*, ManagerOptions::Restore> kRestores[] = {
    {"graph_head", ManagerOptions::Restore::kGraphHead},
    {"stream", ManagerOptions::Restore::kStream},
    {"off", ManagerOptions::Restore::kOff}};
constexpr std::pair<const char*, OnViolation> kOnViolation[] = {
    {"neutralise", OnViolation::kNeutralise}, {"record", OnViolation::kRecord}, {"trap", OnViolation::kTrap}};

// --- device ----------------------------------------------------------------------------------------------------------

ffi::String CudaBuild() {
#ifdef PRISTINE_WHEEL_CUDA
  return PRISTINE_WHEEL_CUDA;
#else
  return "";
#endif
}

DeviceRef CreateHost() { return DeviceRef(ffi::make_object<DeviceObj>(Take(CreateHostDevice()), DLDevice{kDLCPU, 0})); }
DeviceRef CreateCuda(int64_t ordinal) {
  const int32_t number = Int32("CUDA device", ordinal);
  return DeviceRef(ffi::make_object<DeviceObj>(Take(CreateCudaDevice(number)), DLDevice{kDLCUDA, number}));
}
ffi::String DeviceName(const DeviceRef& device) { return device->device->name(); }
void Synchronize(const DeviceRef& device) { ThrowIfError(device->device->Synchronize()); }

// --- set-up ----------------------------------------------------------------------------------------------------------

ManagerRef CreateManager(const DeviceRef& device, const ffi::String& check, int64_t sample_every,
                         const ffi::String& restore, const ffi::String& on_violation, int64_t parameter_bytes,
                         int64_t staging_slots, int64_t late_refill_bytes, bool poison_scratch) {
  ManagerOptions options;
  options.check = Named("check", check, kChecks);
  options.sample_every = Int32("sample_every", sample_every);
  options.restore = Named("restore", restore, kRestores);
  options.on_violation = Named("on_violation", on_violation, kOnViolation);
  options.parameter_bytes = static_cast<size_t>(parameter_bytes);  // a negative one is refused as too large
  options.staging_slots = Int32("staging_slots", staging_slots);
  options.late_refill_bytes = static_cast<size_t>(late_refill_bytes);  // the same
  options.poison_scratch = poison_scratch;
  return ManagerRef(Take(ManagerObj::Create(device, options)));
}

int64_t Adopt(const ManagerRef& manager, const ffi::String& name, const ffi::Tensor& tensor,
              const ffi::Optional<ffi::Tensor>& original, int64_t stream, const ffi::String& role,
              const ffi::String& kind, const ffi::String& unit, int64_t per, int64_t limit, int64_t dummy,
              int64_t min_length, bool negative_ok, bool reads_tail, const ffi::Array<int64_t>& only_bucket,
              const ffi::Array<int64_t>& derived_from) {
  const ManagerObj::Call call(*manager.get());
  BufferSpec spec;
  spec.name = name;
  spec.role = Named("role", role, kRoles);
  spec.kind = Named("kind", kind, kKinds);
  spec.axis = {Named("axis", unit, kUnits), Int32("axis per", per)};
  spec.limit = Int32("limit", limit);
  spec.dummy = Int32("dummy", dummy);
  spec.contract = {Int32("min_length", min_length), negative_ok, reads_tail};
  if (only_bucket.size() == 2) spec.only_bucket = ToExtent(only_bucket[0], only_bucket[1]);
  for (const int64_t id : derived_from) spec.derived_from.push_back(Int32("derived_from", id));
  return Take(manager->Adopt(spec, tensor, original.has_value() ? std::optional(*original) : std::nullopt, stream));
}

void Seal(const ManagerRef& manager) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().Seal());
}

// --- each step -------------------------------------------------------------------------------------------------------

void BeginStep(const ManagerRef& manager, int64_t bucket_requests, int64_t bucket_tokens, int64_t requests,
               int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().BeginStep(ToExtent(bucket_requests, bucket_tokens), ToExtent(requests, tokens)));
}

void Refill(const ManagerRef& manager, int64_t id, const ffi::Tensor& values) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->Refill(Int32("buffer", id), values));
}

void Keep(const ManagerRef& manager, int64_t id) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().Keep(Buffer<std::byte>{Int32("buffer", id), {}}));
}

void WaitForSlot(const ManagerRef& manager) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().WaitForSlot());
}

void RecordPrologue(const ManagerRef& manager, int64_t stream, int64_t requests, int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().RecordPrologue(*Take(manager->StreamOf(stream)), ToExtent(requests, tokens)));
}

void BeforeReplay(const ManagerRef& manager, int64_t stream, int64_t bucket_requests, int64_t bucket_tokens,
                  int64_t requests, int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().BeforeReplay(*Take(manager->StreamOf(stream)),
                                               ToExtent(bucket_requests, bucket_tokens), ToExtent(requests, tokens)));
}

void AttachExec(const ManagerRef& manager, int64_t requests, int64_t tokens, int64_t graph, int64_t exec) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().AttachExec(ToExtent(requests, tokens), reinterpret_cast<void*>(graph),
                                             reinterpret_cast<void*>(exec)));
}

void DetachExec(const ManagerRef& manager, int64_t requests, int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().DetachExec(ToExtent(requests, tokens)));
}

// --- restore and check -----------------------------------------------------------------------------------------------

void Restore(const ManagerRef& manager, int64_t stream) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().Restore(*Take(manager->StreamOf(stream))));
}

void RestoreAll(const ManagerRef& manager, int64_t stream, int64_t requests, int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  ThrowIfError(manager->manager().RestoreAll(*Take(manager->StreamOf(stream)), ToExtent(requests, tokens)));
}

ffi::Array<ffi::Any> Row(const Violation& violation) {
  return {ffi::String(ToString(violation.kind)),
          ffi::String(violation.buffer),
          violation.index,
          violation.expected,
          violation.actual,
          ffi::String(violation.graph),
          int64_t{violation.bucket.requests},
          int64_t{violation.bucket.tokens},
          violation.replay,
          ffi::String(violation.node),
          ffi::String(violation.ToString())};
}

// None when there is nothing: a step that is clean makes no objects.
ffi::Optional<ffi::Array<ffi::Array<ffi::Any>>> Poll(const ManagerRef& manager) {
  const ManagerObj::Call call(*manager.get());
  std::array<Violation, 16> found;
  size_t count = manager->manager().Poll(absl::MakeSpan(found));
  if (count == 0) return std::nullopt;
  ffi::Array<ffi::Array<ffi::Any>> rows;
  for (; count > 0; count = manager->manager().Poll(absl::MakeSpan(found))) {
    for (size_t i = 0; i < count; ++i) rows.push_back(Row(found[i]));
  }
  return rows;
}

ffi::Array<ffi::Array<ffi::Any>> Verify(const ManagerRef& manager, int64_t stream) {
  const ManagerObj::Call call(*manager.get());
  ffi::Array<ffi::Array<ffi::Any>> rows;
  for (const Violation& violation : Take(manager->manager().Verify(*Take(manager->StreamOf(stream))))) {
    rows.push_back(Row(violation));
  }
  return rows;
}

int64_t Generation(const ManagerRef& manager, int64_t id) {
  const ManagerObj::Call call(*manager.get());
  return manager->manager().generation(Int32("buffer", id));
}

int64_t SignatureHash(const ManagerRef& manager, int64_t requests, int64_t tokens) {
  const ManagerObj::Call call(*manager.get());
  return static_cast<int64_t>(Take(manager->manager().SignatureHash(ToExtent(requests, tokens))));
}

ffi::Array<int64_t> Stats(const ManagerRef& manager) {
  const ManagerObj::Call call(*manager.get());
  const BufferManager::Stats stats = manager->manager().stats();
  return {stats.replays, stats.restored_bytes, stats.expected_writes,
          stats.healed,  stats.neutralised,    stats.lost_reports};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_build, CudaBuild);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_host, CreateHost);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_cuda, CreateCuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_name, DeviceName);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(synchronize, Synchronize);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_manager, CreateManager);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adopt, Adopt);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(seal, Seal);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(begin_step, BeginStep);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(refill, Refill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(keep, Keep);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(wait_for_slot, WaitForSlot);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_prologue, RecordPrologue);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(before_replay, BeforeReplay);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attach_exec, AttachExec);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(detach_exec, DetachExec);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(restore, Restore);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(restore_all, RestoreAll);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(poll, Poll);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(verify, Verify);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(generation, Generation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(signature_hash, SignatureHash);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stats, Stats);

}  // namespace pristine::python
