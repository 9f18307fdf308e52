// Deltas: a page table that changes a little at each step.
//
// A row per request, a page per 4 tokens. A decode step adds at most one page per request, and now and then a request
// is done: the last row closes the gap. The engine says just that, with Update, MoveRow or Keep; the graph reads the
// whole table at each replay, its unused entries the dummy page.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "examples/device_option.h"
#include "pristine/buffers/buffer_manager.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::examples {
namespace {

constexpr int32_t kColumns = 6;
constexpr int32_t kPageTokens = 4;
constexpr int32_t kDummyPage = 0;
constexpr Extent kBucket = {4, 4};

struct Request {
  char name;
  int32_t tokens;
  int32_t done_at;  // step
  std::vector<int32_t> pages = {};
};

std::string ToText(const std::vector<int32_t>& table, size_t rows) {
  std::string text;
  for (size_t i = 0; i < rows * kColumns; ++i) {
    absl::StrAppend(&text, i % kColumns == 0 && i > 0 ? " |" : "", i > 0 ? " " : "",
                    table[i] == kDummyPage ? "." : std::to_string(table[i]));
  }
  return text;
}

absl::Status Run(int argc, char** argv) {
  PRISTINE_ASSIGN_OR_RETURN(auto device, DeviceFromArgs(argc, argv));
  PRISTINE_ASSIGN_OR_RETURN(auto stream, device->CreateStream());
  PRISTINE_ASSIGN_OR_RETURN(auto manager, BufferManager::Create(*device));
  const BufferSpec spec = {.name = "page_table",
                           .role = Role::kRefilled,
                           .kind = Kind::kPageTable,
                           .axis = Axis::Rows(kColumns),
                           .limit = 100,
                           .dummy = kDummyPage,
                           .deltas = true};
  const std::vector<int32_t> original(size_t{4} * kColumns, kDummyPage);
  PRISTINE_ASSIGN_OR_RETURN(auto table, manager->Register<int32_t>(spec, original));
  PRISTINE_ASSIGN_OR_RETURN(auto seen, device->Allocate(table.live.bytes(), "seen"));
  auto body = [&](Stream& s, const Extent&) { return s.Copy(seen.As<std::byte>(), AsBytes(table.live)); };
  PRISTINE_ASSIGN_OR_RETURN(auto runner, GraphRunner::Create({.name = "decode", .buckets = {kBucket}}, body));
  PRISTINE_RETURN_IF_ERROR(runner->AddHook(*manager));
  PRISTINE_RETURN_IF_ERROR(runner->CaptureAll(*stream));

  std::vector<Request> requests = {{'a', 3, 9}, {'b', 7, 4}, {'c', 11, 9}, {'d', 4, 6}};
  int32_t next_page = 1;
  std::printf("%s\nstep  calls                             page table as the graph saw it\n", device->name().c_str());
  for (int32_t step = 1; step <= 8; ++step) {
    std::string calls;
    // Who is done leaves; the last row takes the place.
    const auto done =
        std::find_if(requests.begin(), requests.end(), [&](const Request& r) { return r.done_at == step; });
    const int64_t gap = done - requests.begin(), last = static_cast<int64_t>(requests.size()) - 1;
    const bool leaves = done != requests.end();
    if (leaves) {
      *done = requests.back();
      requests.pop_back();
    }
    const Extent extent = {static_cast<int32_t>(requests.size()), static_cast<int32_t>(requests.size())};
    PRISTINE_RETURN_IF_ERROR(manager->BeginStep(kBucket, extent));
    if (leaves && gap < last) {
      PRISTINE_RETURN_IF_ERROR(manager->MoveRow(table, last, gap));
      absl::StrAppend(&calls, "MoveRow(", last, ", ", gap, ") ");
    }
    std::vector<BufferManager::Range> ranges;
    std::vector<int32_t> pages;
    for (size_t row = 0; row < requests.size(); ++row) {
      Request& request = requests[row];
      const int64_t first = static_cast<int64_t>(row) * kColumns + static_cast<int64_t>(request.pages.size());
      ++request.tokens;
      const size_t had = request.pages.size();
      while (static_cast<int32_t>(request.pages.size()) * kPageTokens < request.tokens) {
        request.pages.push_back(next_page++);
        pages.push_back(request.pages.back());
      }
      if (request.pages.size() > had) ranges.push_back({first, static_cast<int64_t>(request.pages.size() - had)});
    }
    if (ranges.empty() && !leaves) {
      PRISTINE_RETURN_IF_ERROR(manager->Keep(table));
      calls = "Keep()";
    } else {  // without a range it only says that the rest is as it was
      PRISTINE_RETURN_IF_ERROR(manager->Update<int32_t>(table, ranges, pages));
      absl::StrAppend(&calls, "Update(", pages.size(), pages.size() == 1 ? " page)" : " pages)");
    }
    PRISTINE_RETURN_IF_ERROR(runner->Replay(*stream, kBucket, extent));

    std::vector<int32_t> found(original.size());
    PRISTINE_RETURN_IF_ERROR(
        stream->CopyToHost({reinterpret_cast<std::byte*>(found.data()), seen.bytes()}, seen.As<const std::byte>()));
    PRISTINE_RETURN_IF_ERROR(stream->Synchronize());
    std::vector<int32_t> expected(original.size(), kDummyPage);
    for (size_t row = 0; row < requests.size(); ++row) {
      std::copy(requests[row].pages.begin(), requests[row].pages.end(), expected.begin() + row * kColumns);
    }
    calls.resize(32, ' ');
    std::printf("%4d  %s  %s\n", step, calls.c_str(), ToText(found, kBucket.requests).c_str());
    if (found != expected) return absl::DataLossError("the graph saw another table than the engine has");
  }
  PRISTINE_ASSIGN_OR_RETURN(const std::vector<Violation> violations, manager->Verify(*stream));
  return violations.empty() ? absl::OkStatus() : absl::DataLossError(violations[0].ToString());
}

}  // namespace
}  // namespace pristine::examples

int main(int argc, char** argv) {
  const absl::Status status = pristine::examples::Run(argc, argv);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
