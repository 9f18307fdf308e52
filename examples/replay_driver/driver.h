// The main job: serve a trace with captured decode graphs, and find out whether every number was right.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_DRIVER_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_DRIVER_H_

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "examples/replay_driver/decode_model.h"
#include "examples/replay_driver/report.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

// What a run touches besides its options.
struct Environment {
  std::ostream& out;
  std::ostream& err;
  bool terminal = false;  // `err` is one: show progress
  HostOptions::Run host_run = HostOptions::Run::kEager;
  bool enforce_accesses = false;  // by the Host device, whatever --check says
  // Called with each replay queued and not waited for, for those who want to break something. May be null.
  std::function<absl::Status(Stream& stream, DecodeModel& model)> after_replay = nullptr;
};

// Everything from the command line (without the program's name) to the exit code. Several may run at a time.
ExitCode RunDriver(const std::vector<std::string>& args, const Environment& environment);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_DRIVER_H_
