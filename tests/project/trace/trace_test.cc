// One step as a profiler sees it: ranges capture, plan, refill and replay in the domain "pristine".
#include "pristine/graph_runtime/trace.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "pristine/attention/decode_plan.h"
#include "pristine/attention/step_metadata.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "tests/support/status_matchers.h"

namespace pristine {
namespace {

std::string TakeRecords() {
  void* recorder = dlopen(NVTX_RECORDER, RTLD_NOW | RTLD_NOLOAD);
  if (recorder == nullptr) return "the injection library was not loaded";
  const auto take = reinterpret_cast<void (*)(char*, size_t)>(dlsym(recorder, "nvtx_recorder_take"));
  std::string records(1 << 16, '\0');
  take(records.data(), records.size());
  records.resize(records.find('\0'));
  dlclose(recorder);
  return records;
}

TEST(TraceTest, StepShowsAsRangesInTheDomainPristine) {
  ASSERT_EQ(setenv("NVTX_INJECTION64_PATH", NVTX_RECORDER, 1), 0);  // read at the first range
  ASSERT_OK_AND_ASSIGN(auto device, CreateHostDevice({.enforce_accesses = true}));
  ASSERT_OK_AND_ASSIGN(auto stream, device->CreateStream());
  ASSERT_OK_AND_ASSIGN(auto manager, BufferManager::Create(*device));
  ASSERT_OK_AND_ASSIGN(
      auto metadata,
      attention::StepMetadata::Create(
          *manager, {.max_requests = 2, .max_tokens = 2, .num_pages = 64, .max_step_pages = 32, .max_length = 16}));
  ASSERT_OK_AND_ASSIGN(auto plan, attention::DecodePlan::Create(*manager, {.buckets = {{2, 2}},
                                                                           .q_heads = 2,
                                                                           .kv_heads = 1,
                                                                           .head_dim = 64,
                                                                           .max_row_tokens = 16,
                                                                           .derived_from = {}}));
  ASSERT_OK_AND_ASSIGN(auto seen, device->Allocate(2 * sizeof(int32_t), "seen"));
  ASSERT_OK_AND_ASSIGN(auto runner, GraphRunner::Create({.buckets = {{2, 2}}}, [&](Stream& s, const Extent&) {
                         return s.Copy(seen.As<std::byte>(), AsBytes(metadata->lengths().live));
                       }));
  ASSERT_OK(runner->AddHook(*manager));
  ASSERT_OK(runner->CaptureAll(*stream));
  const std::string capture = TakeRecords();
  EXPECT_EQ(capture.substr(0, capture.find('\n')), "domain pristine");
  EXPECT_NE(capture.find("\npush capture\n"), std::string::npos) << capture;

  ASSERT_OK(manager->BeginStep({2, 2}, {1, 1}));
  const std::vector<int32_t> lengths = {3}, kv_indptr = {0, 3}, kv_indices = {1, 2, 3}, slots = {3}, positions = {2};
  ASSERT_OK(metadata->Refill({lengths, kv_indptr, kv_indices, slots, positions}));
  const std::string refill = TakeRecords();
  EXPECT_NE(refill.find("push refill\n"), std::string::npos) << refill;
  ASSERT_OK(plan->Plan({2, 2}, lengths));
  const std::string planned = TakeRecords();
  EXPECT_NE(planned.find("push plan\n"), std::string::npos) << planned;
  ASSERT_OK(runner->Replay(*stream, {2, 2}, {1, 1}));
  const std::string replay = TakeRecords();
  EXPECT_NE(replay.find("push replay\n"), std::string::npos) << replay;
  ASSERT_OK(stream->Synchronize());

  const std::string all = capture + refill + planned + replay;
  const auto count = [&](const std::string& word) {
    int found = 0;
    for (size_t at = all.find(word); at != std::string::npos; at = all.find(word, at + 1)) ++found;
    return found;
  };
  EXPECT_EQ(count("push "), count("pop\n")) << "every range ends\n" << all;
  EXPECT_EQ(count("another domain"), 0) << all;
}

}  // namespace
}  // namespace pristine
