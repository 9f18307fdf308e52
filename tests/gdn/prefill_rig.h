// What the tests of the prefill share: sequences with gates that decay slowly, fast or not at all, a pool whose other
// states are NaN, and the comparison with the formulas in double.
#ifndef PRISTINE_TESTS_GDN_PREFILL_RIG_H_
#define PRISTINE_TESTS_GDN_PREFILL_RIG_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "gtest/gtest.h"
#include "pristine/attention/gdn/prefill.h"
#include "tests/gdn/gdn_rig.h"
#include "tests/gdn/prefill_reference.h"
#include "tests/support/backends.h"
#include "tests/support/status_matchers.h"

namespace pristine::testing {

using namespace attention::gdn;  // NOLINT(build/namespaces): the suites are about that namespace
using attention::SizeOf;

enum class Decay {
  kOwn,   // the gates' own: -exp(A_log) softplus(a + dt_bias), some heads slow, some fast
  kSlow,  // alpha ~ U(0.9, 1)
  kAny,   // alpha ~ U(0, 1)
  kHard,  // from e^-100 to none, from one token to the next
};

inline double DrawLogDecay(Decay decay, int32_t head, std::mt19937_64& random) {
  const auto uniform = [&](double low, double high) { return std::uniform_real_distribution(low, high)(random); };
  switch (decay) {
    case Decay::kOwn:
      return -std::exp(0.4 * (head % 5) - 1) * std::log1p(std::exp(uniform(-6, 2)));
    case Decay::kSlow:
      return std::log(uniform(0.9, 1));
    case Decay::kAny:
      return std::log(uniform(1e-9, 1));
    case Decay::kHard:
      return uniform(0, 1) < 0.3 ? uniform(-100, -10) : uniform(-0.01, 0);
  }
  return 0;
}

struct Shape {
  int32_t qk_heads, v_heads;
  Extent bucket;
  DType state = DType::kFloat32;
  Decay decay = Decay::kOwn;
};

// Lengths of up to bucket.requests sequences and their slots.
struct Batch {
  std::vector<int32_t> lengths = {};
  std::vector<Slot> initial = {}, final = {};
  int32_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), 0); }
};

template <class T>
absl::Status Put(Stream& stream, const DeviceBuffer& to, const std::vector<T>& values) {
  PRISTINE_RETURN_IF_ERROR(
      stream.CopyFromHost(to.As<std::byte>().Sub(0, values.size() * sizeof(T)),
                          {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)}));
  return stream.Synchronize();
}

// Sets a variable until its end.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) { EXPECT_EQ(setenv(name, value, 1), 0); }
  ~ScopedVariable() { EXPECT_EQ(unsetenv(name_), 0); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  const char* const name_;
};

template <class BackendT>
class PrefillTest : public DeviceTest<BackendT> {
 protected:
  static constexpr bool kCuda = std::is_same_v<BackendT, Cuda>;
  // PRISTINE_GDN_CHUNK_H_BV for two kernels and for one, whatever the bucket would choose.
  static constexpr const char* kWays[] = {"64", "128"};

  // All tensors of the bucket and a pool whose every number is NaN.
  void Make(const Shape& shape, int32_t slots, uint64_t seed) {
    random_.seed(seed);
    shape_ = shape;
    pool_.reset();
    ASSERT_OK_AND_ASSIGN(
        prefill_, Prefill::Create(*this->device_,
                                  {.largest = shape.bucket, .qk_heads = shape.qk_heads, .v_heads = shape.v_heads}));
    ASSERT_OK_AND_ASSIGN(pool_, StatePool::Create(*this->device_, shape.state, shape.v_heads, slots));
    const size_t requests = static_cast<size_t>(shape.bucket.requests);
    ASSERT_OK_AND_ASSIGN(cu_seqlens_, this->device_->Allocate((requests + 1) * 4, "cu_seqlens"));
    ASSERT_OK_AND_ASSIGN(initial_, this->device_->Allocate(requests * 4, "initial_slots"));
    ASSERT_OK_AND_ASSIGN(final_, this->device_->Allocate(requests * 4, "final_slots"));
    const size_t tokens = static_cast<size_t>(shape.bucket.tokens);
    const size_t qk = static_cast<size_t>(shape.qk_heads), heads = static_cast<size_t>(shape.v_heads);
    q_ = Normal(tokens * qk);
    k_ = Normal(tokens * qk);
    v_ = Uniform(random_, tokens * heads * 128, -1, 1);
    beta_ = Uniform(random_, tokens * heads, 0, 1);
    g_.resize(tokens * heads);
    for (size_t i = 0; i < g_.size(); ++i) {
      g_[i] = DrawLogDecay(shape.decay, static_cast<int32_t>(i % heads), random_);
    }
  }

  // Rows of 128 of length 1.
  std::vector<double> Normal(size_t rows) {
    std::normal_distribution<double> normal;
    std::vector<double> values(rows * 128);
    for (double& value : values) value = normal(random_);
    for (size_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (size_t i = 0; i < 128; ++i) sum += values[r * 128 + i] * values[r * 128 + i];
      for (size_t i = 0; i < 128; ++i) values[r * 128 + i] /= std::sqrt(sum);
    }
    return values;
  }

  // Uploads everything for `batch`: tokens past its end are NaN, and so is every state that nothing starts from.
  void Upload(const Batch& batch) {
    batch_ = batch;
    const auto poisoned = [&](DType dtype, std::vector<double> values, Tensor& tensor) {
      const size_t row = values.size() / static_cast<size_t>(shape_.bucket.tokens);
      std::fill(values.begin() + static_cast<size_t>(batch.tokens()) * row, values.end(), NAN);
      if (tensor.memory.bytes() == 0 || tensor.values.size() != values.size()) {
        ASSERT_OK_AND_ASSIGN(tensor, MakeTensor(*this->device_, *this->stream_, dtype, values));
      } else {
        const Bytes bytes = Encode(dtype, values);
        tensor.values = Decoded(dtype, bytes);
        ASSERT_OK(Put(*this->stream_, tensor.memory, bytes));
      }
    };
    poisoned(DType::kBFloat16, q_, q_tensor_);
    poisoned(DType::kBFloat16, k_, k_tensor_);
    poisoned(DType::kBFloat16, v_, v_tensor_);
    poisoned(DType::kFloat32, g_, g_tensor_);
    poisoned(DType::kFloat32, beta_, beta_tensor_);
    poisoned(DType::kBFloat16, std::vector<double>(v_.size(), NAN), out_);
    const size_t requests = static_cast<size_t>(shape_.bucket.requests);
    std::vector<int32_t> cu(requests + 1);
    std::vector<Slot> initial(requests, kNoSlot), final(requests, kNoSlot);
    for (size_t i = 0; i < requests; ++i) {
      cu[i + 1] = cu[i] + (i < batch.lengths.size() ? batch.lengths[i] : 0);
      if (i < batch.initial.size()) initial[i] = batch.initial[i];
      if (i < batch.final.size()) final[i] = batch.final[i];
    }
    ASSERT_OK(Put(*this->stream_, cu_seqlens_, cu));
    ASSERT_OK(Put(*this->stream_, initial_, initial));
    ASSERT_OK(Put(*this->stream_, final_, final));
    std::vector<double> states(pool_->view().states.size() / SizeOf(shape_.state), NAN);
    const size_t slot_size = static_cast<size_t>(pool_->view().slot_stride);
    for (const Slot slot : batch.initial) {
      if (slot < 0 || slot >= pool_->view().slots) continue;
      const std::vector<double> values = Uniform(random_, slot_size, -0.3, 0.3);
      std::copy(values.begin(), values.end(), states.begin() + static_cast<size_t>(slot) * slot_size);
    }
    state_bytes_ = Encode(shape_.state, states);
    ResetOutputs();
  }
  // The states as uploaded, and an output full of NaN.
  void ResetOutputs() {
    ASSERT_OK(this->stream_->CopyFromHost(pool_->view().states, state_bytes_));
    ASSERT_OK(this->stream_->Fill(out_.bytes(), std::byte{0xFF}));
    ASSERT_OK(this->stream_->Synchronize());
  }

  PrefillTensors Tensors() const {
    return {.q = {q_tensor_.bytes(), 0},
            .k = {k_tensor_.bytes(), 0},
            .v = {v_tensor_.bytes(), 0},
            .g = g_tensor_.memory.template As<const float>(),
            .beta = beta_tensor_.memory.template As<const float>(),
            .cu_seqlens = cu_seqlens_.As<const int32_t>(),
            .initial_slots = initial_.As<const Slot>(),
            .final_slots = final_.As<const Slot>(),
            .out = out_.bytes()};
  }
  absl::Status Run(Stream& stream) const { return prefill_->Run(stream, shape_.bucket, Tensors(), pool_->view()); }

  HeadInputs Inputs(size_t sequence, size_t head) const {
    const size_t begin = static_cast<size_t>(
        std::accumulate(batch_.lengths.begin(), batch_.lengths.begin() + static_cast<std::ptrdiff_t>(sequence), 0));
    const size_t qk = static_cast<size_t>(shape_.qk_heads), heads = static_cast<size_t>(shape_.v_heads);
    const size_t qk_head = head / (heads / qk);
    HeadInputs in;
    in.scale = PrefillConfig().scale;
    for (size_t t = begin; t < begin + static_cast<size_t>(batch_.lengths[sequence]); ++t) {
      const auto append = [](std::vector<double>& to, const Tensor& from, size_t row) {
        const auto at = from.values.begin() + static_cast<std::ptrdiff_t>(row * 128);
        to.insert(to.end(), at, at + 128);
      };
      append(in.q, q_tensor_, t * qk + qk_head);
      append(in.k, k_tensor_, t * qk + qk_head);
      append(in.v, v_tensor_, t * heads + head);
      in.g.push_back(g_tensor_.values[t * heads + head]);
      in.beta.push_back(beta_tensor_.values[t * heads + head]);
    }
    return in;
  }

  // What a run leaves, against the formulas for the value heads that `wanted` names, and against the bits of before for
  // everything that the batch does not name.
  void ExpectRight(const std::function<bool(size_t)>& wanted = [](size_t) { return true; }) {
    const std::vector<double> before = Decoded(shape_.state, state_bytes_);
    ASSERT_OK_AND_ASSIGN(const Bytes after_bytes, ReadBytes(*this->stream_, pool_->view().states));
    const std::vector<double> after = Decoded(shape_.state, after_bytes);
    ASSERT_OK_AND_ASSIGN(const std::vector<double> out, ReadTensor(*this->stream_, out_));
    const size_t heads = static_cast<size_t>(shape_.v_heads), slots = static_cast<size_t>(pool_->view().slots);
    const size_t state_size = static_cast<size_t>(kStateElements), slot_size = heads * state_size;
    std::vector<bool> stored(slots);
    std::vector<double> expected_out, got_out, expected_states, got_states;
    size_t begin = 0;
    for (size_t i = 0; i < batch_.lengths.size(); ++i) {
      const Slot from = i < batch_.initial.size() ? batch_.initial[i] : kNoSlot;
      const Slot to = i < batch_.final.size() ? batch_.final[i] : kNoSlot;
      const bool store = to >= 0 && static_cast<size_t>(to) < slots;
      if (store) stored[static_cast<size_t>(to)] = true;
      for (size_t h = 0; h < heads; ++h) {
        if (!wanted(h)) continue;
        std::vector<double> state(state_size);
        if (from >= 0 && static_cast<size_t>(from) < slots) {
          const auto at =
              before.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(from) * slot_size + h * state_size);
          state.assign(at, at + kStateElements);
        }
        const std::vector<double> o = RecurrentReference(Inputs(i, h), state);
        for (size_t t = 0; t < o.size() / 128; ++t) {
          for (size_t d = 0; d < 128; ++d) {
            expected_out.push_back(o[t * 128 + d]);
            got_out.push_back(out[((begin + t) * heads + h) * 128 + d]);
          }
        }
        if (!store) continue;
        expected_states.insert(expected_states.end(), state.begin(), state.end());
        const auto at =
            after.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(to) * slot_size + h * state_size);
        got_states.insert(got_states.end(), at, at + kStateElements);
      }
      begin += static_cast<size_t>(batch_.lengths[i]);
    }
    ExpectClose(expected_out, got_out, 1e-2, 1e-2, "out");
    ExpectClose(expected_states, got_states, 5e-3, 1e-3, "states");
    for (size_t i = begin * heads * 128; i < out.size(); ++i) ASSERT_EQ(out[i], 0) << "past the last sequence";
    const size_t slot_bytes = slot_size * SizeOf(shape_.state);
    for (size_t s = 0; s < slots; ++s) {
      if (stored[s]) continue;
      EXPECT_TRUE(std::equal(state_bytes_.begin() + static_cast<std::ptrdiff_t>(s * slot_bytes),
                             state_bytes_.begin() + static_cast<std::ptrdiff_t>((s + 1) * slot_bytes),
                             after_bytes.begin() + static_cast<std::ptrdiff_t>(s * slot_bytes)))
          << "slot " << s;
    }
  }
  static void ExpectClose(const std::vector<double>& expected, const std::vector<double>& got, double absolute,
                          double relative, const char* what) {
    EXPECT_LT(RelativeRms(expected, got), 0.005) << what;
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_LE(std::abs(expected[i] - got[i]), absolute + relative * std::abs(expected[i]))
          << what << " element " << i << ": expected " << expected[i] << ", got " << got[i];
    }
  }

  void TearDown() override {
    prefill_.reset();
    pool_.reset();
    for (Tensor* tensor : {&q_tensor_, &k_tensor_, &v_tensor_, &g_tensor_, &beta_tensor_, &out_}) *tensor = {};
    for (DeviceBuffer* buffer : {&cu_seqlens_, &initial_, &final_}) *buffer = {};
    DeviceTest<BackendT>::TearDown();
  }

  std::mt19937_64 random_;
  Shape shape_;
  Batch batch_;
  std::unique_ptr<Prefill> prefill_;
  std::unique_ptr<StatePool> pool_;
  std::vector<double> q_, k_, v_, g_, beta_;
  Tensor q_tensor_, k_tensor_, v_tensor_, g_tensor_, beta_tensor_, out_;
  DeviceBuffer cu_seqlens_, initial_, final_;
  Bytes state_bytes_;
};

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_GDN_PREFILL_RIG_H_
