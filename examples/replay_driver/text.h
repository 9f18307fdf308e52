// Text for the reports: numbers, and strings in JSON and HTML.
#ifndef PRISTINE_EXAMPLES_REPLAY_DRIVER_TEXT_H_
#define PRISTINE_EXAMPLES_REPLAY_DRIVER_TEXT_H_

#include <cstddef>
#include <string>

namespace pristine::replay_driver {

// Six digits; "null" if it is not finite.
std::string NumberText(double value);

// A JSON string with its quotes. What is not UTF-8 becomes the replacement character.
std::string JsonText(const std::string& text);

// For HTML, between tags or in a quoted attribute: nothing in it is markup. What is not UTF-8 becomes the replacement
// character, control characters become spaces. Cut after `most` characters, with an ellipsis.
std::string HtmlText(const std::string& text, size_t most = std::string::npos);

}  // namespace pristine::replay_driver

#endif  // PRISTINE_EXAMPLES_REPLAY_DRIVER_TEXT_H_
