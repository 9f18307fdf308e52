// Chunked gated delta rule over packed sequences: what each chunk needs whatever the state is (its record), then the
// states, chunk after chunk. Where states fill the device one kernel does both; else a first kernel leaves the records,
// all chunks side by side, for a second. No Abseil, no CUDA headers.
#ifndef PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_H_
#define PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_H_

#include <cstdint>

#include "attention/kernels/host_device.h"
#include "pristine/attention/types.h"

struct CUstream_st;

namespace pristine::attention::gdn {

inline constexpr int32_t kChunk = 64;  // tokens

struct PrefillParams {
  const void* q;  // [tokens, qk_heads, K] bfloat16, q_stride elements from token to token
  const void* k;
  const void* v;   // [tokens, v_heads, V]
  const float* g;  // [tokens, v_heads]
  const float* beta;
  const int32_t* cu_seqlens;     // [sequences + 1]
  const int32_t* initial_slots;  // [sequences]
  const int32_t* final_slots;
  void* out;        // [tokens, v_heads, V] bfloat16
  void* states;     // [slots, v_heads, V, K], slot_stride elements from slot to slot
  void* workspace;  // [ChunkBound(sequences, tokens), v_heads] of ChunkRecord; Host: null
  int64_t q_stride, k_stride, v_stride;
  int64_t slot_stride;
  int32_t slots;
  int32_t sequences, tokens;
  int32_t qk_heads, v_heads;
  int32_t heads_per_block;  // of the first of two kernels: divides v_heads / qk_heads
  int32_t v_parts;          // blocks that share a state; 1: in one kernel, 2: in the second of two
  float scale;
  DType state_dtype;
  bool clamp_to_zero;  // PaddedRows::kClampToZero
};

// What a chunk needs, per value head. Matrices are 64 x 64 bfloat16, row by row of
// 128 bytes whose 16-byte words are permuted for the tensor cores (128-byte swizzle).
struct ChunkRecord {
  // T diag(beta) is the sum of two: where keys repeat, outputs are what is left of sums of T's rows.
  uint16_t t[kChunk * kChunk], t_low[kChunk * kChunk];
  uint16_t p[kChunk * kChunk];  // scale (D o Q K^T)
  float exp_g[kChunk];          // exp(G_i)
  float exp_rest[kChunk];       // exp(G_last - G_i)
};
static_assert(sizeof(ChunkRecord) == 25088);

// Places for the chunks of any `sequences` lengths whose sum is at most `tokens`, and the first place of the sequence
// that starts at `token` behind `sequence` others: closed forms, so that neither a scan nor the host is asked. Places
// of two sequences never overlap, since a sequence's places grow by at least ceil(length / 64).
PRISTINE_HOST_DEVICE constexpr int32_t FirstChunk(int32_t sequence, int32_t token) {
  const int32_t ones = sequence < token ? sequence : token;
  return ones + (token - ones) / kChunk;
}
PRISTINE_HOST_DEVICE constexpr int32_t ChunkBound(int32_t sequences, int32_t tokens) {
  return FirstChunk(sequences, tokens);
}

// How the states are kept. BV 128: one kernel, whose blocks compute records themselves; two warpgroups keep a state, a
// third prepares the next chunk, a fourth loads and stores. BV 64: two kernels; a state's V is shared by two blocks of
// one warpgroup each and one that loads, records come from the first kernel. Shared memory, as the launcher asks for
// it: for each chunk on its way K, Q, V and a record, each padded to 1024 bytes, and two barriers; with BV 128 what T
// is inverted in.
inline constexpr int32_t kPrefillStages = 3;
inline constexpr int32_t kPrefillRecords = 2;  // in one kernel: one that is used, one that is being computed
inline constexpr int32_t kPrefillInverseBytes = 28192;
constexpr int32_t PrefillStatesWarps(int32_t bv) { return bv / 8; }
constexpr int32_t PrefillStatesSharedBytes(int32_t bv, int32_t stages) {
  constexpr int32_t kKeyBytes = kChunk * 128 * 2, kRecordBytes = (int32_t{sizeof(ChunkRecord)} + 1023) / 1024 * 1024;
  const int32_t tiles = stages * (2 * kKeyBytes + kChunk * bv * 2 + 2 * int32_t{sizeof(uint64_t)});
  return bv == 128 ? tiles + kPrefillRecords * kRecordBytes + kPrefillInverseBytes : tiles + stages * kRecordBytes;
}

// The shapes of both grids; functions of bucket, heads and device alone.
// A state is one block's, in one kernel, where there are enough of them to fill the device. Two blocks share it, in two
// kernels, where there are not, or so few sequences that one of them may be most of the tokens: each takes less time
// for a chunk.
constexpr int32_t PrefillVParts(int32_t sequences, int32_t v_heads, int32_t multiprocessors) {
  return sequences < 4 || 2 * int64_t{sequences} * v_heads <= multiprocessors ? 2 : 1;
}
// Value heads of one q/k head share k.k and q.k in one block where there are chunks enough to fill the device.
inline constexpr int32_t kMaxHeadsPerBlock = 4;
constexpr int32_t PrefillHeadsPerBlock(int64_t chunks, int32_t qk_heads, int32_t ratio, int32_t multiprocessors) {
  return ratio <= kMaxHeadsPerBlock && chunks * qk_heads >= 4 * multiprocessors ? ratio : 1;
}

// All of it. Cuda: for v_parts == 1.
int PrefillHost(const PrefillParams& params);
int PrefillCuda(CUstream_st* stream, const PrefillParams& params);
// Zeroes the rows of `out` behind the last sequence; the CUDA kernel fills the workspace too.
int PrefillPrepareHost(const PrefillParams& params);
int PrefillPrepareCuda(CUstream_st* stream, const PrefillParams& params);
// `out` of all sequences and their final states. Cuda: for v_parts == 2, from the workspace.
int PrefillStatesHost(const PrefillParams& params);
int PrefillStatesCuda(CUstream_st* stream, const PrefillParams& params);
// Set the kernels' attributes on the current device.
int PrefillSetUpCuda();
int PrefillSetUpPrepareCuda();
int PrefillSetUpStatesCuda();

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_H_
