# The GPU backends: shared objects of their own, loaded at run time (csrc/backend/loader.h), built where their compiler is.
set(HETKV_CUDA "AUTO" CACHE STRING "Build the CUDA backend: ON, OFF, or AUTO (where nvcc is)")
set(HETKV_HIP "AUTO" CACHE STRING "Build the HIP backend: ON, OFF, or AUTO (where hipcc is)")
set(HETKV_CUDA_ARCHITECTURES "80-real;90-real;100" CACHE STRING "Architectures of the CUDA backend; the last with PTX")
set(HETKV_HIP_ARCHITECTURES "gfx90a" CACHE STRING "Architectures of the HIP backend: those that hipcc has libraries for")
set(gpu_sources csrc/backend/gpu/backend.cu csrc/backend/gpu/status.cu csrc/backend/gpu/devices.cu
                csrc/backend/gpu/allocations.cu csrc/backend/gpu/streams.cu csrc/backend/gpu/remaps.cu
                csrc/backend/gpu/kernel_moves.cu csrc/backend/gpu/kernel_turns.cu
                csrc/backend/gpu/kernel_rows.cu csrc/backend/gpu/kernel_all.cu)

if(NOT HETKV_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${HETKV_CUDA_ARCHITECTURES})
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    enable_language(CUDA)
    add_library(hetkv_cuda MODULE ${gpu_sources} csrc/backend/gpu/plan.cpp)
    target_include_directories(hetkv_cuda PRIVATE csrc)
    target_link_libraries(hetkv_cuda PRIVATE ${CMAKE_DL_LIBS})
    set_target_properties(hetkv_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
    target_compile_options(hetkv_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra $<$<BOOL:${HETKV_WERROR}>:-Werror=all-warnings -Xcompiler=-Werror>>
      $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${HETKV_WERROR}>:-Werror>>)
    install(TARGETS hetkv_cuda LIBRARY DESTINATION hetkv/backends)
  elseif(HETKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HETKV_CUDA is ON, but there is no nvcc")
  endif()
endif()

if(NOT HETKV_HIP STREQUAL "OFF")
  find_program(HETKV_HIPCC hipcc HINTS /opt/rocm/bin)
  if(HETKV_HIPCC)
    set(hip_flags -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -I${CMAKE_SOURCE_DIR}/csrc
                  $<$<BOOL:${HETKV_WERROR}>:-Werror>)
    foreach(arch ${HETKV_HIP_ARCHITECTURES})
      list(APPEND hip_link --offload-arch=${arch})
    endforeach()
    list(APPEND hip_flags ${hip_link})
    set(hip_objects)
    foreach(source ${gpu_sources} csrc/backend/gpu/plan.cpp)
      get_filename_component(name ${source} NAME_WE)
      set(object ${CMAKE_CURRENT_BINARY_DIR}/hip/${name}.o)
      add_custom_command(
        OUTPUT ${object} DEPENDS ${source} DEPFILE ${object}.d VERBATIM COMMAND_EXPAND_LISTS
        COMMAND ${CMAKE_COMMAND} -E env HIP_PLATFORM=amd ${HETKV_HIPCC} ${hip_flags} -MD -MF ${object}.d -MT ${object}
                -x hip -c ${CMAKE_SOURCE_DIR}/${source} -o ${object}
        COMMENT "Building HIP object ${name}.o")
      list(APPEND hip_objects ${object})
    endforeach()
    set(hip_library ${CMAKE_CURRENT_BINARY_DIR}/libhetkv_hip.so)
    add_custom_command(
      OUTPUT ${hip_library} DEPENDS ${hip_objects} VERBATIM COMMAND_EXPAND_LISTS
      COMMAND ${CMAKE_COMMAND} -E env HIP_PLATFORM=amd ${HETKV_HIPCC} -shared ${hip_link} ${hip_objects} -o ${hip_library}
      COMMENT "Linking libhetkv_hip.so")
    add_custom_target(hetkv_hip ALL DEPENDS ${hip_library})
    install(FILES ${hip_library} DESTINATION hetkv/backends)
  elseif(HETKV_HIP STREQUAL "ON")
    message(FATAL_ERROR "HETKV_HIP is ON, but there is no hipcc")
  endif()
endif()
