// Signature: one number over a sequence of numbers and texts, the same in every process and on every machine, so that
// ranks can compare what they captured. FNV-1a in 64 bits over bytes: a number is 8 of them, the lowest first; a text
// is its length as a number, then its bytes. Order counts. Not a cryptographic hash.
#ifndef PRISTINE_GRAPH_RUNTIME_SIGNATURE_H_
#define PRISTINE_GRAPH_RUNTIME_SIGNATURE_H_

#include <cstdint>
#include <string>

namespace pristine {

class Signature {
 public:
  void AddNumber(int64_t number) {
    for (int shift = 0; shift < 64; shift += 8) AddByte(static_cast<uint8_t>(static_cast<uint64_t>(number) >> shift));
  }
  void AddText(const std::string& text) {
    AddNumber(static_cast<int64_t>(text.size()));
    for (const char c : text) AddByte(static_cast<uint8_t>(c));
  }
  uint64_t hash() const { return hash_; }

 private:
  void AddByte(uint8_t byte) { hash_ = (hash_ ^ byte) * 0x100000001b3u; }

  uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace pristine

#endif  // PRISTINE_GRAPH_RUNTIME_SIGNATURE_H_
