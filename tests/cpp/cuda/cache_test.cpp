// The cache of compiled kernels on disk.
#include "cuda/runtime/cache.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/fixture.h"
#include "cuda/runtime/image.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {
namespace {

namespace fs = std::filesystem;

const std::string kName = "kernel-sm_90-0123-13.0.kernel";

Compilation compilation() {
  return {std::string("\x7f"
                      "ELF\0 code",
                      10),
          "the log", 0};
}

class CacheTest : public RuntimeTest {
 protected:
  void write() {
    std::string reason;
    ASSERT_TRUE(write_cached(directory_, kName, compilation(), reason)) << reason;
  }
  std::string contents() const {
    std::ifstream file(directory_ / kName, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void replace(const std::string& text) const {
    std::ofstream(directory_ / kName, std::ios::binary | std::ios::trunc) << text;
  }
};

TEST_F(CacheTest, WhatWasWrittenIsRead) {
  EXPECT_FALSE(read_cached(directory_, kName));
  write();
  const auto found = read_cached(directory_, kName);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->image, compilation().image);
  EXPECT_EQ(found->log, "the log");
  EXPECT_EQ(num_files(), 1u);
  write();  // again, over it
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(CacheTest, AnyDamageIsAMiss) {
  write();
  const std::string whole = contents();
  for (size_t size = 0; size < whole.size(); ++size) {
    replace(whole.substr(0, size));
    EXPECT_FALSE(read_cached(directory_, kName)) << "truncated to " << size;
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 4);
    replace(damaged);
    EXPECT_FALSE(read_cached(directory_, kName)) << "byte " << i;
  }
  replace(whole + "more");
  EXPECT_FALSE(read_cached(directory_, kName));
  replace(whole);
  EXPECT_TRUE(read_cached(directory_, kName));
  fs::rename(directory_ / kName, directory_ / "other.kernel");
  EXPECT_FALSE(read_cached(directory_, "other.kernel"));
}

TEST_F(CacheTest, WhatCannotBeWrittenLeavesNothing) {
  std::string reason;
  std::ofstream(directory_.string()) << "a file where the directory should be";
  EXPECT_FALSE(write_cached(directory_, kName, compilation(), reason));
  EXPECT_NE(reason, "");
  fs::remove(directory_);
  fs::create_directories(directory_ / kName);  // renaming onto a directory fails
  EXPECT_FALSE(write_cached(directory_, kName, compilation(), reason));
  EXPECT_EQ(num_files(), 0u);
  EXPECT_FALSE(write_cached({}, kName, compilation(), reason));
  EXPECT_FALSE(read_cached({}, kName));
}

TEST_F(CacheTest, AFullDiskLeavesNothing) {
  const pid_t child = fork();  // which may write 64 bytes to a file, and then gets an error
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {64, 64};
    setrlimit(RLIMIT_FSIZE, &limit);
    std::string reason;
    const bool written =
        write_cached(directory_, kName, {std::string(1 << 20, 'x'), "", 0}, reason);
    _exit(!written && !reason.empty() && num_files() == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_F(CacheTest, DirectoriesFollowTheEnvironment) {
  EXPECT_EQ(cache_directory(), directory_);
  setenv("FLASH_ATTN_PLUS_CACHE_DIR", "", 1);
  setenv("XDG_CACHE_HOME", "/caches", 1);
  EXPECT_EQ(cache_directory(), "/caches/flash-attn-plus");
  unsetenv("XDG_CACHE_HOME");
  setenv("HOME", "/home/user", 1);
  EXPECT_EQ(cache_directory(), "/home/user/.cache/flash-attn-plus");
}

TEST_F(CacheTest, NamesDependOnEverythingThatIsCompiled) {
  const RotarySpec spec;
  KernelSource source{to_text(spec), RotarySpec::kKernel, RotarySpec::kEntry};
  Program program = make_program(source);
  const std::string name = cache_prefix(source, program, {90, false});
  EXPECT_EQ(name.rfind(std::string(RotarySpec::kEntry) + "-sm_90-", 0), 0u) << name;
  EXPECT_EQ(cache_prefix(source, make_program(source), {90, false}), name);
  const auto hash = [&](const std::string& prefix) { return prefix.substr(prefix.find("_90-")); };
  EXPECT_NE(hash(cache_prefix(source, program, {90, true})), hash(name));
  Program other = program;
  other.text += " ";
  EXPECT_NE(cache_prefix(source, other, {90, false}), name);
  other = program;
  other.headers.back().text = "";
  EXPECT_NE(cache_prefix(source, other, {90, false}), name);
}

class ImageTest : public CompilingTest {
 protected:
  const KernelSource source_{to_text(RotarySpec{}), RotarySpec::kKernel, RotarySpec::kEntry};
};

TEST_F(ImageTest, IsReadAgainAndCompiledAgainWhenDamaged) {
  const Image first = image_for(source_, 90);
  EXPECT_FALSE(first.from_disk);
  EXPECT_TRUE(first.kept);
  EXPECT_NE(first.compilation.log.find("registers"), std::string::npos) << first.compilation.log;
  const Image second = image_for(source_, 90);
  EXPECT_TRUE(second.from_disk);
  EXPECT_EQ(second.compilation.image, first.compilation.image);
  for (const auto& entry : fs::directory_iterator(directory_)) {
    fs::resize_file(entry, fs::file_size(entry) / 2);
  }
  const Image third = image_for(source_, 90);
  EXPECT_FALSE(third.from_disk);
  EXPECT_EQ(third.compilation.image, first.compilation.image);
  EXPECT_TRUE(image_for(source_, 90).from_disk);
}

TEST_F(ImageTest, NeedsNoDirectory) {
  std::ofstream(directory_.string()) << "a file where the directory should be";
  const Image image = image_for(source_, 90);
  EXPECT_FALSE(image.kept);
  EXPECT_FALSE(image.compilation.image.empty());
}

TEST_F(ImageTest, ErrorsHoldTheCompilersLogAndTheSpec) {
  const KernelSource wrong{"RotarySpec{.no_such_field = 3}", source_.kernel, source_.entry};
  const std::string error = error_of([&] { image_for(wrong, 90); });
  for (const char* part : {"NVRTC", "no_such_field", "sm_90", "error"}) {
    EXPECT_NE(error.find(part), std::string::npos) << part << " in " << error;
  }
  EXPECT_EQ(num_files(), 0u);
}

TEST_F(ImageTest, SixteenProcessesFillOneDirectory) {
  std::vector<pid_t> children;
  for (int i = 0; i < 16; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const bool good = error_of([&] { image_for(source_, 80); }).empty();
      _exit(good ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  EXPECT_EQ(num_files(), 1u);
  EXPECT_TRUE(image_for(source_, 80).from_disk);
}

}  // namespace
}  // namespace flash_attn_plus::cuda
