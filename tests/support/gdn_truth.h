// The gated delta rule in double, token by token and as written down in attention/gdn/recurrent.h: what tests and the
// replay driver compare with. Shares nothing with the library.
#ifndef PRISTINE_TESTS_SUPPORT_GDN_TRUTH_H_
#define PRISTINE_TESTS_SUPPORT_GDN_TRUTH_H_

#include <cstdint>
#include <vector>

namespace pristine::testing {

inline constexpr int32_t kGdnDim = 128;  // K and V

// One token of one value head, as the projections leave it: q and k are not normalised yet.
struct GdnToken {
  const double *q, *k, *v;  // [kGdnDim] each
  double a, b;              // the inputs of the gates
  double a_log, dt_bias;    // of the head
};

// state [V, K] goes on by one token; out [V], with a scale of 1 / sqrt(K).
void GdnStep(const GdnToken& token, std::vector<double>& state, double* out);

}  // namespace pristine::testing

#endif  // PRISTINE_TESTS_SUPPORT_GDN_TRUTH_H_
