#include "cuda/runtime/log.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace flash_attn_plus::cuda {
namespace {

// Null when off; never closed.
std::FILE* open() {
  const char* value = std::getenv("FLASH_ATTN_PLUS_LOG");
  const std::string_view text = value == nullptr ? "" : value;
  if (text.empty() || text == "0") return nullptr;
  if (text == "1") return stderr;
  return std::fopen(value, "a");
}

std::FILE* file() {
  static std::FILE* const opened = open();
  return opened;
}

}  // namespace

bool logging() { return file() != nullptr; }

void log(const std::string& line) {
  if (!logging()) return;
  // One write a line: those of several threads and processes do not mix.
  const std::string text = "flash_attn: " + line + "\n";
  std::fwrite(text.data(), 1, text.size(), file());
  std::fflush(file());
}

}  // namespace flash_attn_plus::cuda
