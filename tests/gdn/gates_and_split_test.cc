#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pristine/attention/gdn/gates.h"
#include "pristine/attention/gdn/qkv_split.h"
#include "pristine/graph_runtime/graph.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {
namespace {

using attention::gdn::GateInputs;
using attention::gdn::Gates;
using attention::gdn::QkvSplit;
using attention::gdn::QkvSplitTensors;

template <class BackendT>
class GatesTest : public DeviceTest<BackendT> {};
TYPED_TEST_SUITE(GatesTest, AllBackends, BackendNames);

TYPED_TEST(GatesTest, AreTheFormulaForStridedRowsOfBothDtypes) {
  std::mt19937_64 random(1);
  constexpr int64_t kTokens = 37, kStride = 11;
  constexpr int32_t kHeads = 6;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::vector<double> wide = Uniform(random, kTokens * kStride, -6, 6);
    wide[3] = 40;    // softplus(x) = x
    wide[14] = -60;  // decay 1
    ASSERT_OK_AND_ASSIGN(const Tensor a, MakeTensor(*this->device_, *this->stream_, dtype, wide));
    ASSERT_OK_AND_ASSIGN(
        const Tensor b, MakeTensor(*this->device_, *this->stream_, dtype, Uniform(random, kTokens * kStride, -30, 30)));
    ASSERT_OK_AND_ASSIGN(const Tensor a_log,
                         MakeTensor(*this->device_, *this->stream_, DType::kFloat32, Uniform(random, kHeads, -2, 3)));
    ASSERT_OK_AND_ASSIGN(const Tensor dt_bias,
                         MakeTensor(*this->device_, *this->stream_, DType::kFloat32, Uniform(random, kHeads, -1, 1)));
    ASSERT_OK_AND_ASSIGN(const Tensor g, MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                                    std::vector<double>(kTokens * kHeads, 7)));
    ASSERT_OK_AND_ASSIGN(const Tensor beta, MakeTensor(*this->device_, *this->stream_, DType::kFloat32,
                                                       std::vector<double>(kTokens * kHeads, 7)));
    const GateInputs inputs = {dtype,
                               kHeads,
                               {a.bytes(), kStride},
                               {b.bytes(), kStride},
                               a_log.memory.template As<const float>(),
                               dt_bias.memory.template As<const float>()};
    ASSERT_OK(Gates(*this->stream_, kTokens, inputs, g.memory.template As<float>(), beta.memory.template As<float>()));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> got_g, ReadTensor(*this->stream_, g));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> got_beta, ReadTensor(*this->stream_, beta));
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int32_t h = 0; h < kHeads; ++h) {
        const size_t from = static_cast<size_t>(t * kStride + h), at = static_cast<size_t>(t * kHeads + h);
        const double x = a.values[from] + dt_bias.values[h];
        const double expected = -std::exp(a_log.values[h]) * (x > 20 ? x : std::log1p(std::exp(x)));
        EXPECT_NEAR(got_g[at], expected, 2e-6 * std::abs(expected) + 1e-12) << t << ", " << h;
        EXPECT_NEAR(got_beta[at], 1 / (1 + std::exp(-b.values[from])), 1e-6) << t << ", " << h;
        EXPECT_LE(got_g[at], 0);
      }
    }
  }
}

TYPED_TEST(GatesTest, RefusesWhatDoesNotFitAndLaunchesNothing) {
  std::mt19937_64 random(2);
  ASSERT_OK_AND_ASSIGN(const Tensor x,
                       MakeTensor(*this->device_, *this->stream_, DType::kFloat32, Uniform(random, 12, -1, 1)));
  const DeviceSpan<const float> heads = x.memory.template As<const float>();
  const DeviceSpan<float> out = x.memory.template As<float>();
  const GateInputs good = {DType::kFloat32, 4, {x.bytes(), 0}, {x.bytes(), 0}, heads, heads};
  GateInputs bad = good;
  bad.v_heads = 0;
  EXPECT_STATUS(Gates(*this->stream_, 3, bad, out, out), kInvalidArgument, "v_heads is 0");
  bad = good;
  bad.a.stride = 3;
  EXPECT_STATUS(Gates(*this->stream_, 3, bad, out, out), kInvalidArgument, "a has a row stride of 3");
  bad.a.stride = int64_t{1} << 40;  // times 2^24 rows: 0 in 64 bits
  EXPECT_STATUS(Gates(*this->stream_, (1 << 24) + 1, bad, out, out), kInvalidArgument,
                "a has a row stride of 1099511627776 elements; must be 0 or in [4, 2147483648]");
  bad.a.stride = int64_t{1} << 31;
  EXPECT_STATUS(Gates(*this->stream_, std::numeric_limits<int32_t>::max(), bad, out, out), kInvalidArgument,
                "a has 12 elements, needs 4611686014132420612");
  EXPECT_STATUS(Gates(*this->stream_, 4, good, out, out), kInvalidArgument, "a has 12 elements, needs 16");
  EXPECT_STATUS(Gates(*this->stream_, -1, good, out, out), kInvalidArgument, "tokens is -1");
  EXPECT_STATUS(Gates(*this->stream_, 3, good, out.Sub(0, 11), out), kInvalidArgument, "g has 11 elements, needs 12");
  EXPECT_OK(Gates(*this->stream_, 0, good, {}, {}));
}

template <class BackendT>
class QkvSplitTest : public DeviceTest<BackendT> {
 protected:
  struct Case {
    DType dtype;
    int64_t tokens;
    int32_t q_dim, k_dim, v_dim;
    bool transposed;  // strides (1, tokens + pad)
    int64_t pad = 0;  // elements between rows
    int32_t norm = 0;
    bool gates = false;
    size_t shift = 0;  // elements that `mixed` starts late
  };

  void Run(const Case& c, std::mt19937_64& random, bool captured = false) {
    SCOPED_TRACE(absl::StrCat(ToString(c.dtype), " ", c.tokens, " x ", c.q_dim, "+", c.k_dim, "+", c.v_dim,
                              c.transposed ? " transposed" : "", " pad ", c.pad, " norm ", c.norm, " shift ", c.shift));
    Device& device = *this->device_;
    Stream& stream = *this->stream_;
    const int64_t dim = int64_t{c.q_dim} + c.k_dim + c.v_dim;
    const int64_t stride_t = c.transposed ? 1 : dim + c.pad, stride_d = c.transposed ? c.tokens + c.pad : 1;
    const size_t element = attention::SizeOf(c.dtype);
    const size_t size = c.shift + static_cast<size_t>((c.tokens - 1) * stride_t + (dim - 1) * stride_d + 1);
    ASSERT_OK_AND_ASSIGN(const Tensor mixed, MakeTensor(device, stream, c.dtype, Uniform(random, size, -2, 2)));
    const int32_t dims[3] = {c.q_dim, c.k_dim, c.v_dim};
    Tensor out[3];
    for (int i = 0; i < 3; ++i) {
      ASSERT_OK_AND_ASSIGN(out[i], MakeTensor(device, stream, c.dtype,
                                              std::vector<double>(static_cast<size_t>(c.tokens) * dims[i], -9)));
    }
    ASSERT_OK_AND_ASSIGN(const Layer layer, MakeLayer(device, stream, DType::kBFloat16, 1, 3, c.tokens, false, random));
    ASSERT_OK_AND_ASSIGN(const Tensor g, MakeTensor(device, stream, DType::kFloat32,
                                                    std::vector<double>(static_cast<size_t>(c.tokens) * 3, -9)));
    ASSERT_OK_AND_ASSIGN(const Tensor beta, MakeTensor(device, stream, DType::kFloat32, g.values));
    QkvSplitTensors tensors;
    tensors.dtype = c.dtype;
    tensors.q_dim = c.q_dim;
    tensors.k_dim = c.k_dim;
    tensors.v_dim = c.v_dim;
    tensors.mixed = mixed.bytes().Sub(c.shift * element, (size - c.shift) * element);
    tensors.stride_t = stride_t;
    tensors.stride_d = stride_d;
    tensors.q = out[0].bytes();
    tensors.k = out[1].bytes();
    tensors.v = out[2].bytes();
    tensors.norm_head_dim = c.norm;
    if (c.gates) {
      tensors.gates = layer.gates();
      tensors.g = g.memory.template As<float>();
      tensors.beta = beta.memory.template As<float>();
    }
    const int32_t tokens = static_cast<int32_t>(c.tokens);
    if (captured) {
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph,
                           Capture(stream, [&](Stream& s) { return QkvSplit(s, tokens, tensors); }));
      ASSERT_EQ(graph->nodes().size(), 1u);
      EXPECT_EQ(std::string(graph->nodes()[0].name), "gdn_qkv_split");
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<GraphExec> exec, graph->Instantiate());
      ASSERT_OK(exec->Launch(stream));
    } else {
      ASSERT_OK(QkvSplit(stream, tokens, tensors));
    }
    ASSERT_OK_AND_ASSIGN(const Bytes source, ReadBytes(stream, mixed.bytes()));
    int64_t first = 0;
    for (int i = 0; i < 3; ++i) {
      ASSERT_OK_AND_ASSIGN(const Bytes bytes, ReadBytes(stream, out[i].bytes()));
      const std::vector<double> values = Decoded(c.dtype, bytes);
      int64_t wrong = 0;
      for (int64_t t = 0; t < c.tokens; ++t) {
        for (int64_t d = 0; d < dims[i]; ++d) {
          const auto from = [&](int64_t channel) {
            return c.shift + static_cast<size_t>(t * stride_t + (first + channel) * stride_d);
          };
          const size_t to = static_cast<size_t>(t * dims[i] + d);
          if (i == 2 || c.norm == 0) {
            wrong += std::memcmp(&source[from(d) * element], &bytes[to * element], element) != 0;
            continue;
          }
          double sum = 1e-6;
          for (int64_t e = d / c.norm * c.norm; e < (d / c.norm + 1) * c.norm; ++e) {
            sum += mixed.values[from(e)] * mixed.values[from(e)];
          }
          const double expected = mixed.values[from(d)] / std::sqrt(sum);
          const double tolerance = c.dtype == DType::kFloat32 ? 2e-6 : 4.1e-3;  // half a bfloat16 step: 2^-8
          wrong += !(std::abs(values[to] - expected) <= tolerance * std::abs(expected) + 1e-9);
        }
      }
      EXPECT_EQ(wrong, 0) << "of part " << i;
      first += dims[i];
    }
    if (!c.gates) return;
    ASSERT_OK_AND_ASSIGN(const std::vector<double> fused_g, ReadTensor(stream, g));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> fused_beta, ReadTensor(stream, beta));
    ASSERT_OK(Gates(stream, tokens, layer.gates(), g.memory.template As<float>(), beta.memory.template As<float>()));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> own_g, ReadTensor(stream, g));
    ASSERT_OK_AND_ASSIGN(const std::vector<double> own_beta, ReadTensor(stream, beta));
    EXPECT_EQ(fused_g, own_g);
    EXPECT_EQ(fused_beta, own_beta);
  }
};
TYPED_TEST_SUITE(QkvSplitTest, AllBackends, BackendNames);

TYPED_TEST(QkvSplitTest, CopiesBitsForContiguousStridedAndTransposedInputs) {
  std::mt19937_64 random(3);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t tokens : {1, 63, 65, 127, 128, 130, 257}) {
      this->Run({dtype, tokens, 256, 256, 512, false}, random);
      this->Run({dtype, tokens, 256, 256, 512, true}, random);
      this->Run({dtype, tokens, 256, 256, 512, false, 8}, random);
      this->Run({dtype, tokens, 256, 256, 512, true, 3}, random);
    }
  }
}

TYPED_TEST(QkvSplitTest, TakesAnyWidthAndAnyStart) {
  std::mt19937_64 random(4);
  this->Run({DType::kBFloat16, 5, 2048, 2048, 6144, false}, random);  // 10240
  this->Run({DType::kBFloat16, 5, 2048, 2048, 8192, true}, random);   // 12288
  for (const bool transposed : {false, true}) {
    this->Run({DType::kBFloat16, 70, 24, 40, 130, transposed}, random);
    this->Run({DType::kBFloat16, 70, 1, 7, 3, transposed}, random);
    this->Run({DType::kBFloat16, 66, 128, 128, 128, transposed, 0, 0, false, 1}, random);
    this->Run({DType::kFloat32, 66, 128, 128, 128, transposed, 1, 0, false, 3}, random);
  }
}

TYPED_TEST(QkvSplitTest, NormalisesHeadsOfQAndKAndFusesTheGates) {
  std::mt19937_64 random(5);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const bool transposed : {false, true}) {
      this->Run({dtype, 67, 256, 128, 384, transposed, 0, 128, true}, random);
      this->Run({dtype, 67, 192, 64, 320, transposed, 0, 64, false}, random);
      this->Run({dtype, 9, 128, 128, 128, transposed, 0, 0, true}, random);
    }
  }
}

TYPED_TEST(QkvSplitTest, IsOneNodeOfACapture) {
  std::mt19937_64 random(6);
  this->Run({DType::kBFloat16, 65, 256, 256, 512, true, 0, 128, true}, random, true);
  this->Run({DType::kBFloat16, 65, 256, 256, 512, false}, random, true);
}

TYPED_TEST(QkvSplitTest, RefusesOverlappingRowsAndShortTensors) {
  std::mt19937_64 random(7);
  ASSERT_OK_AND_ASSIGN(const Tensor x,
                       MakeTensor(*this->device_, *this->stream_, DType::kFloat32, Uniform(random, 4 * 24, -1, 1)));
  const QkvSplitTensors good = {.dtype = DType::kFloat32,
                                .q_dim = 8,
                                .k_dim = 8,
                                .v_dim = 8,
                                .mixed = x.bytes(),
                                .stride_t = 24,
                                .stride_d = 1,
                                .q = x.bytes(),
                                .k = x.bytes(),
                                .v = x.bytes()};
  QkvSplitTensors bad = good;
  bad.stride_t = 23;
  EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "strides (23, 1) of [4, 24]");
  bad.stride_t = 1;
  bad.stride_d = 3;
  EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "strides (1, 3) of [4, 24]");
  bad.stride_t = -24;
  EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "strides (-24, 3)");
  // Whose products with the counts are past int64.
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  for (const int64_t stride : {kMin, int64_t{0}, (int64_t{1} << 31) + 1, int64_t{1} << 62, kMax}) {
    bad = good;
    bad.stride_t = stride;
    EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, absl::StrCat("strides (", stride, ", 1)"));
    bad.stride_d = stride;
    EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, absl::StrCat(stride, ") of [4, 24]"));
    bad.stride_t = 24;
    EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, absl::StrCat("strides (24, ", stride, ")"));
  }
  bad = good;
  bad.stride_t = int64_t{1} << 31;
  EXPECT_STATUS(QkvSplit(*this->stream_, std::numeric_limits<int32_t>::max(), bad), kInvalidArgument,
                "mixed has 96 elements");
  for (int32_t QkvSplitTensors::*const which :
       {&QkvSplitTensors::q_dim, &QkvSplitTensors::k_dim, &QkvSplitTensors::v_dim}) {
    bad = good;
    bad.*which = (1 << 22) - 15;
    EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "their sum at most 4194304");
    bad.*which = std::numeric_limits<int32_t>::max();
    EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "their sum at most 4194304");
  }
  EXPECT_STATUS(QkvSplit(*this->stream_, 5, good), kInvalidArgument, "mixed has 96 elements, needs 120");
  bad = good;
  bad.norm_head_dim = 32;
  EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "norm_head_dim is 32");
  bad = good;
  bad.v = {};
  EXPECT_STATUS(QkvSplit(*this->stream_, 4, bad), kInvalidArgument, "v has 0 elements, needs 32");
}

}  // namespace
}  // namespace pristine::testing
