// An NVTX injection library, as a profiler brings one: records the domains created and the ranges pushed and popped.
// The test finds it through NVTX_INJECTION64_PATH and reads the records with nvtx_recorder_take.
#include <nvtx3/nvToolsExt.h>

#include <cstdint>
#include <mutex>
#include <string>

namespace {

struct Recorder {
  std::mutex mutex;
  std::string log;
};
Recorder& TheRecorder() {
  static Recorder recorder;
  return recorder;
}
void Record(const std::string& line) {
  Recorder& recorder = TheRecorder();
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  recorder.log += line + "\n";
}

// The only domain that the program creates is ours; its handle is this number.
constexpr uintptr_t kFirstHandle = 100;

nvtxDomainHandle_t DomainCreateA(const char* name) {
  Record(std::string("domain ") + name);
  return reinterpret_cast<nvtxDomainHandle_t>(kFirstHandle);
}
int RangePushEx(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  const bool ours = reinterpret_cast<uintptr_t>(domain) == kFirstHandle;
  Record(std::string(ours ? "push " : "push in another domain ") + attributes->message.ascii);
  return 0;
}
int RangePop(nvtxDomainHandle_t) {
  Record("pop");
  return 0;
}

}  // namespace

extern "C" {

// Moves the records so far, a line each, to `out`, cut to `size`.
__attribute__((visibility("default"))) void nvtx_recorder_take(char* out, size_t size) {
  Recorder& recorder = TheRecorder();
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  out[recorder.log.copy(out, size - 1)] = 0;
  recorder.log.clear();
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr || callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) return 0;
  if (size <= NVTX_CBID_CORE2_DomainCreateA) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(DomainCreateA);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(RangePushEx);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(RangePop);
  return 1;
}

}  // extern "C"
