// Specs as text, programs, and what they are compiled for.
#include "cuda/runtime/compile.h"

#include <algorithm>

#include "attention/error.h"
#include "cuda/fixture.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {

struct TextSpec {
  int tile = -3;
  bool on = true;
  Masking masking = Masking::kWindow;
  DType dtype = DType::kFloat16;
  constexpr bool operator==(const TextSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("tile", tile);
    field("on", on);
    field("masking", masking);
    field("dtype", dtype);
  }
};
struct EmptySpec {
  template <typename F>
  constexpr void visit(F&&) const {}
};

namespace {

TEST(SpecTextTest, IsTheSourceOfTheSpec) {
  EXPECT_EQ(to_text(TextSpec{}),
            "TextSpec{.tile = -3, .on = true, .masking = Masking::kWindow, .dtype = "
            "DType::kFloat16}");
  EXPECT_EQ(to_text(EmptySpec{}), "EmptySpec{}");
}

TEST(SpecTextTest, HashesDifferByEveryField) {
  const SpecHash<TextSpec> hash;
  const TextSpec spec;
  EXPECT_EQ(hash(spec), hash(TextSpec{}));
  for (const TextSpec& other :
       {TextSpec{.tile = 1}, TextSpec{.on = false}, TextSpec{.masking = Masking::kNone},
        TextSpec{.dtype = DType::kBFloat16}}) {
    EXPECT_NE(hash(spec), hash(other)) << to_text(other);
  }
}

TEST(ProgramTest, HasTheSpecAboveTheKernelAndEveryHeaderOnce) {
  const Program program =
      make_program({to_text(RotarySpec{}), RotarySpec::kKernel, RotarySpec::kEntry});
  const size_t spec = program.text.find("constexpr RotarySpec spec{.dtype");
  EXPECT_NE(spec, std::string::npos) << program.text;
  EXPECT_GT(program.text.find(RotarySpec::kKernel), spec);
  std::vector<std::string_view> names;
  for (const EmbeddedText& header : program.headers) names.push_back(header.name);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
  for (const char* name : {"cstdint", "attention/params.h", "cuda/spec.h"}) {
    EXPECT_TRUE(std::binary_search(names.begin(), names.end(), name)) << name;
  }
}

TEST(TargetTest, IsTheArchitectureOrWhatRunsOnIt) {
  const std::vector<int> supported = {75, 80, 86, 90, 100};
  EXPECT_EQ(target_for(90, supported).option(), "sm_90");
  EXPECT_EQ(target_for(89, supported).option(), "sm_86");  // the same major version
  EXPECT_EQ(target_for(103, supported).option(), "sm_100");
  EXPECT_EQ(target_for(120, supported).option(), "compute_100");  // the driver compiles the rest
  EXPECT_NE(error_of([] { target_for(80, {75}); }), "");
}

TEST(TypicalDeviceTest, ExistsForEveryKnownArchitecture) {
  for (const int arch : known_architectures()) {
    const DeviceProperties device = typical_device(arch);
    EXPECT_EQ(device.arch, arch);
    EXPECT_EQ(device.max_shared_per_block, device.shared_per_multiprocessor - 1024);
  }
  EXPECT_EQ(typical_device(90).max_shared_per_block, 227 * 1024);
  EXPECT_EQ(typical_device(86).max_shared_per_block, 99 * 1024);
  EXPECT_NE(error_of([] { typical_device(75); }).find("must be one of sm_80 sm_86"),
            std::string::npos);
}

TEST(NvrtcTest, IsLookedForWhereItMayBe) {
  setenv("FLASH_ATTN_PLUS_NVRTC", "/chosen/libnvrtc.so.13", 1);
  setenv("CUDA_HOME", "/toolkit", 1);
  set_nvrtc_directories("/first:/second");
  const std::vector<std::string> candidates = nvrtc_candidates(12);
  const auto position = [&](const char* path) {
    return std::find(candidates.begin(), candidates.end(), path) - candidates.begin();
  };
  ptrdiff_t last = -1;
  for (const char* path : {"/chosen/libnvrtc.so.13", "/first/libnvrtc.so", "/second/libnvrtc.so",
                           "/toolkit/lib64/libnvrtc.so", "libnvrtc.so.12"}) {
    EXPECT_GT(position(path), last) << path;
    last = position(path);
  }
  EXPECT_EQ(position("libnvrtc.so.12"), static_cast<ptrdiff_t>(candidates.size()) - 1);
  EXPECT_EQ(nvrtc_candidates(0).end()[-2], "libnvrtc.so.13");
  set_nvrtc_directories("");
  unsetenv("FLASH_ATTN_PLUS_NVRTC");
  unsetenv("CUDA_HOME");
}

}  // namespace
}  // namespace flash_attn_plus::cuda
