// Declarations of CUDA C++ for a kernel that g++ compiles for the host: see cuda_on_host.py.
// It includes no header, because a kernel that NVRTC compiles has none either.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))
#define __syncthreads() cuda_barrier(__LINE__)

struct CudaIndex {
  unsigned x, y, z;
};
typedef CudaIndex uint3;
typedef CudaIndex dim3;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
extern "C" {
extern CudaIndex threadIdx, blockIdx, blockDim, gridDim;
void cuda_barrier(int line);
}

#if defined(__x86_64__)
#define CUDA_ROUNDED(value) asm("" : "+x"(value))
#elif defined(__aarch64__)
#define CUDA_ROUNDED(value) asm("" : "+w"(value))
#else
#error "add the constraint of a floating-point register"
#endif

// One operation each, never contracted with another one: the asm statement hides where a value comes from.
static inline float __fadd_rn(float a, float b) { float r = a + b; CUDA_ROUNDED(r); return r; }
static inline float __fsub_rn(float a, float b) { float r = a - b; CUDA_ROUNDED(r); return r; }
static inline float __fmul_rn(float a, float b) { float r = a * b; CUDA_ROUNDED(r); return r; }
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
static inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static inline float fabsf(float a) { return __builtin_fabsf(a); }
static inline float rintf(float a) { return __builtin_rintf(a); }
static inline float floorf(float a) { return __builtin_floorf(a); }
static inline float ceilf(float a) { return __builtin_ceilf(a); }
#define CUDA_EXTREMES(T) \
  static inline T min(T a, T b) { return b < a ? b : a; } \
  static inline T max(T a, T b) { return a < b ? b : a; }
CUDA_EXTREMES(int)
CUDA_EXTREMES(unsigned)
CUDA_EXTREMES(long long)
CUDA_EXTREMES(unsigned long long)
template <class T> static inline T __ldg(const T* p) { return *p; }

// What follows describes and calls a kernel.
struct CudaParameter {
  char kind;  // b, i, u, f: as in NumPy; v: void; V: a struct
  int bytes;
  int alignment;
  bool pointer;
};
template <class T> struct CudaType { static constexpr CudaParameter value = {'V', sizeof(T), alignof(T), false}; };
template <class T> struct CudaType<const T> : CudaType<T> {};
template <class T> struct CudaType<T*> {
  static constexpr CudaParameter to = CudaType<T>::value;
  static constexpr CudaParameter value = {to.kind, to.bytes, to.alignment, true};
};
#define CUDA_TYPE(T, kind) \
  template <> struct CudaType<T> { static constexpr CudaParameter value = {kind, sizeof(T), alignof(T), false}; };
CUDA_TYPE(bool, 'b')
CUDA_TYPE(char, 'i')
CUDA_TYPE(signed char, 'i')
CUDA_TYPE(short, 'i')
CUDA_TYPE(int, 'i')
CUDA_TYPE(long, 'i')
CUDA_TYPE(long long, 'i')
CUDA_TYPE(unsigned char, 'u')
CUDA_TYPE(unsigned short, 'u')
CUDA_TYPE(unsigned, 'u')
CUDA_TYPE(unsigned long, 'u')
CUDA_TYPE(unsigned long long, 'u')
CUDA_TYPE(float, 'f')
CUDA_TYPE(double, 'f')
template <> struct CudaType<float2> { static constexpr CudaParameter value = {'f', 4, alignof(float2), false}; };
template <> struct CudaType<float4> { static constexpr CudaParameter value = {'f', 4, alignof(float4), false}; };
template <> struct CudaType<void> { static constexpr CudaParameter value = {'v', 1, 1, false}; };

#define CUDA_UNCHECKED __attribute__((no_sanitize("kernel-address", "undefined")))
template <int...> struct CudaNumbers {};
template <class... P, int... N>
CUDA_UNCHECKED static inline void cuda_apply(void (*kernel)(P...), void** arguments, CudaNumbers<N...>) {
  kernel(*static_cast<P*>(arguments[N])...);
}
template <class... P> CUDA_UNCHECKED static inline void cuda_apply(void (*kernel)(P...), void** arguments) {
  cuda_apply(kernel, arguments, CudaNumbers<__integer_pack(sizeof...(P))...>());
}
template <class... P> CUDA_UNCHECKED static inline int cuda_describe(void (*)(P...), CudaParameter* out) {
  const CudaParameter all[] = {CudaType<P>::value..., CudaParameter()};
  for (unsigned n = 0; n < sizeof...(P); ++n) out[n] = all[n];
  return sizeof...(P);
}
#define CUDA_KERNEL(name) \
  extern "C" CUDA_UNCHECKED void cuda_call(void** arguments) { cuda_apply(&name, arguments); } \
  extern "C" CUDA_UNCHECKED int cuda_parameters(CudaParameter* out) { return cuda_describe(&name, out); }
