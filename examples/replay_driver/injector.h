// Injector: makes one of the mistakes of injection.h in a session, through public calls only.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTOR_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/replay_driver/decode_model.h"
#include "examples/replay_driver/injection.h"
#include "examples/replay_driver/kv_pool.h"
#include "examples/replay_driver/report.h"
#include "examples/replay_driver/step_inputs.h"
#include "pristine/graph_runtime/graph_runner.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::replay_driver {

class Injector {
 public:
  // Registers what its nodes need with the model's manager and puts them into the model's body: call it before anything
  // is captured. All but `injection` must outlive this.
  static absl::StatusOr<std::unique_ptr<Injector>> Create(Injection injection, DecodeModel& model, const KvPool& pool,
                                                          RunReport& report);

  // Whether a step is the one to attempt the misuse ahead of: from the tenth replay on, the first that it is possible
  // in.
  bool Due(const StepInputs& inputs, const GraphRunner& runner) const;
  // Ahead of that step: the bad attempt, waited for. What the library says at once goes to the report. The step can
  // then be run as if nothing had been.
  absl::Status BeforeStep(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner);
  // In the step that DecodeModel::Begin opened: refills what the nodes read.
  absl::Status Refill(const StepInputs& inputs);
  // For a leaky kernel whose damage was seen: runs the poisoned step node by node and returns which node put NaN in
  // which live row. Blocks. "": none did, or another class.
  absl::StatusOr<std::string> FindLeak(const StepInputs& inputs, Stream& stream);
  // FAILED_PRECONDITION: the run ended before the mistake could be made.
  absl::Status CheckMade() const;

 private:
  Injector(Injection injection, DecodeModel& model, const KvPool& pool, RunReport& report)
      : injection_(injection), model_(model), pool_(pool), report_(report) {}
  bool poisons() const { return injection_ == Injection::kPoisonUnused || injection_ == Injection::kLeakyKernel; }
  absl::Status Register();
  absl::Status AddNodes(Stream& stream, const Extent& bucket, int32_t layer, DecodeModel::Point point);
  absl::Status AddPoison(Stream& stream, const Extent& bucket, int32_t layer);
  bool Possible(const StepInputs& inputs) const;
  absl::Status Attempt(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner);
  // Everything of a step but the replay.
  absl::Status Prepare(const StepInputs& inputs);
  absl::Status ReuseSlot(int64_t step, const StepInputs& inputs, Stream& stream, GraphRunner& runner);
  // `refused` is the status of the call that should have been refused.
  absl::Status CountRefusal(int64_t step, const absl::Status& refused);

  const Injection injection_;
  DecodeModel& model_;
  const KvPool& pool_;
  RunReport& report_;
  Buffer<int32_t> constant_;      // for classes that write one
  Buffer<uint8_t> pages_in_use_;  // for classes that poison; per page of the pool
  std::vector<uint8_t> in_use_;
  bool made_ = false;
};

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_INJECTOR_H_
