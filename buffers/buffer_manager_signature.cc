// What ranks compare: the manager's part of a graph's signature.
#include "absl/strings/str_cat.h"
#include "buffers/manager_impl.h"

namespace pristine {

using buffers::BufferState;
using buffers::Chunk;
using buffers::GraphEntry;

namespace {

void AddOptions(const ManagerOptions& options, Signature& signature) {
  signature.AddNumber(static_cast<int64_t>(options.check));
  signature.AddNumber(options.sample_every);
  signature.AddNumber(static_cast<int64_t>(options.restore));
  signature.AddNumber(static_cast<int64_t>(options.on_violation));
  signature.AddNumber(static_cast<int64_t>(options.parameter_bytes));
  signature.AddNumber(options.staging_slots);
  signature.AddNumber(static_cast<int64_t>(options.late_refill_bytes));
  signature.AddNumber(options.poison_scratch ? 1 : 0);
}

void AddBuffer(const BufferState& buffer, Signature& signature) {
  const BufferSpec& spec = buffer.spec;
  signature.AddText(spec.name);
  signature.AddNumber(static_cast<int64_t>(spec.role));
  signature.AddNumber(static_cast<int64_t>(spec.kind));
  signature.AddNumber(static_cast<int64_t>(spec.axis.unit));
  signature.AddNumber(spec.axis.per);
  signature.AddNumber(buffer.record.capacity);
  signature.AddNumber(buffer.record.element_bytes);
  signature.AddNumber(spec.contract.min_length);
  signature.AddNumber(spec.contract.negative_ok ? 1 : 0);
  signature.AddNumber(spec.contract.reads_tail ? 1 : 0);
  signature.AddNumber(spec.only_bucket.has_value() ? spec.only_bucket->requests : -1);
  signature.AddNumber(spec.only_bucket.has_value() ? spec.only_bucket->tokens : -1);
  signature.AddNumber(spec.deltas ? 1 : 0);
  signature.AddNumber(static_cast<int64_t>(spec.derived_from.size()));
  for (const int source : spec.derived_from) signature.AddNumber(source);
}

}  // namespace

void BufferManager::Impl::AddToSignature(const GraphEntry& entry, Signature& signature) const {
  AddOptions(options, signature);
  signature.AddNumber(entry.bucket.requests);
  signature.AddNumber(entry.bucket.tokens);
  for (int c = 0; c < entry.chunks; ++c) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    signature.AddNumber(chunk.table.count);
    for (int i = 0; i < chunk.table.count; ++i) AddBuffer(*buffers[static_cast<size_t>(chunk.first + i)], signature);
  }
}

void BufferManager::AddToSignature(const RunInfo& info, Signature& signature) const {
  const int graph = impl_->FindEntry(info.graph, info.bucket);
  if (graph >= 0) impl_->AddToSignature(impl_->graphs[static_cast<size_t>(graph)], signature);
}

absl::StatusOr<uint64_t> BufferManager::SignatureHash(const Extent& bucket) const {
  const int graph = impl_->FindEntry("", bucket);
  if (graph < 0 || impl_->graphs[static_cast<size_t>(graph)].chunks == 0) {
    return absl::NotFoundError(absl::StrCat("SignatureHash: no prologue was recorded for bucket ", bucket.ToString(),
                                            " by an engine; GraphRunner::SignatureHash is for a runner's graphs"));
  }
  Signature signature;
  impl_->AddToSignature(impl_->graphs[static_cast<size_t>(graph)], signature);
  return signature.hash();
}

}  // namespace pristine
