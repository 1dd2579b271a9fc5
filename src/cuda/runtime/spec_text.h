// A Spec as text: the line of source above its kernel, the key of the disk cache, the line of the
// log and the id of a test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace flash_attn_plus::cuda {

namespace spec_text {

// What the compiler writes for its own template argument, without namespaces of this project:
// "Masking::kCausal" for a named value, "(Masking)7" for one without a name, "ForwardSpec" for a
// type.
constexpr std::string_view argument_of(std::string_view function) {
  const size_t begin = function.find("Argument = ") + 11;
  std::string_view text = function.substr(begin, function.find_first_of(";]", begin) - begin);
  for (const std::string_view scope : {"flash_attn_plus::", "cuda::"}) {
    if (text.substr(0, scope.size()) == scope) text.remove_prefix(scope.size());
  }
  return text;
}
template <typename Argument>
constexpr std::string_view name_of_type() {
  return argument_of(__PRETTY_FUNCTION__);
}
template <auto Argument>
constexpr std::string_view name_of_value() {
  return argument_of(__PRETTY_FUNCTION__);
}

constexpr size_t kMaxEnumerators = 16;

template <typename E, size_t... I>
constexpr std::array<std::string_view, sizeof...(I)> names_of(std::index_sequence<I...>) {
  return {name_of_value<static_cast<E>(I)>()...};
}

template <typename E>
std::string name_of(E value) {
  static constexpr auto kNames = names_of<E>(std::make_index_sequence<kMaxEnumerators>{});
  return std::string(kNames.at(static_cast<size_t>(value)));
}

inline std::string text_of(bool value) { return value ? "true" : "false"; }
inline std::string text_of(int value) { return std::to_string(value); }
template <typename E>
  requires std::is_enum_v<E>
std::string text_of(E value) {
  return name_of(value);
}

}  // namespace spec_text

// "ForwardSpec{.head_dim = 128, .masking = Masking::kCausal}"
template <typename Spec>
std::string to_text(const Spec& spec) {
  std::string text = std::string(spec_text::name_of_type<Spec>()) + "{";
  const char* separator = ".";
  spec.visit([&](const char* name, auto value) {
    text += separator;
    text += name;
    text += " = " + spec_text::text_of(value);
    separator = ", .";
  });
  return text + "}";
}

template <typename Spec>
struct SpecHash {
  size_t operator()(const Spec& spec) const {
    uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a, a field at a time
    spec.visit([&](const char*, auto value) {
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001B3u;
    });
    return static_cast<size_t>(hash ^ (hash >> 32));
  }
};

}  // namespace flash_attn_plus::cuda
