// EXPECT_OK(x), ASSERT_OK(x), EXPECT_STATUS(x, kNotFound, "part of the message"), ASSERT_OK_AND_ASSIGN(auto v, f()).
// Debian's Abseil has no status_matchers.h. There is no NotOk: name the code that you expect.
#ifndef PRISTINE_TESTS_SUPPORT_STATUS_MATCHERS_H_
#define PRISTINE_TESTS_SUPPORT_STATUS_MATCHERS_H_

#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pristine/graph_runtime/status.h"

namespace pristine::testing {

inline absl::Status ToStatus(const absl::Status& status) { return status; }
template <class T>
absl::Status ToStatus(const absl::StatusOr<T>& value) {
  return value.status();
}

inline ::testing::AssertionResult IsOk(const absl::Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << status.ToString();
}
inline ::testing::AssertionResult HasStatus(const absl::Status& status, absl::StatusCode code,
                                            const std::string& part) {
  if (status.code() == code && std::string(status.message()).find(part) != std::string::npos) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "expected " << absl::StatusCodeToString(code) << " with \"" << part
                                       << "\", got " << status.ToString();
}

}  // namespace pristine::testing

#define EXPECT_OK(expression) EXPECT_TRUE(::pristine::testing::IsOk(::pristine::testing::ToStatus(expression)))
#define ASSERT_OK(expression) ASSERT_TRUE(::pristine::testing::IsOk(::pristine::testing::ToStatus(expression)))
#define EXPECT_STATUS(expression, code, part) \
  EXPECT_TRUE(::pristine::testing::HasStatus(::pristine::testing::ToStatus(expression), absl::StatusCode::code, part))
#define ASSERT_OK_AND_ASSIGN(declaration, expression) \
  ASSERT_OK_AND_ASSIGN_IMPL(PRISTINE_STATUS_CONCAT(pristine_or_, __LINE__), declaration, expression)
#define ASSERT_OK_AND_ASSIGN_IMPL(result, declaration, expression) \
  auto result = (expression);                                      \
  ASSERT_TRUE(::pristine::testing::IsOk(result.status()));         \
  declaration = *std::move(result)

#endif  // PRISTINE_TESTS_SUPPORT_STATUS_MATCHERS_H_
