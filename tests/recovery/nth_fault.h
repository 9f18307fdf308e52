// NthFault: counts the points that a program reaches, and fails one of them.
#ifndef PRISTINE_TESTS_RECOVERY_NTH_FAULT_H_
#define PRISTINE_TESTS_RECOVERY_NTH_FAULT_H_

#include <array>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/fault_injector.h"

namespace pristine::testing {

class NthFault final : public FaultInjector {
 public:
  NthFault() = default;
  // Fails the `n`-th point of `operation`, from 1.
  NthFault(Operation operation, int n) : operation_(operation), n_(n) {}

  absl::Status Before(Operation operation, const char* what) override {
    const int reached = ++reached_[static_cast<size_t>(operation)];
    if (operation != operation_ || reached != n_) return absl::OkStatus();
    what_ = what;
    return absl::UnavailableError(Text());
  }

  bool hit() const { return !what_.empty(); }
  const std::string& what() const { return what_; }
  std::string Text() const { return absl::StrCat("injected into ", ToString(operation_), " ", n_, ": ", what_); }
  int reached(Operation operation) const { return reached_[static_cast<size_t>(operation)]; }

 private:
  const Operation operation_ = Operation::kAllocate;
  const int n_ = 0;  // 0: none
  std::string what_;
  std::array<int, kOperations> reached_ = {};
};

// Sets `injector` for a scope, and puts `after` there at its end.
class Injecting {
 public:
  Injecting(Device& device, FaultInjector* injector, FaultInjector* after = nullptr) : device_(device), after_(after) {
    device_.SetFaultInjector(injector);
  }
  ~Injecting() { device_.SetFaultInjector(after_); }
  Injecting(const Injecting&) = delete;
  Injecting& operator=(const Injecting&) = delete;

 private:
  Device& device_;
  FaultInjector* const after_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_RECOVERY_NTH_FAULT_H_
