# Debian's Abseil package points its CMake targets at shared libraries and ships static ones beside them. A binary that is
# to run on another machine takes the static ones.
get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
foreach(target ${targets})
  get_target_property(location ${target} IMPORTED_LOCATION_NONE)
  if(target MATCHES "^absl::" AND location MATCHES "\\.so")
    string(REGEX REPLACE "\\.so.*$" ".a" archive ${location})
    if(NOT EXISTS ${archive})
      message(FATAL_ERROR "PRISTINE_STATIC: ${archive} is missing; ${target} exists only as ${location}")
    endif()
    set_target_properties(${target} PROPERTIES IMPORTED_LOCATION_NONE ${archive})
  endif()
endforeach()
