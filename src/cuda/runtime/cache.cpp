#include "cuda/runtime/cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace flash_attn_plus::cuda {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSuffix = ".kernel";

// FNV-1a over 128 bits in two halves that differ in their start and multiplier.
class Hash {
 public:
  // A length first, so that no two sequences of texts are the same bytes.
  void add(std::string_view text) {
    add_bytes(std::to_string(text.size()) + ":");
    add_bytes(text);
  }
  uint64_t low() const { return mixed(low_); }
  std::string hex() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string text;
    for (const uint64_t half : {mixed(high_), mixed(low_)}) {
      for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[half >> shift & 15];
    }
    return text;
  }

 private:
  void add_bytes(std::string_view text) {
    for (const char c : text) {
      low_ = (low_ ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
      high_ = (high_ ^ static_cast<unsigned char>(c)) * 0x9E3779B97F4A7C15u;
    }
  }
  static uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDu;
    return x ^ (x >> 33);
  }

  uint64_t low_ = 0xCBF29CE484222325u, high_ = 0x6C62272E07BB0142u;
};

struct Header {
  char magic[8];
  uint64_t log_bytes;
  uint64_t image_bytes;
  uint64_t checksum;
};
constexpr char kMagic[8] = {'F', 'A', 'P', 'K', 'R', 'N', 'L', '1'};

// Of what follows the header, and of the name, so that a renamed file is no other kernel.
uint64_t checksum(const std::string& name, std::string_view body) {
  Hash hash;
  hash.add(name);
  hash.add(body);
  return hash.low();
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  explicit operator bool() const { return descriptor_ >= 0; }
  bool close() {
    const int descriptor = descriptor_;
    descriptor_ = -1;
    return descriptor < 0 || ::close(descriptor) == 0;
  }
  bool write(const char* bytes, size_t count) {
    while (count > 0) {
      const ssize_t written = ::write(descriptor_, bytes, count);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return false;
      bytes += written;
      count -= static_cast<size_t>(written);
    }
    return true;
  }
  bool read_all(std::string& text) {
    char buffer[1 << 16];
    for (;;) {
      const ssize_t count = ::read(descriptor_, buffer, sizeof buffer);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return false;
      if (count == 0) return true;
      text.append(buffer, static_cast<size_t>(count));
    }
  }

 private:
  int descriptor_;
};

}  // namespace

fs::path cache_directory() {
  if (const std::string chosen = environment("FLASH_ATTN_PLUS_CACHE_DIR"); !chosen.empty()) {
    return chosen;
  }
  if (const std::string caches = environment("XDG_CACHE_HOME"); !caches.empty()) {
    return fs::path(caches) / "flash-attn-plus";
  }
  if (const std::string home = environment("HOME"); !home.empty()) {
    return fs::path(home) / ".cache" / "flash-attn-plus";
  }
  return {};
}

std::string compiler_version(const Nvrtc& nvrtc) {
  return std::to_string(nvrtc.major) + "." + std::to_string(nvrtc.minor);
}

std::string cache_prefix(const KernelSource& source, const Program& program, const Target& target) {
  Hash hash;
  hash.add(program.text);
  for (const EmbeddedText& header : program.headers) {
    hash.add(header.name);
    hash.add(header.text);
  }
  for (const std::string& option : compile_options()) hash.add(option);
  hash.add(target.option());
  return std::string(source.entry) + "-" + target.option() + "-" + hash.hex() + "-";
}

std::string cache_name(const std::string& prefix, const std::string& compiler_version) {
  return prefix + compiler_version + std::string(kSuffix);
}

std::optional<Compilation> read_cached(const fs::path& directory, const std::string& name) {
  if (directory.empty()) return std::nullopt;
  File file(::open((directory / name).c_str(), O_RDONLY | O_CLOEXEC));
  std::string text;
  if (!file || !file.read_all(text)) return std::nullopt;
  Header header;
  if (text.size() < sizeof header) return std::nullopt;
  std::memcpy(&header, text.data(), sizeof header);
  const std::string_view body = std::string_view(text).substr(sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.log_bytes > body.size() ||
      header.image_bytes != body.size() - header.log_bytes ||
      header.checksum != checksum(name, body)) {
    return std::nullopt;
  }
  Compilation compilation;
  compilation.log = body.substr(0, header.log_bytes);
  compilation.image = body.substr(header.log_bytes);
  return compilation;
}

std::optional<Compilation> read_cached_of_any_compiler(const fs::path& directory,
                                                       const std::string& prefix) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    if (auto compilation = read_cached(directory, name)) return compilation;
  }
  return std::nullopt;
}

bool write_cached(const fs::path& directory, const std::string& name,
                  const Compilation& compilation, std::string& reason) {
  static std::atomic<int> count = 0;
  if (directory.empty()) {
    reason = "none of FLASH_ATTN_PLUS_CACHE_DIR, XDG_CACHE_HOME and HOME is set";
    return false;
  }
  std::error_code error;
  fs::create_directories(directory, error);
  const fs::path temporary =
      directory / ("." + name + "." + std::to_string(::getpid()) + "." + std::to_string(count++));
  File file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!file) {
    reason = std::strerror(errno);
    return false;
  }
  const std::string body = compilation.log + compilation.image;
  Header header;
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.log_bytes = compilation.log.size();
  header.image_bytes = compilation.image.size();
  header.checksum = checksum(name, body);
  // Closing and renaming report what writing has not, such as a full disk.
  if (file.write(reinterpret_cast<const char*>(&header), sizeof header) &&
      file.write(body.data(), body.size()) && file.close() &&
      ::rename(temporary.c_str(), (directory / name).c_str()) == 0) {
    return true;
  }
  reason = std::strerror(errno);
  ::unlink(temporary.c_str());
  return false;
}

}  // namespace flash_attn_plus::cuda
