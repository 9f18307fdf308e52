#include "tests/support/early_op.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/graph.h"
#include "pristine/graph_runtime/launch.h"
#include "pristine/graph_runtime/status.h"
#include "tests/support/test_kernels.h"

namespace pristine::testing {
namespace {

constexpr size_t kAlignment = 256;
constexpr int64_t kLate = 200'000;  // nanoseconds: longer than it takes to launch three kernels

using Memory = std::vector<std::byte>;

absl::Status Upload(Stream& stream, const DeviceBuffer& to, const Memory& from) {
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(to.As<std::byte>().Sub(0, from.size()), from));
  return stream.Synchronize();
}

absl::StatusOr<Memory> Download(Stream& stream, const DeviceBuffer& from, size_t bytes) {
  Memory memory(bytes);
  PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(memory), from.As<const std::byte>().Sub(0, bytes)));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return memory;
}

// "" if equal.
std::string Difference(const char* what, const Memory& expected, const Memory& found) {
  if (expected == found) return "";
  size_t differ = 0, first = 0;
  for (size_t i = expected.size(); i-- > 0;) {
    if (expected[i] == found[i]) continue;
    ++differ;
    first = i;
  }
  return absl::StrCat(what, ": ", differ, " of ", expected.size(), " bytes differ, the first at ", first, "; ");
}

}  // namespace

absl::StatusOr<std::unique_ptr<EarlyOpRig>> EarlyOpRig::Create(Stream& stream, size_t bytes) {
  auto rig = std::unique_ptr<EarlyOpRig>(new EarlyOpRig(stream, bytes));
  const std::pair<DeviceBuffer*, const char*> buffers[] = {
      {&rig->memory_, "memory"}, {&rig->staged_, "staged"}, {&rig->ahead_, "ahead"}, {&rig->behind_, "behind"}};
  for (const auto& [buffer, name] : buffers) {
    PRISTINE_ASSIGN_OR_RETURN(*buffer, stream.device().Allocate(bytes, name));
  }
  return rig;
}

EarlyOpRig::~EarlyOpRig() { stream_.Synchronize().IgnoreError(); }

void EarlyOpRig::Clear() {
  late_.clear();
  early_.clear();
}

void* EarlyOpRig::PutBytes(const void* late, const void* early, size_t bytes) {
  const size_t at = late_.size(), end = (at + bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (end > bytes_) return nullptr;
  late_.resize(end);
  early_.resize(end);
  if (bytes > 0) {
    std::memcpy(late_.data() + at, late, bytes);
    std::memcpy(early_.data() + at, early, bytes);
  }
  return memory_.As<std::byte>().address() + at;
}

std::string EarlyOpRig::Check(absl::FunctionRef<absl::Status(Stream&)> op) {
  std::string wrong;
  const absl::Status status = RunAll(op, wrong);
  return status.ok() ? wrong : status.ToString();
}

absl::Status EarlyOpRig::RunAll(absl::FunctionRef<absl::Status(Stream&)> op, std::string& wrong) {
  const size_t bytes = late_.size();
  PRISTINE_RETURN_IF_ERROR(Upload(stream_, memory_, late_));
  PRISTINE_RETURN_IF_ERROR(op(stream_));
  PRISTINE_ASSIGN_OR_RETURN(const Memory expected, Download(stream_, memory_, bytes));
  if (expected == late_) absl::StrAppend(&wrong, "the op writes nothing; ");

  const auto address = [](const DeviceBuffer& buffer) { return buffer.As<int>().address(); };
  const auto count = static_cast<int64_t>(bytes / sizeof(int));
  for (const bool late_writer : {true, false}) {
    const auto body = [&](Stream& stream) -> absl::Status {
      const LateCopyParams ahead = late_writer ? LateCopyParams{address(memory_), address(staged_), count, kLate}
                                               : LateCopyParams{address(ahead_), address(memory_), count, kLate};
      PRISTINE_RETURN_IF_ERROR(Launch(stream, kLateCopy, ahead));
      PRISTINE_RETURN_IF_ERROR(op(stream));
      return Launch(stream, kNextCopy, {address(behind_), address(memory_), count});
    };
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<Graph> graph, Capture(stream_, body));
    PRISTINE_ASSIGN_OR_RETURN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
    for (const bool replayed : {false, true}) {
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, memory_, late_writer ? early_ : late_));
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, staged_, late_));
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, ahead_, early_));
      PRISTINE_RETURN_IF_ERROR(Upload(stream_, behind_, early_));
      PRISTINE_RETURN_IF_ERROR(replayed ? exec->Launch(stream_) : body(stream_));
      PRISTINE_ASSIGN_OR_RETURN(const Memory memory, Download(stream_, memory_, bytes));
      PRISTINE_ASSIGN_OR_RETURN(const Memory behind, Download(stream_, behind_, bytes));
      PRISTINE_ASSIGN_OR_RETURN(const Memory ahead, Download(stream_, ahead_, bytes));
      const std::string found =
          absl::StrCat(Difference("what it leaves", expected, memory),
                       Difference("what the reader behind it sees", expected, behind),
                       late_writer ? "" : Difference("what the reader ahead of it sees", late_, ahead));
      if (!found.empty()) {
        absl::StrAppend(&wrong, late_writer ? "late writer" : "late reader",
                        replayed ? ", replayed: " : ", eager: ", found);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace pristine::testing
