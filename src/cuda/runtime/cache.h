// Compiled kernels on disk: one file each, written under a temporary name and renamed, so that a
// reader meets whole files only and any number of processes may fill the same directory at once.
// No locks, no time stamps; a file that is not as it was written counts as missing.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "cuda/runtime/compile.h"

namespace flash_attn_plus::cuda {

// $FLASH_ATTN_PLUS_CACHE_DIR, else $XDG_CACHE_HOME/flash-attn-plus, else
// $HOME/.cache/flash-attn-plus; empty, which is no cache, when none of these is set.
std::filesystem::path cache_directory();

// What a file's name says of the compiler: 13.0.
std::string compiler_version(const Nvrtc& nvrtc);

// "attention_forward-sm_90-<hash>-", which the compiler's version and a suffix follow. The hash is
// of the program (its Spec included), all headers that it reaches, and the options.
std::string cache_prefix(const KernelSource& source, const Program& program, const Target& target);
std::string cache_name(const std::string& prefix, const std::string& compiler_version);

// Nothing when there is no such file, or it is damaged.
std::optional<Compilation> read_cached(const std::filesystem::path& directory,
                                       const std::string& name);
// Of any compiler, for machines without one.
std::optional<Compilation> read_cached_of_any_compiler(const std::filesystem::path& directory,
                                                       const std::string& prefix);

// Whether it was written; nothing is left behind when not, and `reason` says why.
bool write_cached(const std::filesystem::path& directory, const std::string& name,
                  const Compilation& compilation, std::string& reason);

}  // namespace flash_attn_plus::cuda
