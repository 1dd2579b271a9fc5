// FLASH_ATTN_PLUS_LOG: 1 writes a line for every compiled, loaded and launched kernel to standard
// error, any other text is the file that the lines are added to; empty or 0 is off. Read once.
#pragma once

#include <string>

namespace flash_attn_plus::cuda {

bool logging();
void log(const std::string& line);

}  // namespace flash_attn_plus::cuda
