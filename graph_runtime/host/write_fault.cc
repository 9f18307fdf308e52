#include "graph_runtime/host/write_fault.h"

#include <cerrno>
#include <csignal>
#include <mutex>

#include "graph_runtime/host/access_guard.h"

namespace pristine::host {
namespace {

// A signal handler is process-wide, so its book-keeping is too.
struct Installation {
  std::mutex mutex;
  int users = 0;
  bool installed = false;
  struct sigaction previous = {};
};
Installation& TheInstallation() {
  static Installation installation;
  return installation;
}

void OnSegv(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const bool handled = info->si_code == SEGV_ACCERR && AccessGuard::HandleWriteFault(info->si_addr);
  errno = saved_errno;
  if (handled) return;
  const struct sigaction& previous = TheInstallation().previous;
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    sigaction(SIGSEGV, &previous, nullptr);  // returning repeats the fault, which now ends the process
  }
}

}  // namespace

void AddWriteFaultUser() {
  Installation& installation = TheInstallation();
  std::lock_guard lock(installation.mutex);
  ++installation.users;
  if (installation.installed) return;
  installation.installed = true;
  struct sigaction action = {};
  action.sa_sigaction = OnSegv;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &installation.previous);
}

void RemoveWriteFaultUser() {
  Installation& installation = TheInstallation();
  std::lock_guard lock(installation.mutex);
  if (--installation.users > 0) return;
  struct sigaction now = {};
  sigaction(SIGSEGV, nullptr, &now);
  // Whoever installed a handler after us keeps it; ours then stays in its chain and passes everything on.
  const bool ours = (now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == OnSegv;
  if (!ours) return;
  sigaction(SIGSEGV, &installation.previous, nullptr);
  installation.installed = false;
}

}  // namespace pristine::host
