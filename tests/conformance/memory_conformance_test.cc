// Owners of memory, the engine's allocator, and memory that cannot be written once sealed.
#ifdef PRISTINE_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "tests/conformance/conformance.h"

namespace pristine::testing {
namespace {

// An engine's allocator. Remembers what it gave, and what Host memory looked like when it came back.
class EngineMemory : public MemoryResource {
 public:
  explicit EngineMemory(Backend backend) : backend_(backend) {}
  absl::StatusOr<void*> Allocate(size_t bytes, size_t alignment) override {
    if (refuse_) return absl::ResourceExhaustedError("the engine's pool is full");
    void* address = nullptr;
    if (backend_ == Backend::kHost) {
      address = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    } else {
#ifdef PRISTINE_HAS_CUDA
      if (cudaMalloc(&address, bytes) != cudaSuccess) return absl::ResourceExhaustedError("cudaMalloc");
#endif
    }
    ++allocations_;
    live_bytes_ += bytes;
    return address;
  }
  void Deallocate(void* address, size_t bytes) noexcept override {
    live_bytes_ -= bytes;
    if (backend_ == Backend::kHost) {
      const auto* first = static_cast<const unsigned char*>(address);
      freed_pattern_bytes_ = static_cast<size_t>(std::count(first, first + bytes, 0xDD));
      std::free(address);
    } else {
#ifdef PRISTINE_HAS_CUDA
      cudaFree(address);
#endif
    }
  }

  const Backend backend_;
  bool refuse_ = false;
  int allocations_ = 0;
  size_t live_bytes_ = 0;
  size_t freed_pattern_bytes_ = 0;
};

template <class BackendT>
absl::StatusOr<std::unique_ptr<Device>> CreateWith(MemoryResource* memory) {
  const std::string name = BackendT::kName;
  if (name == "Cuda") return CreateCudaDevice(0, {.memory = memory});
  return CreateHostDevice({.run = name == "HostEager" ? HostOptions::Run::kEager : HostOptions::Run::kDeferred,
                           .enforce_accesses = true,
                           .memory = memory});
}

template <class BackendT>
class MemoryConformance : public ConformanceTest<BackendT> {
 protected:
  // Sealed memory that holds `values`.
  ProtectedBuffer MakeSealed(const std::vector<int>& values) {
    absl::StatusOr<ProtectedBuffer> buffer = this->device_->AllocateProtected(values.size() * sizeof(int), "originals");
    EXPECT_OK(buffer);
    EXPECT_OK(buffer->Write(0, HostBytes(values)));
    EXPECT_OK(buffer->Seal());
    return *std::move(buffer);
  }
  std::vector<int> ReadSealed(const ProtectedBuffer& buffer) {
    std::vector<int> values(buffer.bytes() / sizeof(int));
    EXPECT_OK(this->stream_->CopyToHost(WritableHostBytes(values), buffer.span()));
    EXPECT_OK(this->stream_->Synchronize());
    return values;
  }
};
TYPED_TEST_SUITE(MemoryConformance, AllBackends, BackendNames);

int* SealedInts(const ProtectedBuffer& buffer) {
  return reinterpret_cast<int*>(const_cast<std::byte*>(buffer.span().address()));
}

TYPED_TEST(MemoryConformance, AddressesAreAlignedAndAllocationsCounted) {
  const size_t before = this->device_->total_allocations();
  {
    ASSERT_OK_AND_ASSIGN(DeviceBuffer a, this->device_->Allocate(1, "a"));
    ASSERT_OK_AND_ASSIGN(DeviceBuffer b, this->device_->Allocate(5000, "b"));
    ASSERT_OK_AND_ASSIGN(PinnedBuffer c, this->device_->AllocatePinned(3, "c"));
    ASSERT_OK_AND_ASSIGN(ProtectedBuffer d, this->device_->AllocateProtected(3, "d"));
    EXPECT_GE(this->device_->watch_alignment(), 256u);
    for (const DeviceBuffer* buffer : {&a, &b}) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->As<int>().address()) % this->device_->watch_alignment(), 0u);
    }
    EXPECT_EQ(b.bytes(), 5000u);
    EXPECT_EQ(d.bytes(), 3u);
    EXPECT_EQ(this->device_->live_allocations(), 4u);
  }
  EXPECT_EQ(this->device_->live_allocations(), 0u);
  EXPECT_EQ(this->device_->total_allocations(), before + 4);
}

TYPED_TEST(MemoryConformance, BadSizesAreRefused) {
  EXPECT_STATUS(this->device_->Allocate(0, "empty"), kInvalidArgument, "'empty': 0 bytes");
  EXPECT_STATUS(this->device_->AllocatePinned(0, "empty"), kInvalidArgument, "empty");
  EXPECT_STATUS(this->device_->AllocateProtected(0, "empty"), kInvalidArgument, "empty");
  for (const size_t bytes : {size_t{1} << 60, std::numeric_limits<size_t>::max()}) {
    EXPECT_EQ(this->device_->Allocate(bytes, "huge").status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(this->device_->AllocatePinned(bytes, "huge").status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(this->device_->AllocateProtected(bytes, "huge").status().code(), absl::StatusCode::kResourceExhausted);
  }
  EXPECT_OK(this->stream_->Fill({}, std::byte{0}));
  EXPECT_OK(this->stream_->Synchronize());
}

TYPED_TEST(MemoryConformance, OwnersMoveAndFreeOnce) {
  DeviceBuffer a = this->MakeInts({1, 2});
  DeviceBuffer b = std::move(a);
  EXPECT_EQ(a.bytes(), 0u);  // NOLINT: moved from on purpose
  a = this->MakeInts({3});
  b = std::move(a);
  EXPECT_EQ(this->device_->live_allocations(), 1u);
  EXPECT_EQ(this->Read(b), std::vector<int>{3});
  ASSERT_OK_AND_ASSIGN(PinnedBuffer pinned, this->device_->AllocatePinned(4, "pinned"));
  PinnedBuffer pinned_too = std::move(pinned);
  pinned = std::move(pinned_too);
  ProtectedBuffer sealed = this->MakeSealed({7});
  ProtectedBuffer sealed_too = std::move(sealed);
  sealed = std::move(sealed_too);
  EXPECT_TRUE(sealed.sealed());
  EXPECT_EQ(this->ReadSealed(sealed), std::vector<int>{7});
  EXPECT_EQ(this->device_->live_allocations(), 3u);
}

TYPED_TEST(MemoryConformance, PinnedMemoryStartsZeroedAndKernelsReachIt) {
  ASSERT_OK_AND_ASSIGN(PinnedBuffer pinned, this->device_->AllocatePinned(4 * sizeof(int), "pinned"));
  const absl::Span<int> values = pinned.As<int>();
  EXPECT_EQ(std::vector<int>(values.begin(), values.end()), (std::vector<int>{0, 0, 0, 0}));
  values[1] = 5;
  ASSERT_OK(Launch(*this->stream_, kAddOne, {static_cast<int*>(pinned.device_address()), 4}));
  ASSERT_OK(this->stream_->Synchronize());
  EXPECT_EQ(std::vector<int>(values.begin(), values.end()), (std::vector<int>{1, 6, 1, 1}));
}

TYPED_TEST(MemoryConformance, TheEnginesAllocatorIsUsed) {
  EngineMemory memory(this->device_->backend());
  {
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> device, CreateWith<TypeParam>(&memory));
    {
      ASSERT_OK_AND_ASSIGN(DeviceBuffer buffer, device->Allocate(10'000, "buffer"));
      EXPECT_EQ(memory.allocations_, 1);
      EXPECT_GE(memory.live_bytes_, 10'000u);
    }
    EXPECT_EQ(memory.live_bytes_, 0u);
    memory.refuse_ = true;
    EXPECT_STATUS(device->Allocate(4, "refused"), kResourceExhausted, "the engine's pool is full");
    EXPECT_EQ(device->live_allocations(), 0u);
  }
}

// C6 row 13: on Host, work that uses freed memory finds 0xDD.
TYPED_TEST(MemoryConformance, MemoryFreedAfterItsStreamIsUntouchedByQueuedWork) {
  EngineMemory memory(this->device_->backend());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Device> device, CreateWith<TypeParam>(&memory));
  {
    ASSERT_OK_AND_ASSIGN(DeviceBuffer buffer, device->Allocate(3000, "buffer"));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, device->CreateStream());
    ASSERT_OK(Launch(*stream, kDelay, {1'000'000}));
    ASSERT_OK(stream->Fill(AsWritableBytes(buffer.As<std::byte>()), std::byte{1}));
    // The stream goes first and waits; the fill would otherwise destroy the pattern.
  }
  if (device->backend() == Backend::kHost) {
    EXPECT_GE(memory.freed_pattern_bytes_, 3000u);
  }
}

TYPED_TEST(MemoryConformance, ProtectedMemoryIsWrittenThenSealedThenRead) {
  ASSERT_OK_AND_ASSIGN(ProtectedBuffer buffer, this->device_->AllocateProtected(3 * sizeof(int), "originals"));
  EXPECT_FALSE(buffer.sealed());
  const void* address = buffer.span().address();
  const std::vector<int> values = {1, 2, 3};
  EXPECT_STATUS(buffer.Write(4, HostBytes(values)), kOutOfRange, "12 bytes at 4 of 12");
  EXPECT_STATUS(buffer.Write(std::numeric_limits<size_t>::max(), HostBytes(values)), kOutOfRange, "of 12");
  ASSERT_OK(buffer.Write(0, HostBytes(values)));
  ASSERT_OK(buffer.Write(4, HostBytes({9})));
  EXPECT_EQ(this->ReadSealed(buffer), (std::vector<int>{1, 9, 3})) << "readable before";
  ASSERT_OK(buffer.Seal());
  EXPECT_TRUE(buffer.sealed());
  EXPECT_EQ(buffer.span().address(), address) << "the address stays";
  EXPECT_STATUS(buffer.Write(0, HostBytes(values)), kFailedPrecondition, "sealed");
  EXPECT_STATUS(buffer.Seal(), kFailedPrecondition, "already");
  DeviceBuffer copy = this->MakeInts({0, 0, 0});
  ASSERT_OK(Launch(*this->stream_, kCopyInts, {copy.As<int>().address(), SealedInts(buffer), 3}));
  EXPECT_EQ(this->Read(copy), (std::vector<int>{1, 9, 3})) << "kernels read it";
  EXPECT_EQ(this->ReadSealed(buffer), (std::vector<int>{1, 9, 3})) << "copies read it";
  ProtectedBuffer none;
  EXPECT_STATUS(none.Write(0, HostBytes(values)), kFailedPrecondition, "no memory");
  EXPECT_STATUS(none.Seal(), kFailedPrecondition, "no memory");
}

TYPED_TEST(MemoryConformance, HostAndVirtualMemoryManagementProtectInHardware) {
  ProtectedBuffer sealed = this->MakeSealed({1});
  EXPECT_EQ(sealed.level(), ProtectionLevel::kHardware);
  EXPECT_STREQ(ToString(sealed.level()), "hardware");
}

TYPED_TEST(MemoryConformance, CopyAndFillToSealedMemoryAreRefusedAtTheCallAndNothingSticks) {
  ProtectedBuffer sealed = this->MakeSealed({1, 2, 3});
  DeviceBuffer x = this->MakeInts({0, 0, 0});
  const std::vector<int> host = {4, 5, 6};
  const DeviceSpan<std::byte> to(reinterpret_cast<std::byte*>(SealedInts(sealed)), 3 * sizeof(int));
  EXPECT_EQ(this->stream_->Copy(to, AsBytes(x.As<int>())).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(this->stream_->CopyFromHost(to, HostBytes(host)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(this->stream_->Fill(to.Sub(11, 1), std::byte{0}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_OK(this->stream_->Synchronize());
  EXPECT_OK(Launch(*this->stream_, kAddOne, {x.As<int>().address(), 3}));
  EXPECT_EQ(this->Read(x), (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(this->ReadSealed(sealed), (std::vector<int>{1, 2, 3}));
}

// Death tests run in a process of their own, started afresh.
template <class BackendT>
class SealedMemoryDeathTest : public MemoryConformance<BackendT> {
 protected:
  static void SetUpTestSuite() {
    ::testing::FLAGS_gtest_death_test_style = "threadsafe";
    // A sanitizer would turn the signal into its own report.
    for (const char* name : {"ASAN_OPTIONS", "TSAN_OPTIONS"}) {
      const char* old = std::getenv(name);
      setenv(name, (std::string(old != nullptr ? old : "") + ":handle_segv=0").c_str(), 1);
    }
  }
};
TYPED_TEST_SUITE(SealedMemoryDeathTest, AllBackends, BackendNames);

// Host: the store kills the process. CUDA: the kernel faults, and every later call of the context fails.
TYPED_TEST(SealedMemoryDeathTest, AKernelThatWritesSealedMemoryFaults) {
  ProtectedBuffer sealed = this->MakeSealed({1, 2, 3});
  const SetValueParams store = {SealedInts(sealed), 1, 7};
  if (this->device_->backend() == Backend::kHost) {
    EXPECT_EXIT(
        {
          Launch(*this->stream_, kSetValue, store).IgnoreError();
          this->stream_->Synchronize().IgnoreError();
        },
        ::testing::KilledBySignal(SIGSEGV), "");
  } else {
    EXPECT_EXIT(
        {
          const bool queued = Launch(*this->stream_, kSetValue, store).ok();
          const bool faulted = IsDeviceLost(this->stream_->Synchronize());
          const bool sticky = !this->device_->Allocate(4, "after the fault").ok();
          std::_Exit(queued && faulted && sticky ? 42 : 1);
        },
        ::testing::ExitedWithCode(42), "");
  }
  EXPECT_EQ(this->ReadSealed(sealed), (std::vector<int>{1, 2, 3}));
}

TYPED_TEST(SealedMemoryDeathTest, ACapturedKernelThatWritesSealedMemoryFaults) {
  ProtectedBuffer sealed = this->MakeSealed({1, 2, 3});
  std::unique_ptr<GraphExec> exec = this->MakeExec([&](Stream& stream) {
    return Launch(stream, kAddOne, {SealedInts(sealed), 3});
  });
  if (this->device_->backend() == Backend::kHost) {
    EXPECT_EXIT(
        {
          exec->Launch(*this->stream_).IgnoreError();
          this->stream_->Synchronize().IgnoreError();
        },
        ::testing::KilledBySignal(SIGSEGV), "");
  } else {
    EXPECT_EXIT(
        {
          const bool queued = exec->Launch(*this->stream_).ok();
          std::_Exit(queued && IsDeviceLost(this->stream_->Synchronize()) ? 42 : 1);
        },
        ::testing::ExitedWithCode(42), "");
  }
}

}  // namespace
}  // namespace pristine::testing
