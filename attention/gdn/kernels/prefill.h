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
  int32_t v_parts;          // blocks that share a state, in as many kernels; or kByLengths: PrefillVParts
  int32_t longest_share;    // of kByLengths: PrefillLongestShare
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

// The shapes of the grids; functions of bucket, heads and device alone.
// A state is one block's, in one kernel (1), where there are enough of them to fill the device. Two blocks share it, in
// two kernels (2), where there are not: each takes half the time for a chunk. Two or three sequences whose states all
// have room, but not two blocks for each, are faster one way or the other by their lengths (kByLengths): all three
// kernels are queued, and cu_seqlens says which of them return at once. More heads than that leave it at two: one
// sequence may be most of the tokens.
inline constexpr int32_t kByLengths = 0;
inline constexpr int32_t kMaxByLengths = 3;                 // sequences
inline constexpr int32_t kMinTokensByLengths = 5 * kChunk;  // of the bucket; one kernel ends before another can begin
constexpr int32_t PrefillVParts(int32_t sequences, int32_t tokens, int32_t v_heads, int32_t multiprocessors) {
  const int64_t states = int64_t{sequences} * v_heads;
  if (sequences == 1 || 2 * states <= multiprocessors) return 2;
  if (sequences > kMaxByLengths) return 1;
  if (states > multiprocessors) return 2;
  return tokens > kMinTokensByLengths ? kByLengths : 1;
}

// Of kByLengths: the least share of the longest sequence, in 64ths of all tokens, with which two kernels end first; the
// other sequences are taken to be of one length. The unit is what a chunk takes a block in the second of two kernels, a
// sequence is as many chunks as its share: one kernel takes two for each of the longest. Of two, the first takes
// kPrepare for each chunk and head, over all multiprocessors (measured on H200); in the second the longest sequence's
// blocks begin at once, the others' wherever there is room, in rounds until the longest ends and then in its place too.
constexpr int32_t PrefillLongestShare(int32_t sequences, int32_t v_heads, int32_t multiprocessors) {
  constexpr double kPrepare = 0.65;
  const int32_t blocks = 2 * v_heads, room = multiprocessors - blocks;
  int32_t share = (63 + sequences) / sequences;
  for (; share < 64; ++share) {
    const double longest = share, length = (64. - share) / (sequences - 1);
    int32_t left = (sequences - 1) * blocks, rounds = 0;
    for (; left > 0 && rounds * length < longest; left -= room) ++rounds;
    const double others = left <= 0 ? rounds * length : left <= blocks ? longest + length : (rounds + 1) * length;
    const double end = others > longest ? others : longest;
    if (end + kPrepare * 64 * v_heads / multiprocessors < 2 * longest) break;
  }
  return share;
}

// Of kByLengths: the longest sequence, and 1 or 2.
struct PrefillChoice {
  int32_t longest, v_parts;
};
PRISTINE_HOST_DEVICE inline PrefillChoice ChooseByLengths(const PrefillParams& p) {
  int32_t at = 0;
  int64_t longest = 0, sum = 0;
  for (int32_t i = 0; i < p.sequences; ++i) {
    const int64_t length = int64_t{p.cu_seqlens[i + 1]} - p.cu_seqlens[i];
    if (length > longest) {
      longest = length;
      at = i;
    }
    sum += length;
  }
  // A chunk less, for the second launch.
  return {at, 64 * (longest - kChunk) >= p.longest_share * sum ? 2 : 1};
}
PRISTINE_HOST_DEVICE inline bool Runs(const PrefillParams& p, int32_t v_parts) {
  return (p.v_parts == kByLengths ? ChooseByLengths(p).v_parts : p.v_parts) == v_parts;
}

// Value heads of one q/k head share k.k and q.k in one block where there are chunks enough to fill the device.
inline constexpr int32_t kMaxHeadsPerBlock = 4;
constexpr int32_t PrefillHeadsPerBlock(int64_t chunks, int32_t qk_heads, int32_t ratio, int32_t multiprocessors) {
  return ratio <= kMaxHeadsPerBlock && chunks * qk_heads >= 4 * multiprocessors ? ratio : 1;
}

// All of it; of kByLengths, if v_parts 1 is chosen.
int PrefillHost(const PrefillParams& params);
int PrefillCuda(CUstream_st* stream, const PrefillParams& params);
// These two the same way if 2 is. Zeroes the rows of `out` behind the last sequence; the CUDA kernel fills the
// workspace too.
int PrefillPrepareHost(const PrefillParams& params);
int PrefillPrepareCuda(CUstream_st* stream, const PrefillParams& params);
// `out` of all sequences and their final states. Cuda: from the workspace.
int PrefillStatesHost(const PrefillParams& params);
int PrefillStatesCuda(CUstream_st* stream, const PrefillParams& params);
// Set the kernels' attributes on the current device.
int PrefillSetUpCuda();
int PrefillSetUpPrepareCuda();
int PrefillSetUpStatesCuda();

}  // namespace pristine::attention::gdn

#endif  // PRISTINE_ATTENTION_GDN_KERNELS_PREFILL_H_
