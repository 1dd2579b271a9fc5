#include "cuda/runtime/compile.h"

#include <algorithm>
#include <chrono>
#include <string_view>

#include "attention/error.h"

namespace flash_attn_plus::cuda {
namespace {

constexpr std::string_view kSpecs = "cuda/spec/";

// What a text includes, by name: lines of the form `#include "name"` or `#include <name>`.
std::vector<std::string_view> included_names(std::string_view text) {
  constexpr std::string_view kInclude = "#include ";
  std::vector<std::string_view> names;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    if (line.substr(0, kInclude.size()) == kInclude) {
      const size_t name = kInclude.size() + 1;
      names.push_back(line.substr(name, line.find_first_of("\">", name) - name));
    }
    at = end + 1;
  }
  return names;
}

// Headers that `text` reaches, each once, in the order in which they are met.
void add_reachable(std::string_view text, std::vector<EmbeddedText>& headers) {
  for (const std::string_view name : included_names(text)) {
    const auto is_it = [&](const EmbeddedText& header) { return header.name == name; };
    if (std::any_of(headers.begin(), headers.end(), is_it)) continue;
    const auto& all = embedded_texts();
    const auto found = std::find_if(all.begin(), all.end(), is_it);
    if (found == all.end()) fail("the kernels include ", name, ", which is not in the library");
    headers.push_back(*found);
    add_reachable(found->text, headers);
  }
}

void check_nvrtc(const Nvrtc& nvrtc, NvrtcResult result, const char* function) {
  if (result != kNvrtcSuccess) {
    fail("NVRTC ", nvrtc.major, ".", nvrtc.minor, " (", nvrtc.path, "): ", function,
         " failed with ", nvrtc.error_text(result));
  }
}

class ProgramHandle {
 public:
  explicit ProgramHandle(const Nvrtc& nvrtc) : nvrtc_(nvrtc) {}
  ~ProgramHandle() {
    if (handle_ != nullptr) nvrtc_.destroy(&handle_);
  }
  ProgramHandle(const ProgramHandle&) = delete;
  ProgramHandle& operator=(const ProgramHandle&) = delete;
  void** address() { return &handle_; }
  void* get() const { return handle_; }

 private:
  const Nvrtc& nvrtc_;
  void* handle_ = nullptr;
};

std::string read_log(const Nvrtc& nvrtc, void* program) {
  size_t size = 0;
  if (nvrtc.log_size(program, &size) != kNvrtcSuccess || size <= 1) return "";
  std::string log(size, '\0');
  if (nvrtc.log(program, log.data()) != kNvrtcSuccess) return "";
  log.resize(size - 1);  // its terminator
  return log;
}

}  // namespace

Program make_program(const KernelSource& source) {
  Program program;
  program.name = source.spec;
  for (const EmbeddedText& text : embedded_texts()) {
    if (text.name.substr(0, kSpecs.size()) == kSpecs) {
      program.text += "#include \"" + std::string(text.name) + "\"\n";
    }
  }
  const std::string type = source.spec.substr(0, source.spec.find('{'));
  program.text += "namespace flash_attn_plus::cuda {\nconstexpr " + type + " spec" +
                  source.spec.substr(type.size()) + ";\n}\n";
  program.text += std::string("#include \"cuda/kernels/") + source.kernel + ".cuh\"\n";
  add_reachable(program.text, program.headers);
  return program;
}

std::string Target::option() const { return (ptx ? "compute_" : "sm_") + std::to_string(arch); }

Target target_for(int arch, const std::vector<int>& supported) {
  Target target;
  for (const int each : supported) {
    if (each > arch || each < kMinArch) continue;
    target = {each, each / 10 != arch / 10};
  }
  if (target.arch == 0)
    fail("NVRTC does not compile for sm_", arch, " or anything that runs there");
  return target;
}

const std::vector<std::string>& compile_options() {
  static const std::vector<std::string> options = {"-std=c++20", "-default-device",
                                                   "--ptxas-options=-v"};
  return options;
}

Compilation compile(const Nvrtc& nvrtc, const Program& program, const Target& target) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<const char*> names, texts;
  std::vector<std::string> copies;  // texts of the library that end in a zero
  copies.reserve(2 * program.headers.size());
  for (const EmbeddedText& header : program.headers) {
    names.push_back(copies.emplace_back(header.name).c_str());
    texts.push_back(copies.emplace_back(header.text).c_str());
  }
  ProgramHandle handle(nvrtc);
  check_nvrtc(nvrtc,
              nvrtc.create(handle.address(), program.text.c_str(), "kernel.cu",
                           static_cast<int>(names.size()), texts.data(), names.data()),
              "nvrtcCreateProgram");

  const std::string architecture = "--gpu-architecture=" + target.option();
  std::vector<const char*> options = {architecture.c_str()};
  for (const std::string& option : compile_options()) options.push_back(option.c_str());
  const NvrtcResult result =
      nvrtc.compile(handle.get(), static_cast<int>(options.size()), options.data());
  Compilation compilation;
  compilation.log = read_log(nvrtc, handle.get());
  if (result != kNvrtcSuccess) {
    fail("NVRTC ", nvrtc.major, ".", nvrtc.minor, " (", nvrtc.path, ") cannot compile ",
         program.name, " for ", target.option(), ": ", nvrtc.error_text(result), "\n",
         compilation.log);
  }
  size_t size = 0;
  check_nvrtc(nvrtc, (target.ptx ? nvrtc.ptx_size : nvrtc.cubin_size)(handle.get(), &size),
              "reading the size of the result");
  compilation.image.resize(size);
  check_nvrtc(nvrtc, (target.ptx ? nvrtc.ptx : nvrtc.cubin)(handle.get(), compilation.image.data()),
              "reading the result");
  compilation.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return compilation;
}

}  // namespace flash_attn_plus::cuda
