// The fuzz targets over their corpus, without libFuzzer: what a fuzzer once found stays found with any compiler.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_targets.h"

namespace pristine::testing {
namespace {

struct Target {
  const char* name;
  void (*run)(const uint8_t*, size_t);
};
constexpr Target kTargets[] = {{"azure_csv", FuzzAzureCsv},
                               {"mooncake_jsonl", FuzzMooncakeJsonl},
                               {"options", FuzzOptions},
                               {"refill", FuzzRefill}};
void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

class FuzzCorpus : public ::testing::TestWithParam<Target> {};

TEST_P(FuzzCorpus, BreaksNoPromise) {
  std::filesystem::path folder = std::filesystem::path(PRISTINE_FUZZ_CORPUS) / GetParam().name;
  if (!std::filesystem::exists(folder)) {  // run on another machine, in a copy of the tree
    folder = std::filesystem::path("tests/fuzz/corpus") / GetParam().name;
  }
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::stringstream text;
    text << std::ifstream(entry.path(), std::ios::binary).rdbuf();
    const std::string input = text.str();
    SCOPED_TRACE(entry.path().string());
    GetParam().run(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    // And cut short anywhere, which is what files are that somebody still writes.
    const size_t step = std::max<size_t>(1, input.size() / 64);
    for (size_t size = 0; size < input.size(); size += step) {
      GetParam().run(reinterpret_cast<const uint8_t*>(input.data()), size);
    }
    ++files;
  }
  EXPECT_GE(files, 3);
}
INSTANTIATE_TEST_SUITE_P(Targets, FuzzCorpus, ::testing::ValuesIn(kTargets),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace pristine::testing
