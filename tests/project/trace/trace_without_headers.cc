// trace.h where the NVTX headers are missing. (Where they are on the system's own path, this is the other half again.)
#include "pristine/graph_runtime/trace.h"

int main() {
  const pristine::ScopedRange range("plan");
#ifndef PRISTINE_HAS_NVTX
  static_assert(sizeof(pristine::ScopedRange) == 1, "nothing at all");
#endif
  return 0;
}
