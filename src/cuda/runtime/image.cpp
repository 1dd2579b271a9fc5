#include "cuda/runtime/image.h"

#include <cstdio>
#include <optional>
#include <utility>

#include "attention/error.h"
#include "cuda/runtime/cache.h"
#include "cuda/runtime/log.h"

namespace flash_attn_plus::cuda {
namespace {

std::string milliseconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.0f ms", 1e3 * seconds);
  return text;
}

// Without a compiler, what another one has left.
Image image_without_compiler(const KernelSource& source, const Program& program, int arch,
                             const Error& missing) {
  const auto directory = cache_directory();
  const std::string prefix = cache_prefix(source, program, {arch, false});
  auto found = read_cached_of_any_compiler(directory, prefix);
  if (!found) {
    fail(missing.what(), "\nThe kernel ", source.spec, " for sm_", arch,
         " is not in the cache either (", prefix, "* in ", directory,
         "); `python -m flash_attn compile` can fill one on another machine.");
  }
  log("read " + source.spec + " for sm_" + std::to_string(arch) + " from " + directory.string());
  return {std::move(*found), true, true};
}

}  // namespace

Image image_for(const KernelSource& source, int arch) {
  const Program program = make_program(source);
  const Nvrtc* compiler = nullptr;
  try {
    compiler = &nvrtc();
  } catch (const Error& missing) {
    return image_without_compiler(source, program, arch, missing);
  }
  const Target target = target_for(arch, compiler->architectures);
  const auto directory = cache_directory();
  const std::string name =
      cache_name(cache_prefix(source, program, target), compiler_version(*compiler));
  if (auto found = read_cached(directory, name)) {
    log("read " + source.spec + " for " + target.option() + " from " + directory.string());
    return {std::move(*found), true, true};
  }
  Image image{compile(*compiler, program, target), false, true};
  log("compiled " + source.spec + " for " + target.option() + " in " +
      milliseconds(image.compilation.seconds));
  std::string reason;
  image.kept = write_cached(directory, name, image.compilation, reason);
  if (!image.kept) {
    log("cannot keep compiled kernels in " + directory.string() + ": " + reason);
  }
  return image;
}

}  // namespace flash_attn_plus::cuda
