# Packages: `cpack` in the build folder writes a .tar.gz, a tree to unpack anywhere, and where Debian's tools are .deb files. MPI and NCCL
# are packages of their own, so that only machines with ranks need them.
set(CPACK_PACKAGE_NAME mesa)
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGE_CONTACT "Mesa maintainers <maintainers@users.noreply.r-seed-5e832132.example>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "training of vision transformers with compressed activations")
set(CPACK_PACKAGE_DESCRIPTION "Mesa trains vision transformers while keeping a compressed copy of each
activation for the backward pass: in 8, 4 or 2 bits, rebuilt, or exact, as
a policy in the run's config says. The forward pass is exact.

This package holds the programs mesa-train, mesa-eval, mesa-bench and
mesa-report, the library with its headers, configs and documents.")
if(cuda_objects)
  string(APPEND CPACK_PACKAGE_DESCRIPTION "

It was built for NVIDIA GPUs with CUDA ${CUDAToolkit_VERSION_MAJOR}, where it needs its
cuBLAS, and uses cuDNN if it is there. No package here brings them.")
endif()
set(CPACK_PACKAGE_FILE_NAME mesa-${PROJECT_VERSION}-linux-${CMAKE_SYSTEM_PROCESSOR})
set(CPACK_PACKAGE_CHECKSUM SHA256)
set(CPACK_STRIP_FILES ON)
set(CPACK_VERBATIM_VARIABLES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_COMPONENTS_ALL mesa)
foreach(plugin mpi nccl)
  if(TARGET mesa_${plugin})
    list(APPEND CPACK_COMPONENTS_ALL ${plugin})
  endif()
endforeach()
set(CPACK_COMPONENTS_GROUPING IGNORE)  # a .deb for each component, and one .tar.gz of all

set(CPACK_GENERATOR TGZ)
find_program(DPKG_SHLIBDEPS dpkg-shlibdeps)
find_program(FILE_PROGRAM file)
if(DPKG_SHLIBDEPS AND FILE_PROGRAM)  # cpack asks them which libraries of which packages the programs need
  list(APPEND CPACK_GENERATOR DEB)
endif()
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_PRE_BUILD_SCRIPTS ${CMAKE_CURRENT_LIST_DIR}/debian.cmake)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)
if(TARGET mesa_nccl)  # NCCL may be of no package, in a folder that the linker does not know: it is found there, and is no dependency
  get_filename_component(nccl_folder ${NCCL_LIBRARY} DIRECTORY)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${nccl_folder})
endif()
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_MESA_PACKAGE_NAME mesa)
set(CPACK_DEBIAN_MESA_PACKAGE_SUGGESTS "mesa-mpi, g++, cmake, python3")  # python3 for share/mesa/tools
set(CPACK_COMPONENT_MESA_DESCRIPTION "${CPACK_PACKAGE_DESCRIPTION}")
foreach(plugin mpi nccl)
  string(TOUPPER ${plugin} upper)
  set(CPACK_DEBIAN_${upper}_PACKAGE_NAME mesa-${plugin})
  set(CPACK_DEBIAN_${upper}_PACKAGE_DEPENDS "mesa (= ${PROJECT_VERSION}-${CPACK_DEBIAN_PACKAGE_RELEASE})")
endforeach()
set(CPACK_DEBIAN_MPI_PACKAGE_RECOMMENDS openmpi-bin)
set(CPACK_COMPONENT_MPI_DESCRIPTION "The plugin of Mesa through which several processes and machines train one
model: mpirun mesa-train ...")
set(CPACK_COMPONENT_NCCL_DESCRIPTION "The plugin of Mesa through which several GPUs train one model.
NCCL itself is yours to install.")

# The system's table of libraries is renewed when they come and go; Debian also wants to know what a package changed.
set(debian_folder ${PROJECT_BINARY_DIR}/debian)
file(WRITE ${debian_folder}/triggers "activate-noawait ldconfig\n")
file(WRITE ${debian_folder}/changelog "mesa (${PROJECT_VERSION}-${CPACK_DEBIAN_PACKAGE_RELEASE}) unstable; urgency=medium

  * Mesa ${PROJECT_VERSION}, commit ${mesa_commit}.

 -- ${CPACK_PACKAGE_CONTACT}  ${mesa_time}
")
set(CPACK_DEBIAN_MESA_PACKAGE_CONTROL_EXTRA ${debian_folder}/triggers)
set(CPACK_MESA_CHANGELOG ${debian_folder}/changelog)
include(CPack)
