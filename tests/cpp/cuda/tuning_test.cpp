#include "cuda/plan/tuning.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string>

#include "attention/error.h"

namespace flash_attn_plus::cuda {
namespace {

constexpr const char* kName = "FLASH_ATTN_PLUS_TEST_TILES";

// What is read when the variable has this text.
std::optional<std::array<int, 3>> read(const char* text) {
  setenv(kName, text, 1);
  const TuningVariable variable(kName);
  std::array<int, 3> numbers = {};
  const bool given = variable.read(numbers);
  unsetenv(kName);
  return given ? std::optional(numbers) : std::nullopt;
}

TEST(TuningVariable, GivesItsNumbers) {
  EXPECT_EQ(read("64,128,0"), (std::array<int, 3>{64, 128, 0}));
  EXPECT_EQ(read("-1,2,3"), (std::array<int, 3>{-1, 2, 3}));
}

TEST(TuningVariable, MayBeAbsentOrEmpty) {
  EXPECT_EQ(read(""), std::nullopt);
  unsetenv(kName);
  int number = 7;
  EXPECT_FALSE(TuningVariable(kName).read({&number, 1}));
  EXPECT_EQ(number, 7);
}

TEST(TuningVariable, IsReadAtEveryCall) {
  setenv(kName, "", 1);
  const TuningVariable variable(kName);
  setenv(kName, "5", 1);
  int number = 0;
  EXPECT_TRUE(variable.read({&number, 1}));
  EXPECT_EQ(number, 5);
  unsetenv(kName);
  EXPECT_FALSE(variable.read({&number, 1}));
}

TEST(TuningVariable, RefusesAnythingElse) {
  for (const char* text : {"64", "64,128", "64,128,", "64,128,1,1", "64,128,1 ", "64, 128,1",
                           "64,128,x", "chosen", ",,", "64,128,99999999999"}) {
    try {
      read(text);
      ADD_FAILURE() << text << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string(kName) + " must be 3 numbers with commas between them, but is \"" +
                    text + "\"");
    }
    unsetenv(kName);
  }
}

}  // namespace
}  // namespace flash_attn_plus::cuda
