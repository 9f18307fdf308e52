// Runs the driver in this process and keeps what it printed.
#ifndef PRISTINE_TESTS_DRIVER_RUN_DRIVER_H_
#define PRISTINE_TESTS_DRIVER_RUN_DRIVER_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/replay_driver/driver.h"
#include "tests/driver/json.h"

namespace pristine::testing {

using replay_driver::ExitCode;

inline std::string UniquePath(const std::string& extension) {
  static std::atomic<int> next{0};
  return absl::StrCat(::testing::TempDir(), "pristine_driver_", getpid(), "_", next++, extension);
}

// A file with `text`, removed at the end.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& extension, const std::string& text) : path_(UniquePath(extension)) {
    std::ofstream(path_) << text;
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

struct DriverResult {
  ExitCode code;
  std::string out, err;
  Json report;  // empty: none was written
};

struct DriverSetting {
  HostOptions::Run host_run = HostOptions::Run::kEager;
  std::function<absl::Status(Stream&, replay_driver::DecodeModel&)> after_replay = nullptr;
  bool terminal = false;
};

// A small model that keeps the bug: rows of 33 to 64 tokens, a window of 64.
inline std::vector<std::string> SmallModel() {
  return {"--max-batch=8",   "--kv-tokens=32768", "--sparse-block=32",
          "--topk-blocks=2", "--window=64",       "--compare-rows=32"};
}

inline std::vector<std::string> operator+(std::vector<std::string> args, const std::vector<std::string>& more) {
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

inline DriverResult RunDriver(std::vector<std::string> args, DriverSetting setting = {}) {
  const TemporaryFile report(".json", "");
  args.push_back(absl::StrCat("--report=", report.path()));
  std::ostringstream out, err;
  DriverResult result;
  result.code = replay_driver::RunDriver(args, {.out = out,
                                                .err = err,
                                                .terminal = setting.terminal,
                                                .host_run = setting.host_run,
                                                .enforce_accesses = true,
                                                .after_replay = setting.after_replay});
  result.out = out.str();
  result.err = err.str();
  std::stringstream text;
  text << std::ifstream(report.path()).rdbuf();
  if (!text.str().empty()) {
    EXPECT_TRUE(ParseJson(text.str(), result.report)) << text.str();
  }
  return result;
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_DRIVER_RUN_DRIVER_H_
