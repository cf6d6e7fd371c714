# The C library, libhetkv: include/hetkv.h over the engine, with a handshake of its own. Built where its two libraries
# are: libsodium (keys) and msgpack-cxx (messages; headers of the system or of the Python package `msgpack-cxx`).
set(HETKV_C "AUTO" CACHE STRING "Build the C library: ON, OFF, or AUTO (where libsodium and msgpack-cxx are)")
if(HETKV_C STREQUAL "OFF")
  return()
endif()

execute_process(COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('msgpack_cxx').origin).parent / 'include')"
                OUTPUT_VARIABLE msgpack_hint OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_path(HETKV_MSGPACK_INCLUDE msgpack.hpp HINTS "${msgpack_hint}")
if(NOT sodium_FOUND OR NOT HETKV_MSGPACK_INCLUDE)
  if(HETKV_C STREQUAL "ON")
    message(FATAL_ERROR "HETKV_C is ON, but libsodium (libsodium-dev) or msgpack-cxx is missing")
  endif()
  message(STATUS "No C library: libsodium (libsodium-dev) or msgpack-cxx is missing")
  return()
endif()

file(GLOB capi_sources CONFIGURE_DEPENDS csrc/capi/*.cpp csrc/control/*.cpp)
file(STRINGS hetkv/_version.py version REGEX "__version__")
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" version "${version}")
add_library(hetkv SHARED ${capi_sources})
target_include_directories(hetkv SYSTEM PRIVATE ${HETKV_MSGPACK_INCLUDE})
target_include_directories(hetkv PUBLIC $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
target_compile_definitions(hetkv PRIVATE HETKV_VERSION="${version}")
target_link_libraries(hetkv PRIVATE hetkv_core PkgConfig::sodium)
target_link_options(hetkv PRIVATE -Wl,--no-undefined
                    -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/hetkv.map)
set_property(TARGET hetkv PROPERTY LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/hetkv.map)
# GCC 12 takes moved-from vectors of a returned optional for uninitialised ones.
target_compile_options(hetkv PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
                                     $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
                                     $<$<BOOL:${HETKV_WERROR}>:-Werror>)
set_target_properties(hetkv PROPERTIES SOVERSION 0)

# As files of the Python package, so that the wheel brings them: CMAKE_PREFIX_PATH is the package's folder.
install(TARGETS hetkv LIBRARY DESTINATION hetkv/lib NAMELINK_SKIP)
install(FILES include/hetkv.h DESTINATION hetkv/include)
include(CMakePackageConfigHelpers)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/hetkv-config-version.cmake VERSION ${version}
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/hetkv-config-version.cmake cmake/hetkv-config.cmake
        DESTINATION hetkv/lib/cmake/hetkv)
