// The keywords of CUDA C++ for a host compiler. NVIDIA's cuda_fp16.h and cuda_bf16.h ask for a header of this name.
#pragma once
#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __launch_bounds__(...)
#define CUDARTAPI
#define CUDARTAPI_CDECL
