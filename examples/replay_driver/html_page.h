// The style and the script of the page that --html writes: the page loads nothing.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_PAGE_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_PAGE_H_

namespace pristine::replay_driver {

extern const char* const kPageStyle;
// Draws the charts from the JSON in #data (html_report.cc writes it) into the elements of class "plot".
extern const char* const kPageScript;

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_HTML_PAGE_H_
