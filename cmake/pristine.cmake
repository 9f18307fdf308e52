# One function per kind of target. A folder's files are its list: sources are found by name, so that adding an op is adding
# its files (docs/adding_an_op.md).
#   <folder>/include/pristine/<folder>/**/*.h the public interface
#   <folder>/**/*.cc                         always built, but for cuda/ folders
#   <folder>/cuda/*.cc, <folder>/**/*.cu     built with PRISTINE_ENABLE_CUDA

# Private to us, never exported: warnings are errors.
add_library(pristine_flags INTERFACE)
target_compile_options(pristine_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Werror>"
  # -Xptxas -v is what `./run cuda` reads registers and spills from.
  "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-lineinfo;-Xptxas=-v;-Xcompiler=-Wall,-Wextra>")
if(PRISTINE_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${PRISTINE_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>)
  add_link_options(-fsanitize=${PRISTINE_SANITIZE})
endif()

if(PRISTINE_FUZZ)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=fuzzer-no-link>)
endif()

# pristine_library(name DEPS ... PRIVATE_DEPS ...): the static library of the current folder, pristine::name.
function(pristine_library name)
  cmake_parse_arguments(A "" "" "DEPS;PRIVATE_DEPS" ${ARGN})
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS include/pristine/${name}/*.h)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS *.cc)
  list(FILTER sources EXCLUDE REGEX "/cuda/")
  add_library(pristine_${name} STATIC ${sources})
  add_library(pristine::${name} ALIAS pristine_${name})
  set_target_properties(pristine_${name} PROPERTIES EXPORT_NAME ${name} VERIFY_INTERFACE_HEADER_SETS ON)
  target_sources(pristine_${name} PUBLIC FILE_SET HEADERS BASE_DIRS include FILES ${headers})
  target_include_directories(pristine_${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_features(pristine_${name} PUBLIC cxx_std_20)
  target_link_libraries(pristine_${name} PUBLIC ${A_DEPS} PRIVATE ${A_PRIVATE_DEPS} $<BUILD_INTERFACE:pristine_flags>)
  if(PRISTINE_ENABLE_CUDA)
    file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS *.cu cuda/*.cc)
    target_sources(pristine_${name} PRIVATE ${cuda_sources})
    target_compile_definitions(pristine_${name} PRIVATE PRISTINE_HAS_CUDA=1)
    target_link_libraries(pristine_${name} PRIVATE CUDA::cudart_static)
  endif()
endfunction()

# pristine_program(name SRCS ... CUDA_SRCS ... DEPS ...): an executable of ours.
function(pristine_program name)
  cmake_parse_arguments(A "" "" "SRCS;CUDA_SRCS;DEPS" ${ARGN})
  add_executable(${name} ${A_SRCS})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE pristine::attention pristine::buffers pristine::graph_runtime
    ${A_DEPS} pristine_flags)
  if(PRISTINE_ENABLE_CUDA)
    target_sources(${name} PRIVATE ${A_CUDA_SRCS})
    target_compile_definitions(${name} PRIVATE PRISTINE_HAS_CUDA=1)
    target_link_libraries(${name} PRIVATE CUDA::cudart_static)
  endif()
endfunction()

# pristine_test(name SRCS ... CUDA_SRCS ... DEPS ...): one ctest entry per GoogleTest case, found when ctest runs, so that
# a build machine never executes the binary.
function(pristine_test name)
  pristine_program(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE GTest::gtest GTest::gtest_main)
  # Names as GoogleTest has them, RolesTest/HostEager.Case: not the bytes of parameters.
  gtest_discover_tests(${name} NO_PRETTY_TYPES NO_PRETTY_VALUES DISCOVERY_MODE PRE_TEST
                       PROPERTIES TIMEOUT 600 LABELS ${name})
endfunction()
