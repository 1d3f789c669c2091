// The instruction sets the kernels are compiled for, and which this machine has.
#pragma once

#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace quantlab {

enum Isa : int64_t { kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 4, kAmx = 8 };

struct CpuId {
  unsigned a, b, c, d;
};
inline CpuId leaf7(unsigned subleaf) {
  CpuId r;
  __asm__("cpuid"
          : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d)
          : "a"(7), "c"(subleaf));
  return r;
}

// Whether there are matrix units, and the system lets this process use them:
// it keeps their state for a thread only where it was asked to.
inline bool may_use_amx() {
  constexpr unsigned kUnit = 3u << 24;  // tiles, and products of int8 with them
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return (leaf7(0).d & kUnit) == kUnit &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// As bits.
inline int64_t isas() {
  __builtin_cpu_init();
  int64_t found = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found |= kAvx2;
    if (leaf7(1).a >> 4 & 1) found |= kAvxVnni;  // the leaf is 0 without it
  }
  if (__builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found |= kAvx512Vnni;
    if (may_use_amx()) found |= kAmx;
  }
  return found;
}

}  // namespace quantlab
