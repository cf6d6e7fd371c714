# The GPU backends: shared objects of their own, loaded at run time (csrc/backend/loader.h), built where their compiler is.
set(HETKV_CUDA "AUTO" CACHE STRING "Build the CUDA backend: ON, OFF, or AUTO (where nvcc is)")
set(HETKV_HIP "AUTO" CACHE STRING "Build the HIP backend: ON, OFF, or AUTO (where hipcc is)")
set(HETKV_CUDA_ARCHITECTURES "80-real;90-real;100" CACHE STRING "Architectures of the CUDA backend; the last with PTX")
set(HETKV_HIP_ARCHITECTURES "gfx90a" CACHE STRING "Architectures of the HIP backend: those that hipcc has libraries for")
include(cmake/gpu_sources.cmake)

set(HETKV_CUDA_ALSO "" CACHE STRING
    "More nvcc, of other major versions than the one that is found: their backends are built as well")

if(NOT HETKV_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    include(ExternalProject)
    add_subdirectory(cmake/cuda cuda)
    foreach(nvcc ${HETKV_CUDA_ALSO})
      # A build has one CUDA compiler, so each other one has a build of its own, which installs into this one's tree.
      string(MAKE_C_IDENTIFIER "${nvcc}" name)
      string(REPLACE ";" "|" architectures "${HETKV_CUDA_ARCHITECTURES}")
      ExternalProject_Add(hetkv_${name} SOURCE_DIR ${CMAKE_CURRENT_SOURCE_DIR}/cmake/cuda
                          BINARY_DIR ${CMAKE_CURRENT_BINARY_DIR}/${name} LIST_SEPARATOR | BUILD_ALWAYS ON
                          CMAKE_ARGS -DCMAKE_CUDA_COMPILER=${nvcc} -DCMAKE_BUILD_TYPE=${CMAKE_BUILD_TYPE}
                                     -DHETKV_CUDA_ARCHITECTURES=${architectures} -DHETKV_WERROR=${HETKV_WERROR}
                                     -DCMAKE_INSTALL_PREFIX=${CMAKE_CURRENT_BINARY_DIR}/also)
    endforeach()
    if(HETKV_CUDA_ALSO)
      install(DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/also/hetkv DESTINATION . USE_SOURCE_PERMISSIONS)
    endif()
  elseif(HETKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HETKV_CUDA is ON, but there is no nvcc")
  endif()
endif()

if(NOT HETKV_HIP STREQUAL "OFF")
  find_program(HETKV_HIPCC hipcc HINTS /opt/rocm/bin)
  if(HETKV_HIPCC)
    set(hip_flags -std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -I${CMAKE_SOURCE_DIR}/csrc
                  $<$<BOOL:${HETKV_WERROR}>:-Werror>)
    foreach(arch ${HETKV_HIP_ARCHITECTURES})
      list(APPEND hip_link --offload-arch=${arch})
    endforeach()
    list(APPEND hip_flags ${hip_link})
    set(hip_objects)
    foreach(source ${gpu_sources})
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
