# Writes a C++ file that holds the text of other files:
#   cmake -DOUTPUT=embedded.cpp -DROOT=src "-DFILES=src/a.h;src/b.cuh" -P embed.cmake
# A text is named by its path below ROOT; what lies in cuda/kernels/std, by its name alone.
set(entries "")
foreach(file IN LISTS FILES)
  file(READ "${file}" text)
  file(RELATIVE_PATH name "${ROOT}" "${file}")
  string(REPLACE "cuda/kernels/std/" "" name "${name}")
  string(APPEND entries "    {\"${name}\", R\"embedded(${text})embedded\"},\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"cuda/runtime/embedded.h\"

namespace flash_attn_plus::cuda {

const std::vector<EmbeddedText>& embedded_texts() {
  static const std::vector<EmbeddedText> texts = {
${entries}  };
  return texts;
}

}  // namespace flash_attn_plus::cuda
")
