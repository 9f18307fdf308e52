// Tensors of the GDN tests: random numbers in any dtype, on the device and as doubles.
#ifndef PRISTINE_TESTS_GDN_GDN_RIG_H_
#define PRISTINE_TESTS_GDN_GDN_RIG_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/kernels/bfloat16.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/state_pool.h"
#include "pristine/attention/types.h"
#include "pristine/graph_runtime/device.h"
#include "pristine/graph_runtime/status.h"
#include "pristine/graph_runtime/stream.h"

namespace pristine::testing {

using attention::DType;
using Bytes = std::vector<std::byte>;

// Rounds to `dtype`.
inline Bytes Encode(DType dtype, const std::vector<double>& values) {
  Bytes bytes(values.size() * attention::SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = static_cast<float>(values[i]);
    const attention::BFloat16 narrow = attention::FromFloat<attention::BFloat16>(value);
    std::memcpy(&bytes[i * attention::SizeOf(dtype)],
                dtype == DType::kFloat32 ? static_cast<const void*>(&value) : &narrow, attention::SizeOf(dtype));
  }
  return bytes;
}
inline std::vector<double> Decoded(DType dtype, const Bytes& bytes) {
  std::vector<double> values(bytes.size() / attention::SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    float value;
    attention::BFloat16 narrow;
    if (dtype == DType::kFloat32) {
      std::memcpy(&value, &bytes[i * 4], 4);
    } else {
      std::memcpy(&narrow, &bytes[i * 2], 2);
      value = attention::ToFloat(narrow);
    }
    values[i] = value;
  }
  return values;
}

inline std::vector<double> Uniform(std::mt19937_64& random, size_t count, double low, double high) {
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<double> values(count);
  for (double& value : values) value = uniform(random);
  return values;
}

// Views of `good`'s memory that no op may take: no slots, and distances between slots that are too small, that 16-byte
// loads cannot take, or whose products overflow.
template <class F>
void ForBadSlots(const attention::gdn::StateView& good, const F& refused) {
  const int64_t packed = good.v_heads * attention::gdn::kStateElements;
  const auto with = [&](int32_t slots, int64_t slot_stride) {
    SCOPED_TRACE(absl::StrCat(slots, " slots, ", slot_stride, " elements apart"));
    attention::gdn::StateView view = good;
    view.slots = slots;
    view.slot_stride = slot_stride;
    refused(view);
  };
  for (const int32_t slots : {0, -1, std::numeric_limits<int32_t>::min()}) with(slots, packed);
  for (const int64_t stride :
       {packed - 8, int64_t{0}, -packed, std::numeric_limits<int64_t>::min(), packed + 1, packed + 2,
        (int64_t{1} << 31) + 8, int64_t{1} << 62, std::numeric_limits<int64_t>::max() - 7}) {
    with(1, stride);
    with(good.slots, stride);
    with(5, stride);
  }
  SCOPED_TRACE("misaligned");
  attention::gdn::StateView view = good;
  view.slots = 1;
  view.states = good.states.Sub(8, good.states.size() - 8);
  refused(view);
}

// A device tensor and what it holds, rounded as on the device.
struct Tensor {
  DType dtype = DType::kFloat32;
  DeviceBuffer memory;
  std::vector<double> values;

  DeviceSpan<std::byte> bytes() const { return memory.As<std::byte>(); }
};

inline absl::StatusOr<Tensor> MakeTensor(Device& device, Stream& stream, DType dtype,
                                         const std::vector<double>& values) {
  Tensor tensor;
  tensor.dtype = dtype;
  const Bytes bytes = Encode(dtype, values);
  tensor.values = Decoded(dtype, bytes);
  PRISTINE_ASSIGN_OR_RETURN(tensor.memory, device.Allocate(std::max<size_t>(bytes.size(), 16), "tensor"));
  PRISTINE_RETURN_IF_ERROR(stream.CopyFromHost(tensor.bytes().Sub(0, bytes.size()), bytes));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return tensor;
}
inline absl::StatusOr<Bytes> ReadBytes(Stream& stream, DeviceSpan<const std::byte> from) {
  Bytes bytes(from.size());
  PRISTINE_RETURN_IF_ERROR(stream.CopyToHost(absl::MakeSpan(bytes), from));
  PRISTINE_RETURN_IF_ERROR(stream.Synchronize());
  return bytes;
}
inline absl::StatusOr<std::vector<double>> ReadTensor(Stream& stream, const Tensor& tensor) {
  PRISTINE_ASSIGN_OR_RETURN(const Bytes bytes, ReadBytes(stream, tensor.bytes()));
  return Decoded(tensor.dtype, bytes);
}

// rms(expected - found) / rms(expected); 0 where both are 0.
inline double RelativeRms(const std::vector<double>& expected, const std::vector<double>& found) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (expected[i] - found[i]) * (expected[i] - found[i]);
    size += expected[i] * expected[i];
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

// The inputs of `tokens` tokens of one layer. q, k and v lie in one tensor, as the convolution leaves them.
struct Layer {
  DType dtype = DType::kBFloat16;
  int32_t qk_heads = 0, v_heads = 0;
  Tensor mixed, a, b, a_log, dt_bias;

  int64_t qk_dim() const { return int64_t{qk_heads} * 128; }
  int64_t v_dim() const { return int64_t{v_heads} * 128; }
  int64_t dim() const { return 2 * qk_dim() + v_dim(); }
  attention::gdn::GateInputs gates() const {
    return {dtype,
            v_heads,
            {a.bytes(), 0},
            {b.bytes(), 0},
            a_log.memory.As<const float>(),
            dt_bias.memory.As<const float>()};
  }
  // Channels [first, ...) of `mixed`, as rows.
  attention::gdn::Rows Part(int64_t first) const {
    const size_t skip = static_cast<size_t>(first) * attention::SizeOf(dtype);
    return {mixed.bytes().Sub(skip, mixed.bytes().size() - skip), dim()};
  }
};

// `slow`: decays near 1, so that old tokens count; else anything from 0 to 1.
inline absl::StatusOr<Layer> MakeLayer(Device& device, Stream& stream, DType dtype, int32_t qk_heads, int32_t v_heads,
                                       int64_t tokens, bool slow, std::mt19937_64& random) {
  Layer layer;
  layer.dtype = dtype;
  layer.qk_heads = qk_heads;
  layer.v_heads = v_heads;
  const size_t heads = static_cast<size_t>(v_heads), count = static_cast<size_t>(tokens);
  const auto make = [&](Tensor& to, DType type, size_t size, double low, double high) -> absl::Status {
    PRISTINE_ASSIGN_OR_RETURN(to, MakeTensor(device, stream, type, Uniform(random, size, low, high)));
    return absl::OkStatus();
  };
  PRISTINE_RETURN_IF_ERROR(make(layer.mixed, dtype, count * static_cast<size_t>(layer.dim()), -1, 1));
  PRISTINE_RETURN_IF_ERROR(make(layer.a, dtype, count * heads, slow ? -8 : -2, slow ? -5 : 2));
  PRISTINE_RETURN_IF_ERROR(make(layer.b, dtype, count * heads, -3, 3));
  PRISTINE_RETURN_IF_ERROR(make(layer.a_log, DType::kFloat32, heads, -1, 1));
  PRISTINE_RETURN_IF_ERROR(make(layer.dt_bias, DType::kFloat32, heads, -1, 1));
  return layer;
}

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_GDN_GDN_RIG_H_
