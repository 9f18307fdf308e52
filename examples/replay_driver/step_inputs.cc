#include "examples/replay_driver/step_inputs.h"

#include "examples/replay_driver/kv_hash.h"

namespace pristine::replay_driver {

void StepInputs::Set(const ModelConfig& config, absl::Span<const ActiveRequest> active) {
  const attention::SparseConfig& sparse = config.sparse;
  const int32_t count = static_cast<int32_t>(active.size());
  extent = {count, count};
  for (std::vector<int32_t>* values :
       {&requests, &lengths, &kv_indptr, &kv_indices, &slots, &positions, &plan_lengths}) {
    values->clear();
  }
  kv_indptr.push_back(0);
  for (const ActiveRequest& request : active) {
    const int32_t position = request.length - 1;
    const int32_t pages = position / config.page_size + 1;
    requests.push_back(request.id);
    lengths.push_back(request.length);
    kv_indices.insert(kv_indices.end(), request.pages.begin(), request.pages.begin() + pages);
    kv_indptr.push_back(static_cast<int32_t>(kv_indices.size()));
    slots.push_back(request.pages[pages - 1] * config.page_size + position % config.page_size);
    positions.push_back(position);
    plan_lengths.insert(plan_lengths.end(), sparse.groups, attention::SparseRowLength(sparse, request.length));
  }
  tables.resize(config.layers - 1);
  for (int32_t layer = 0; config.is_sparse(layer); ++layer) {
    std::vector<int32_t>& table = tables[layer];
    table.clear();
    for (const ActiveRequest& request : active) {
      const int32_t blocks = (request.length - 1) / sparse.block + 1;
      for (int32_t group = 0; group < sparse.groups; ++group) {
        if (request.length <= sparse.block * sparse.topk) {
          table.insert(table.end(), sparse.topk, 0);  // not read
          continue;
        }
        SelectBlocks(config.seed, request.id, layer, group, blocks, sparse.topk,
                     [&table](int32_t block) { table.push_back(block); });
      }
    }
  }
}

}  // namespace pristine::replay_driver
