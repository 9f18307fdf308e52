#include "examples/replay_driver/options.h"

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace pristine::replay_driver {
namespace {

TEST(Options, DefaultsAreTheMainJob) {
  ASSERT_OK_AND_ASSIGN(const Options options, ParseOptions({}));
  EXPECT_TRUE(options.synthetic());
  EXPECT_EQ(options.step_limit(), 1500);
  EXPECT_EQ(options.buckets, (std::vector<int32_t>{1, 2, 4, 8, 16, 32}));
  EXPECT_EQ(options.kv_tokens, 131072);
  EXPECT_EQ(options.window, 512);
  EXPECT_EQ(options.compare_eager, 100);
  EXPECT_EQ(options.scheduler, attention::DecodeScheduler::kDevice);
  EXPECT_EQ(options.spec, 0);
}

TEST(Options, BucketsAreThePowersOfTwoBelowMaxBatchAndMaxBatch) {
  ASSERT_OK_AND_ASSIGN(const Options options, ParseOptions({"--max-batch=12"}));
  EXPECT_EQ(options.buckets, (std::vector<int32_t>{1, 2, 4, 8, 12}));
  ASSERT_OK_AND_ASSIGN(const Options one, ParseOptions({"--max-batch=1"}));
  EXPECT_EQ(one.buckets, (std::vector<int32_t>{1}));
}

TEST(Options, TheMostQueryHeadsThatAKernelTakesAreAccepted) {
  EXPECT_OK(ParseOptions({"--heads=64"}));
  EXPECT_OK(ParseOptions({"--heads=1024", "--kv-heads=32", "--kv-groups=32", "--max-batch=4096", "--head-dim=128"}));
}

TEST(Options, AFileRunsToItsEnd) {
  ASSERT_OK_AND_ASSIGN(const Options options, ParseOptions({"--trace=requests.csv"}));
  EXPECT_GT(options.step_limit(), int64_t{1} << 60);
  ASSERT_OK_AND_ASSIGN(const Options named, ParseOptions({"--trace=requests", "--format=azure-csv", "--steps=7"}));
  EXPECT_EQ(named.step_limit(), 7);
}

TEST(Options, HelpNamesEveryOption) {
  const std::string help = HelpText();
  for (const char* name :
       {"device",       "trace",     "format",        "steps",       "repeat",       "step-ms",      "max-batch",
        "buckets",      "model",     "gdn-qk-heads",  "gdn-v-heads", "dtype",        "heads",        "kv-heads",
        "head-dim",     "page-size", "kv-tokens",     "layers",      "window",       "sparse-block", "topk-blocks",
        "kv-groups",    "dense-len", "scheduler",     "plan-from",   "restore",      "check",        "compare-eager",
        "compare-rows", "overlap",   "staging-slots", "spec",        "draft-extend", "accept",       "inject",
        "seed",         "report",    "html",          "flight-json", "quiet"}) {
    EXPECT_NE(help.find(std::string("  --") + name), std::string::npos) << name;
  }
  // A value that --help asks for is not needed to be understood: everything else may be wrong.
  ASSERT_OK_AND_ASSIGN(const Options options, ParseOptions({"--help"}));
  EXPECT_TRUE(options.help);
}

struct BadCase {
  std::vector<std::string> args;
  std::string part;  // of the message
};

// The name of the case in lists of tests.
void PrintTo(const BadCase& bad_case, std::ostream* out) {
  for (const std::string& arg : bad_case.args) *out << arg << (&arg == &bad_case.args.back() ? "" : " ");
}

class BadOptions : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadOptions, AreRefusedWithNameValueAndWhatIsAccepted) {
  EXPECT_STATUS(ParseOptions(GetParam().args), kInvalidArgument, GetParam().part);
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadOptions,
    ::testing::Values(
        BadCase{{"steps=4"}, "'steps=4': expected an option --name=value"},
        BadCase{{"--stepz=4"}, "--stepz: no such option"}, BadCase{{"--"}, "no such option"},
        BadCase{{"--steps"}, "--steps: expected --steps=N"}, BadCase{{"--quiet=1"}, "expected --quiet without a value"},
        BadCase{{"--steps="}, "--steps=: expected an integer in [1,"},
        BadCase{{"--steps=0"}, "--steps=0: expected an integer in [1,"},
        BadCase{{"--steps=-3"}, "--steps=-3: expected an integer"},
        BadCase{{"--steps=99999999999999999999"}, "expected an integer"},
        BadCase{{"--steps=1e3"}, "--steps=1e3: expected an integer"},
        BadCase{{"--steps=1099511627776"}, "expected at most 10^10 ms"},
        BadCase{{"--max-batch=4097"}, "--max-batch=4097: expected an integer in [1, 4096]"},
        BadCase{{"--buckets=1,2,x"}, "--buckets=1,2,x: expected requests per bucket, ascending"},
        BadCase{{"--buckets=4,2"}, "ascending"}, BadCase{{"--buckets=0,32"}, "ascending"},
        BadCase{{"--buckets="}, "ascending"},
        BadCase{{"--buckets=1,2"}, "--buckets ends with 2: expected --max-batch, which is 32"},
        BadCase{{"--dtype=float16"}, "--dtype=float16: expected one of float32, bfloat16"},
        BadCase{{"--heads=3"}, "--heads=3: expected a multiple of --kv-heads, which is 2"},
        BadCase{{"--heads=66"}, "--heads=66: expected at most 32 times --kv-heads, which is 2"},
        BadCase{{"--kv-groups=3"}, "--kv-groups=3: expected a divisor of --kv-heads"},
        BadCase{{"--head-dim=96"}, "--head-dim=96: expected 64 or 128"}, BadCase{{"--layers=1"}, "--layers=1"},
        BadCase{{"--kv-tokens=8", "--page-size=16"}, "--kv-tokens=8: expected at least one page, which is 16 tokens"},
        BadCase{{"--sparse-block=65536", "--topk-blocks=65536"}, "expected a product that fits in 31 bits"},
        BadCase{{"--kv-tokens=268435456", "--heads=64", "--kv-heads=64", "--kv-groups=64"}, "fits in 31 bits"},
        BadCase{{"--inject=stale-plan"}, "--inject=stale-plan: expected --scheduler=host"},
        BadCase{{"--scheduler=gpu"}, "--scheduler=gpu: expected one of device, host"},
        BadCase{{"--plan-from=hope"}, "--plan-from=hope: expected one of lengths, live"},
        BadCase{{"--restore=on"}, "--restore=on: expected one of graph, stream, off"},
        BadCase{{"--overlap=maybe"}, "--overlap=maybe: expected one of off, on, both"},
        BadCase{{"--staging-slots=1"}, "--staging-slots=1: expected an integer in [2, 64]"},
        BadCase{{"--staging-slots=65"}, "--staging-slots=65: expected an integer in [2, 64]"},
        BadCase{{"--check=maybe"}, "--check=maybe: expected one of off, sampled, always"},
        BadCase{{"--device=gpu"}, "--device=gpu: expected auto, host, cuda or cuda:N"},
        BadCase{{"--device=cuda:"}, "--device=cuda:: expected"}, BadCase{{"--device=cuda:-1"}, "expected auto, host"},
        BadCase{{"--seed=-1"}, "--seed=-1: expected an integer in [0, 2^64)"},
        BadCase{{"--trace="}, "--trace=: expected synthetic|FILE"},
        BadCase{{"--trace=requests.json"}, "the extension names no format; expected .csv or .jsonl, or --format"},
        BadCase{{"--format=jsonl"}, "--format=jsonl: expected one of azure-csv, mooncake-jsonl"},
        BadCase{{"--report="}, "--report=: expected FILE.json"},
        BadCase{{"--spec=1"}, "--spec=1: expected an integer in [2, 16]"},
        BadCase{{"--spec=17"}, "--spec=17: expected an integer in [2, 16]"},
        BadCase{{"--spec=4", "--draft-extend=uniform"}, "expected one of ragged, fixed, fixed-decode"},
        BadCase{{"--spec=16", "--draft-extend=fixed-decode"}, "expected at most 15, as the decode kernels take 16"},
        BadCase{{"--spec=4", "--accept=some"}, "--accept=some: expected one of random, none, all"},
        BadCase{{"--spec=4", "--overlap=on"}, "--overlap with --spec: expected off"},
        BadCase{{"--spec=4", "--plan-from=live"}, "--plan-from=live with --spec: expected lengths"},
        BadCase{
            {"--spec=4", "--window=1048576", "--kv-tokens=1048576", "--max-batch=4096"},
            "--window=1048576 with --spec: expected pages of 1048576 tokens for --max-batch=4096 requests that fit"},
        BadCase{{"--model=hybrid", "--layers=1000", "--gdn-v-heads=256"},
                "expected a state of at most 2^31 values for each request, which would have 12582912000"},
        BadCase{{"--spec=4", "--restore=off"}, "--restore=off with --spec: expected graph"},
        BadCase{{"--spec=4", "--inject=write-constant"},
                "--inject=write-constant with --spec: expected none or misroute"},
        BadCase{{"--spec=4", "--inject=misroute", "--draft-extend=fixed"}, "expected --draft-extend=ragged"},
        BadCase{{"--inject=misroute"}, "--inject=misroute: expected --spec=T with it"},
        BadCase{{"--draft-extend=fixed"}, "--draft-extend: expected --spec=T with it"},
        BadCase{{"--accept=all"}, "--accept: expected --spec=T with it"},
        BadCase{{"--gdn-qk-heads=2"}, "--gdn-qk-heads: expected --model=hybrid with it"},
        BadCase{{"--gdn-v-heads=6"}, "--gdn-v-heads: expected --model=hybrid with it"},
        BadCase{{"--compare-eager=-1"}, "--compare-eager=-1: expected an integer in [0,"}));

}  // namespace
}  // namespace pristine::replay_driver
