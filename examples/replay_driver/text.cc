#include "examples/replay_driver/text.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace pristine::replay_driver {
namespace {

// Bytes of the UTF-8 character that `text` has at `at`; 0: none, such as an overlong form or half of a surrogate pair.
size_t Utf8Bytes(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) -> uint32_t { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0; };
  const uint32_t lead = byte(at);
  if (lead < 0x80) return 1;
  const size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  uint32_t code = lead & (0xffu >> (bytes + 1));
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(at + i) & 0x3f);
  }
  constexpr uint32_t kLeast[] = {0x80, 0x800, 0x10000};
  const bool exists =
      lead >= 0xc0 && lead < 0xf8 && code >= kLeast[bytes - 2] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
  return exists ? bytes : 0;
}

}  // namespace

std::string NumberText(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return text;
}

std::string JsonText(const std::string& text) {
  std::string quoted = "\"";
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    const size_t bytes = Utf8Bytes(text, at);
    if (bytes == 0) {
      quoted += "\\ufffd";
    } else if (c == '"' || c == '\\') {
      quoted += {'\\', c};
    } else if (bytes == 1 && (c < ' ' || c == '\x7f')) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(c));
      quoted += escaped;
    } else {
      quoted.append(text, at, bytes);
    }
    at += std::max<size_t>(bytes, 1);
  }
  return quoted + "\"";
}

std::string HtmlText(const std::string& text, size_t most) {
  std::string html;
  size_t characters = 0;
  for (size_t at = 0; at < text.size(); ++characters) {
    if (characters == most) return html + "\u2026";
    const size_t bytes = Utf8Bytes(text, at);
    const char c = text[at];
    if (bytes == 0) {
      html += "\ufffd";
    } else if (bytes > 1) {
      html.append(text, at, bytes);
    } else if (c == '<') {
      html += "&lt;";
    } else if (c == '>') {
      html += "&gt;";
    } else if (c == '&') {
      html += "&amp;";
    } else if (c == '"') {
      html += "&quot;";
    } else if (c == '\'') {
      html += "&#39;";
    } else {
      html += c < ' ' || c == '\x7f' ? ' ' : c;
    }
    at += std::max<size_t>(bytes, 1);
  }
  return html;
}

}  // namespace pristine::replay_driver
