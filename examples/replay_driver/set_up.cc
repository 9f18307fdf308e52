#include "examples/replay_driver/set_up.h"

#include <unistd.h>

#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::replay_driver {
namespace {

// Bytes that can still be had without swapping; all there are where the system does not say.
int64_t AvailableMemory() {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string name, rest; meminfo >> name; std::getline(meminfo, rest)) {
    int64_t kib = 0;
    if (name == "MemAvailable:" && meminfo >> kib) return kib * 1024;
  }
  return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
}

}  // namespace

ModelConfig ModelConfigOf(const Options& options) {
  ModelConfig config;
  config.seed = options.seed;
  for (const int32_t bucket : options.buckets) config.buckets.push_back({bucket, bucket});
  config.layers = options.layers;
  config.heads = options.heads;
  config.kv_heads = options.kv_heads;
  config.head_dim = options.head_dim;
  config.dtype = options.dtype;
  config.scheduler = options.scheduler;
  config.page_size = options.page_size;
  config.pool_pages = options.kv_tokens / options.page_size;
  config.window = options.window;
  config.sparse.groups = options.kv_groups;
  config.sparse.block = options.sparse_block;
  config.sparse.topk = options.topk_blocks;
  config.sparse.dense_len = options.dense_len;
  if (options.model == ModelKind::kHybrid) {
    config.gdn.layers = kGdnPerAttention * options.layers;
    config.gdn.qk_heads = options.gdn_qk_heads;
    config.gdn.v_heads = options.gdn_v_heads;
    config.gdn.draft_tokens = options.spec;
  }
  return config;
}

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Options& options, const Environment& environment) {
  std::unique_ptr<Device> device;
  if (options.device != DeviceChoice::kHost) {
    absl::StatusOr<std::unique_ptr<Device>> cuda = CreateCudaDevice(options.cuda_ordinal);
    const bool absent = absl::IsUnavailable(cuda.status()) || absl::IsUnimplemented(cuda.status());
    if (cuda.ok()) {
      device = *std::move(cuda);
    } else if (options.device == DeviceChoice::kCuda || !absent) {
      return cuda.status();  // a GPU that is there and fails is no reason to run elsewhere
    } else if (!options.quiet) {
      environment.err << "replay_driver: --device=auto takes the host: " << cuda.status().message() << "\n";
    }
  }
  if (device == nullptr) {
    HostOptions host;
    host.run = environment.host_run;
    host.enforce_accesses = environment.enforce_accesses || options.check == ManagerOptions::Check::kAlways;
    PRISTINE_ASSIGN_OR_RETURN(device, CreateHostDevice(host));
  }
  return device;
}

absl::Status CheckHostMemory(const Device& device, int64_t needed) {
  if (device.backend() != Backend::kHost) return absl::OkStatus();
  const int64_t present = AvailableMemory();
  if (needed <= present) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("the KV pool, page tables and partial results need ", needed >> 20,
                                                   " MiB; this machine has ", present >> 20, " MiB left"));
}

}  // namespace pristine::replay_driver
