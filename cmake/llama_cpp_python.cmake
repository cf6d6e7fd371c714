# How `make test-engines` builds llama-cpp-python: CMAKE_PROJECT_INCLUDE of its sdist. libllama and ggml for the CPU alone,
# without what its `all` builds besides, and with few optimisations: compiling takes longer than the tests compute.
foreach(part IN ITEMS LLAVA_BUILD LLAMA_BUILD_COMMON LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TOOLS LLAMA_BUILD_SERVER
                      LLAMA_BUILD_APP GGML_LLAMAFILE GGML_NATIVE)
  set(${part} OFF)
endforeach()
set(CMAKE_C_FLAGS_RELEASE "-O1 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")
