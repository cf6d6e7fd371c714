# One translation unit per instruction set, chosen at run time (csrc/remap/isa.cpp). Nothing else gets wide flags.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2_options -mavx2 -mf16c -mfma -mprfchw -ffp-contract=off)
  set(avx512_options ${avx2_options} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 header trips these two (GCC bug 105593).
    list(APPEND avx512_options -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  set_source_files_properties(csrc/remap/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2_options}")
  set_source_files_properties(csrc/remap/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512_options}")
endif()
