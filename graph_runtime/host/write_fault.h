// The SIGSEGV handler behind AccessGuard. Installed while there is at least one user; faults that are no undeclared
// writes go to the handler that was there before.
#ifndef PRISTINE_GRAPH_RUNTIME_HOST_WRITE_FAULT_H_
#define PRISTINE_GRAPH_RUNTIME_HOST_WRITE_FAULT_H_

namespace pristine::host {

void AddWriteFaultUser();
void RemoveWriteFaultUser();

}  // namespace pristine::host

#endif  // PRISTINE_GRAPH_RUNTIME_HOST_WRITE_FAULT_H_
