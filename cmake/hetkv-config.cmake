# `find_package(hetkv)` gives the target hetkv::hetkv. These files lie in the Python package's lib/cmake/hetkv.
get_filename_component(_hetkv_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET hetkv::hetkv)
  add_library(hetkv::hetkv SHARED IMPORTED)
  set_target_properties(hetkv::hetkv PROPERTIES
    IMPORTED_LOCATION "${_hetkv_root}/lib/libhetkv.so.0"
    INTERFACE_INCLUDE_DIRECTORIES "${_hetkv_root}/include")
endif()
unset(_hetkv_root)
