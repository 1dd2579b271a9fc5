// Functions that kernels of several instruction sets share must not be left to the linker, which
// would keep one copy for all of them: they are inlined everywhere.
#pragma once

#define FAP_SHARED [[gnu::always_inline]] inline
