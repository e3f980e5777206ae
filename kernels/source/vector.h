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
     even_lanes(a, b)            a[0], a[2], ..., b[0], b[2], ...; odd_lanes(a, b) the others
     first_pairs(e, o)           e[0], o[0], e[1], o[1], ...; last_pairs(e, o) goes on where it ends

   The compiler must not contract a * b + c by itself (-ffp-contract=off): an expression then gives the same
   bits in every function that it is inlined into, so the backward pass finds the signs of the forward pass. */

#include <float.h>
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
#define LOWEST -DBL_MAX
typedef int64_t bits;
#define NAME(f) f##_pd
#else
typedef float real;
#define LOWEST -FLT_MAX
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
#if defined(DOUBLE)
#define PICK(a, b, from, step)                                                                               \
    _mm512_permutex2var_pd(                                                                                  \
        a, _mm512_setr_epi64(PICKED(0, from, step), PICKED(1, from, step), PICKED(2, from, step),            \
                             PICKED(3, from, step), PICKED(4, from, step), PICKED(5, from, step),            \
                             PICKED(6, from, step), PICKED(7, from, step)), b)
#else
#define PICK(a, b, from, step)                                                                               \
    _mm512_permutex2var_ps(                                                                                  \
        a, _mm512_setr_epi32(PICKED(0, from, step), PICKED(1, from, step), PICKED(2, from, step),            \
                             PICKED(3, from, step), PICKED(4, from, step), PICKED(5, from, step),            \
                             PICKED(6, from, step), PICKED(7, from, step), PICKED(8, from, step),            \
                             PICKED(9, from, step), PICKED(10, from, step), PICKED(11, from, step),          \
                             PICKED(12, from, step), PICKED(13, from, step), PICKED(14, from, step),         \
                             PICKED(15, from, step)), b)
#endif
/* lane i of the result: every other lane of a and b (step 2), or a pair's half (step 0) */
#define PICKED(i, from, step) ((step) ? (from) + 2 * (i) : (from) + (i) / 2 + (i) % 2 * LANES)
INLINE vec even_lanes(vec a, vec b) { return PICK(a, b, 0, 2); }
INLINE vec odd_lanes(vec a, vec b) { return PICK(a, b, 1, 2); }
INLINE vec first_pairs(vec e, vec o) { return PICK(e, o, 0, 0); }
INLINE vec last_pairs(vec e, vec o) { return PICK(e, o, LANES / 2, 0); }

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
#define QUARTERS(v) (vec) _mm256_permute4x64_pd((__m256d)(v), 0xd8) /* the middle two quarters change places */
#if defined(DOUBLE)
INLINE vec even_lanes(vec a, vec b) { return QUARTERS(_mm256_unpacklo_pd(a, b)); }
INLINE vec odd_lanes(vec a, vec b) { return QUARTERS(_mm256_unpackhi_pd(a, b)); }
#else
INLINE vec even_lanes(vec a, vec b) { return QUARTERS(_mm256_shuffle_ps(a, b, 0x88)); }
INLINE vec odd_lanes(vec a, vec b) { return QUARTERS(_mm256_shuffle_ps(a, b, 0xdd)); }
#endif
INLINE vec first_pairs(vec e, vec o)
{
    return NAME(_mm256_permute2f128)(NAME(_mm256_unpacklo)(e, o), NAME(_mm256_unpackhi)(e, o), 0x20);
}
INLINE vec last_pairs(vec e, vec o)
{
    return NAME(_mm256_permute2f128)(NAME(_mm256_unpacklo)(e, o), NAME(_mm256_unpackhi)(e, o), 0x31);
}

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
INLINE vec picked(vec a, vec b, int from, int step, int across)
{
    real both[2 * LANES], lane[LANES];
    store(both, a);
    store(both + LANES, b);
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = both[across ? from + i / 2 + i % 2 * LANES : from + i * step];
    return load(lane);
}
INLINE vec even_lanes(vec a, vec b) { return picked(a, b, 0, 2, 0); }
INLINE vec odd_lanes(vec a, vec b) { return picked(a, b, 1, 2, 0); }
INLINE vec first_pairs(vec e, vec o) { return picked(e, o, 0, 0, 1); }
INLINE vec last_pairs(vec e, vec o) { return picked(e, o, LANES / 2, 0, 1); }

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

/* The first n numbers, n of any sign: whole vectors where n allows it, and 0 where it is not above 0. */
INLINE vec load_n(const real *p, int64_t n) { return n >= LANES ? load(p) : n > 0 ? load_part(p, n) : splat(0); }
INLINE void store_n(real *p, vec v, int64_t n)
{
    if (n >= LANES)
        store(p, v);
    else if (n > 0)
        store_part(p, v, n);
}
INLINE vec keep_n(vec v, int64_t n) { return n >= LANES ? v : n > 0 ? keep(v, n) : splat(0); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
