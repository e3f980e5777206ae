/* `real`, and `vec`, a vector of LANES of them, on one of four instruction sets.

   `real` is float, or double where DOUBLE is defined: for golden values. The instruction set is what the
   compiler's flags allow: AVX-512, AVX2 with FMA, NEON; or, with PLAIN_C or without any of them, plain C.
   vec has the operators + - * / of C (GCC and clang give them to vector types). Beside these:

     splat(a)                    a in every lane
     load(p), store(p, v)        LANES numbers at any address
     load_part(p, n)             the first n numbers, 1 <= n <= LANES, and 0 in the lanes after them
     store_part(p, v, n)         the first n lanes
     keep(v, n)                  v with 0 in the lanes after the first n, 1 <= n <= LANES
     fma(a, b, c)                a * b + c, rounded once (in plain C twice)
     if_less(a, b, x, y)         a < b ? x : y in each lane, y where a or b is NaN
     if_nan(a, x, y)             x where a is NaN, else y
     absolute(a)
     square_root(a)
     sum(v)                      of all lanes, in one order

   The compiler must not contract a * b + c by itself (-ffp-contract=off): an expression then gives the same
   bits in every function that it is inlined into, so the backward pass finds the signs of the forward pass. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#if defined(DOUBLE)
typedef double real;
typedef int64_t bits;
#define NAME(f) f##_pd
#else
typedef float real;
typedef int32_t bits;
#define NAME(f) f##_ps
#endif

#if !defined(PLAIN_C) && defined(__AVX512F__)

#include <immintrin.h>
#define REGISTERS 32
#if defined(DOUBLE)
typedef __m512d vec;
typedef __mmask8 lane_mask;
#else
typedef __m512 vec;
typedef __mmask16 lane_mask;
#endif
enum { LANES = sizeof(vec) / sizeof(real) };

INLINE vec splat(real a) { return NAME(_mm512_set1)(a); }
INLINE vec load(const real *p) { return NAME(_mm512_loadu)(p); }
INLINE void store(real *p, vec v) { NAME(_mm512_storeu)(p, v); }
INLINE lane_mask first_lanes(int64_t n) { return (lane_mask)((1u << n) - 1); }
INLINE vec load_part(const real *p, int64_t n) { return NAME(_mm512_maskz_loadu)(first_lanes(n), p); }
INLINE void store_part(real *p, vec v, int64_t n) { NAME(_mm512_mask_storeu)(p, first_lanes(n), v); }
INLINE vec keep(vec v, int64_t n) { return NAME(_mm512_maskz_mov)(first_lanes(n), v); }
INLINE vec fma_(vec a, vec b, vec c) { return NAME(_mm512_fmadd)(a, b, c); }
#if defined(DOUBLE)
#define COMPARE(a, b, how) _mm512_cmp_pd_mask(a, b, how)
#else
#define COMPARE(a, b, how) _mm512_cmp_ps_mask(a, b, how)
#endif
INLINE vec if_less(vec a, vec b, vec x, vec y)
{
    return NAME(_mm512_mask_blend)(COMPARE(a, b, _CMP_LT_OQ), y, x);
}
INLINE vec if_nan(vec a, vec x, vec y) { return NAME(_mm512_mask_blend)(COMPARE(a, a, _CMP_UNORD_Q), y, x); }
INLINE vec absolute(vec a) { return NAME(_mm512_abs)(a); }
INLINE vec square_root(vec a) { return NAME(_mm512_sqrt)(a); }

#elif !defined(PLAIN_C) && defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#define REGISTERS 16
#if defined(DOUBLE)
typedef __m256d vec;
#define CMP _mm256_cmp_pd
#else
typedef __m256 vec;
#define CMP _mm256_cmp_ps
#endif
enum { LANES = sizeof(vec) / sizeof(real) };

static const bits lanes_in[2 * LANES] = {
#if defined(DOUBLE)
    -1, -1, -1, -1
#else
    -1, -1, -1, -1, -1, -1, -1, -1
#endif
};
INLINE vec splat(real a) { return NAME(_mm256_set1)(a); }
INLINE vec load(const real *p) { return NAME(_mm256_loadu)(p); }
INLINE void store(real *p, vec v) { NAME(_mm256_storeu)(p, v); }
INLINE __m256i first_lanes(int64_t n) { return _mm256_loadu_si256((const __m256i *)(lanes_in + LANES - n)); }
INLINE vec load_part(const real *p, int64_t n) { return NAME(_mm256_maskload)(p, first_lanes(n)); }
INLINE void store_part(real *p, vec v, int64_t n) { NAME(_mm256_maskstore)(p, first_lanes(n), v); }
INLINE vec keep(vec v, int64_t n)
{
    return NAME(_mm256_and)(v, load((const real *)(lanes_in + LANES - n)));
}
INLINE vec fma_(vec a, vec b, vec c) { return NAME(_mm256_fmadd)(a, b, c); }
INLINE vec if_less(vec a, vec b, vec x, vec y) { return NAME(_mm256_blendv)(y, x, CMP(a, b, _CMP_LT_OQ)); }
INLINE vec if_nan(vec a, vec x, vec y) { return NAME(_mm256_blendv)(y, x, CMP(a, a, _CMP_UNORD_Q)); }
INLINE vec absolute(vec a) { return NAME(_mm256_andnot)(splat((real)-0.0), a); }
INLINE vec square_root(vec a) { return NAME(_mm256_sqrt)(a); }

#else /* 16 bytes: NEON, or what the compiler makes of vector types */

#define REGISTERS 16
typedef real vec __attribute__((vector_size(16)));
typedef bits mask __attribute__((vector_size(16)));
enum { LANES = sizeof(vec) / sizeof(real) };

#if !defined(PLAIN_C) && defined(__aarch64__)
#include <arm_neon.h>
#undef REGISTERS
#define REGISTERS 32
#if defined(DOUBLE)
INLINE vec fma_(vec a, vec b, vec c) { return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
INLINE vec square_root(vec a) { return (vec)vsqrtq_f64((float64x2_t)a); }
#else
INLINE vec fma_(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vec square_root(vec a) { return (vec)vsqrtq_f32((float32x4_t)a); }
#endif
#else
INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
INLINE vec square_root(vec a)
{
    for (int i = 0; i < LANES; i++)
        a[i] = (real)sqrt((double)a[i]);
    return a;
}
#endif
INLINE vec splat(real a) { return a - (vec){0}; }
INLINE vec load(const real *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(real *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec load_part(const real *p, int64_t n)
{
    vec v = {0};
    for (int i = 0; i < LANES; i++)
        if (i < n)
            v[i] = p[i];
    return v;
}
INLINE void store_part(real *p, vec v, int64_t n)
{
    for (int i = 0; i < LANES; i++)
        if (i < n)
            p[i] = v[i];
}
INLINE vec keep(vec v, int64_t n)
{
    for (int i = 0; i < LANES; i++)
        if (i >= n)
            v[i] = 0;
    return v;
}
INLINE vec choose(mask m, vec x, vec y) { return (vec)(((mask)x & m) | ((mask)y & ~m)); }
INLINE vec if_less(vec a, vec b, vec x, vec y) { return choose((mask)(a < b), x, y); }
INLINE vec if_nan(vec a, vec x, vec y) { return choose((mask)(a == a), y, x); }
INLINE vec absolute(vec a) { return (vec)((mask)a & ~(mask)splat((real)-0.0)); }

#endif

#define fma(a, b, c) fma_(a, b, c)

INLINE real sum(vec v)
{
    real lane[LANES];
    store(lane, v);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
