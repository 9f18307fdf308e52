# `cmake --install` gives libraries, headers and pristineConfig.cmake: find_package(pristine) then links
# pristine::graph_runtime, pristine::buffers and pristine::attention.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS pristine_graph_runtime pristine_buffers pristine_attention EXPORT pristine
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT pristine NAMESPACE pristine:: FILE pristineTargets.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pristine)
configure_package_config_file(cmake/pristineConfig.cmake.in ${PROJECT_BINARY_DIR}/pristineConfig.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pristine)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/pristineConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/pristineConfig.cmake ${PROJECT_BINARY_DIR}/pristineConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pristine)
