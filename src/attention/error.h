// What the core throws inside; the C ABI turns it into a status and a message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace flash_attn_plus {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A documented constraint on head dimension or head counts is broken.
class ConstraintError : public Error {
 public:
  using Error::Error;
};

template <typename E = Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw E(message.str());
}

}  // namespace flash_attn_plus
