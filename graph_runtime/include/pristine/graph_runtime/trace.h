// NVTX ranges in the domain "pristine": capture, plan, refill, replay. Nothing at all where the NVTX headers are
// missing.
#ifndef PRISTINE_GRAPH_RUNTIME_TRACE_H_
#define PRISTINE_GRAPH_RUNTIME_TRACE_H_

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define PRISTINE_HAS_NVTX 1
#endif

namespace pristine {

// A range from construction to destruction, on the calling thread. `name` has static storage. Without a profiler
// attached it costs a few nanoseconds; it never allocates after the first use.
class ScopedRange {
 public:
#ifdef PRISTINE_HAS_NVTX
  explicit ScopedRange(const char* name) {
    nvtxEventAttributes_t attributes = {};
    attributes.version = NVTX_VERSION;
    attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
    attributes.message.ascii = name;
    nvtxDomainRangePushEx(Domain(), &attributes);
  }
  ~ScopedRange() { nvtxDomainRangePop(Domain()); }
#else
  explicit ScopedRange(const char*) {}
  ~ScopedRange() {}  // NOLINT: not trivial, so that an unused variable is no warning
#endif
  ScopedRange(const ScopedRange&) = delete;
  ScopedRange& operator=(const ScopedRange&) = delete;

 private:
#ifdef PRISTINE_HAS_NVTX
  static nvtxDomainHandle_t Domain() {
    static const nvtxDomainHandle_t domain = nvtxDomainCreateA("pristine");
    return domain;
  }
#endif
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_TRACE_H_
