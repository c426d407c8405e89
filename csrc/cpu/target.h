// DS_FP6_TARGET_BEGIN("avx2,fma") ... DS_FP6_TARGET_END compiles the functions between them for those instructions,
// whatever flags the file is compiled with: torch's extension builder has one set of flags for all sources.
//
// NOTE: everything between them lies in an anonymous namespace. An inline function with external linkage would be
// merged with its copies in other files, and the linker could keep the one that only some CPUs run. For the same
// reason standard headers are included before, and their functions are not called in between.
#pragma once

#define DS_FP6_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DS_FP6_TARGET_BEGIN(features) \
    DS_FP6_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DS_FP6_TARGET_END DS_FP6_PRAGMA(clang attribute pop)
#else
#define DS_FP6_TARGET_BEGIN(features) DS_FP6_PRAGMA(GCC push_options) DS_FP6_PRAGMA(GCC target(features))
#define DS_FP6_TARGET_END DS_FP6_PRAGMA(GCC pop_options)
#endif

#define DS_FP6_INLINE inline __attribute__((always_inline))
