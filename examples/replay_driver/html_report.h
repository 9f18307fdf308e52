// The page of a run: one file that needs nothing else, for a browser.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_REPORT_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_REPORT_H_

#include <ostream>

#include "examples/replay_driver/report.h"

namespace pristine::replay_driver {

// Buckets, padding and latency over steps in at most 480 columns, totals by bucket, the first RunLog::kListed
// violations, each with a link to its flight record, and the last flight records. Below 2 MB however long the run was
// and whatever its strings hold.
void WriteHtml(const RunReport& report, std::ostream& out);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_REPORT_H_
