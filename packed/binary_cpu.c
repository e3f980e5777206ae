/* 1-bit convolutions with XOR and popcount, and the few float layers around them: a whole network, one call.

   kernel.py compiles this file at first use, fills an array of `struct step`, and calls run_network().

   What the step BINARY computes, without any of what follows, of a filter f at the pixel (y, x):

       int count = 0;
       for (int c = 0; c < channels_in / groups; c++)
           for (int i = 0; i < kernel; i++)
               for (int j = 0; j < kernel; j++) {
                   int row = y * stride + i * dilation - padding;
                   int column = x * stride + j * dilation - padding;
                   if (row >= 0 && row < height_in && column >= 0 && column < width_in) {
                       int channel = f / (channels_out / groups) * (channels_in / groups) + c;
                       int sign = source[channel][row][column] >= threshold[channel] ? 1 : -1;
                       count += sign * (weight[f][c][i][j] ? 1 : -1);
                   }
               }
       float value = scale[f] * count + bias[f] + residual[f][y][x];
       target[f][y][x] = value > 0 ? value : slope[f] * value;

   Floats.  A tensor is channel planes of height * width floats, each plane padded to a multiple of 64 floats,
   so that no loop over pixels has a tail. What a plane holds past its pixels has no meaning and is never
   read into a pixel.

   Bits.  Eight channels of one group share a byte, a plane holds one such byte per pixel, and vector lanes
   run along pixels. A tap of a convolution is then a load at a constant offset, for any group size and any
   dilation, and nothing is rearranged per window. At stride 2 a plane is split into its four phases (even
   and odd rows, even and odd columns), which makes the taps constant offsets again.

   Zero padding.  A bit has two values and the padding is a third. Each tap has a mask plane, 0xff where it
   lies inside the image: dot = valid - 2 * popcount((x ^ w) & mask), valid = the number of weights inside.

   Threads.  Those that share an image all walk through its steps. A step is cut into chunks; who is free
   takes the next one from a counter, and waits at the step's end until all are done. Nobody is waited for
   who has not begun: threads that come late, or never, cost nothing but their help.

   All below the line "one path" is compiled once per instruction set, by this file including itself with
   PATH defined, and run_network() is told which one to use. There is no global state, and no allocation.

   Boards.  What stands between "board: from here" and "board: to here" is the part of this file that board/
   writes for microcontrollers, with 32 bits for int64_t and a byte of `bits` as it is, not encoded. */

#ifndef PATH

#include <stdint.h>
#if __STDC_HOSTED__
#include <math.h>
#include <string.h>
#else /* all that is needed of them */
#define INFINITY __builtin_inff()
#define memcpy __builtin_memcpy
#define memset __builtin_memset
typedef __SIZE_TYPE__ size_t;
#endif
#if defined(_WIN32)
void __stdcall Sleep(unsigned long milliseconds); /* its header has a FLOAT, too */
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#if !defined(__wasm__)
#include <time.h>
#endif
#endif

/* board: from here */
enum { BINARY, FLOAT, POOL, LINEAR };
enum { LARGEST_KERNEL = 7 };

#if defined(BOARD)
typedef uint8_t encoded; /* a byte of weights */
#define SPREAD(w) ((w) * 0x01010101u)
#else
typedef uint32_t encoded; /* what a path makes of a byte of weights */
#define SPREAD(w) (w)
#endif

/* One byte of weights of each filter: where its input lies, relative to the group and the pixel, in bytes. */
struct term {
    int32_t input, mask;
};

/* One step of the network; kernel.py's _CStep is the same structure. Tensors are offsets into the arena, in
   floats. BINARY: sign, convolve, scale and shift, add the residual, PReLU. FLOAT: convolve, shift, ReLU. */
struct step {
    int64_t op, source, target, residual /* < 0: none */, scratch;
    int64_t channels_in, channels_out, groups, kernel, stride, padding;
    int64_t height_in, width_in, height_out, width_out;
    int64_t add;              /* add to the target instead of writing it */
    int64_t average;          /* POOL: instead of the maximum */
    int64_t relu;             /* FLOAT */
    int64_t chunks;           /* in how many parts threads share the work; 1: it is not worth it */
    int64_t terms;            /* BINARY: bytes of weights per filter */
    int64_t slack;            /* BINARY: how far a tap may read outside the planes, in bytes */
    const struct term *term;  /* BINARY: [term] */
    const uint8_t *masks;     /* BINARY: [tap][pixel] */
    const int16_t *valid;     /* BINARY: [pixel], weights inside the image */
    const float *threshold;   /* BINARY: [input channel] */
    const encoded *bits;      /* BINARY: as encode_weights leaves them */
    const float *weight;      /* FLOAT: [group][block of 4 filters][input, tap][4]; LINEAR: [class][channel];
                                 POOL: [column of the window][pixel], see pool_windows */
    const float *scale;       /* BINARY: [filter]; POOL: [pixel], 1 / pixels in the window */
    const float *bias, *slope;
};

/* board: to here */

/* Of one phase of a step, of which it has up to two: the chunks that have been taken, from the first on in
   the lower 16 bits and from the last on in the upper ones; and the chunks that are done. */
struct counter {
    uint32_t taken;
    int32_t done;
};

/* board: from here */
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t n) { return (n + 63) & ~(int64_t)63; }

/* Of a group's channels at a pixel. */
static inline int64_t group_bytes(const struct step *step)
{
    return (step->channels_in / step->groups + 7) / 8;
}

/* From a group's byte planes to the next one's. The slack between them keeps taps that reach out of a group
   from what another thread writes. */
static inline int64_t group_stride(const struct step *step)
{
    const int64_t phases = step->stride * step->stride;
    return group_bytes(step) * phases * padded(step->height_out * step->width_out) + step->slack;
}

/* How many of a group's filters are convolved at once, where `left` are left. */
static inline int64_t block_size(int64_t left, int64_t at_once)
{
    const int64_t size = least(left, at_once);
    return size >= 8 ? 8 : size >= 6 ? 6 : size >= 4 ? 4 : size >= 2 ? 2 : 1;
}

/* board: to here */

/* Spins for some 20 microseconds, then sleeps between looks, for another program may want the core. Returns
   how often it slept. */
static int64_t wait_for(const int32_t *done, int64_t chunks)
{
    int64_t turn = 0, spins = 1000;
    for (; __atomic_load_n(done, __ATOMIC_ACQUIRE) < chunks; turn++)
        if (turn < spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else {
#if defined(_WIN32)
            Sleep(1);
#elif !defined(__wasm__)
            nanosleep(&(struct timespec){0, 20000}, 0);
#endif
        }
    return turn > spins ? turn - spins : 0;
}

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noinline, noclone)) /* clones per constant would double the time to build */
#endif
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, PATH)

#if defined(__x86_64__)
#include <immintrin.h>

#define BITS(n) (((n) & 1) + ((n) >> 1 & 1) + ((n) >> 2 & 1) + ((n) >> 3 & 1))
#define ROW(w) {BITS(w ^ 0), BITS(w ^ 1), BITS(w ^ 2),  BITS(w ^ 3),  BITS(w ^ 4),  BITS(w ^ 5),  \
                BITS(w ^ 6), BITS(w ^ 7), BITS(w ^ 8),  BITS(w ^ 9),  BITS(w ^ 10), BITS(w ^ 11), \
                BITS(w ^ 12), BITS(w ^ 13), BITS(w ^ 14), BITS(w ^ 15)}
/* [weight nibble][input nibble]: the number of bits in which they differ */
static const uint8_t differing[16][16] __attribute__((aligned(16))) = {
    ROW(0), ROW(1), ROW(2),  ROW(3),  ROW(4),  ROW(5),  ROW(6),  ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15)};

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET(names) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#define WIDE ""
#else
#define TARGET(names) PRAGMA(GCC push_options) PRAGMA(GCC target(names))
#define TARGET_END PRAGMA(GCC pop_options)
#define WIDE ",prefer-vector-width=512"
#endif

TARGET("avx512f,avx512bw,avx512bitalg,avx2,fma" WIDE)
#define PATH avx512
#define AVX512
#include __FILE__
#undef AVX512
#undef PATH
TARGET_END

TARGET("avx2,fma")
#define PATH avx2
#define AVX2
#include __FILE__
#undef AVX2
#undef PATH
TARGET_END
#endif

#if defined(__aarch64__) || defined(__wasm_simd128__)
#if defined(__aarch64__)
#include <arm_neon.h>
#define V128_FILTERS 6 /* with two vectors of pixels 12 sums in 32 registers; with 16 GCC spills some */
#else
#include <wasm_simd128.h>
#define V128_FILTERS 4 /* mostly run on 16 registers */
#endif
#define PATH v128
#define V128
#include __FILE__
#undef V128
#undef PATH
#endif

#if defined(__wasm_simd128__)
#define run_c run_v128 /* half of the bytes to send; a browser without vectors refuses them anyway */
#else
#define PATH c
#include __FILE__
#undef PATH
#endif

enum { PLAIN_C, PATH_AVX2, PATH_AVX512, PATH_V128 };

/* The best path that this processor and its operating system can run. */
EXPORT int best_path(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("fma"))
        return PATH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return PATH_AVX2;
#elif defined(V128_FILTERS)
    return PATH_V128; /* part of every 64-bit ARM; of WebAssembly, where it was compiled so */
#endif
    return PLAIN_C;
}

/* bytes [group][filter][term] -> the path's order and form, [group][block of filters][term][filter]. */
EXPORT void encode_weights(int path, const uint8_t *bytes, int64_t groups, int64_t filters, int64_t terms,
                           encoded *to)
{
    int64_t at_once = 4;
    if (path == PATH_AVX512)
        at_once = 8;
#if defined(V128_FILTERS)
    if (path == PATH_V128)
        at_once = V128_FILTERS;
#endif
    for (int64_t g = 0; g < groups; g++, bytes += filters * terms)
        for (int64_t first = 0, size; first < filters; first += size) {
            size = block_size(filters - first, at_once);
            for (int64_t t = 0; t < terms; t++)
                for (int64_t f = first; f < first + size; f++) {
                    const uint32_t w = bytes[f * terms + t];
                    *to++ = path == PATH_AVX2 ? (w & 15) * 16 | (w >> 4) * 16 << 16 : w * 0x01010101;
                }
        }
}

/* One thread's part of n steps on what the arena holds. The threads share steps, arena and counters, 2 * n
   zeros; `own` is how far in the arena, in floats, a thread's scratch memory lies behind that of the first.
   Returns how often it slept to wait for another thread. */
EXPORT int64_t share_steps(int path, const struct step *steps, int64_t n, float *arena, int64_t own,
                           struct counter *counters)
{
    (void)path; /* where there is but one */
#if defined(__x86_64__)
    if (path == PATH_AVX512)
        return run_avx512(steps, n, arena, own, counters);
    if (path == PATH_AVX2)
        return run_avx2(steps, n, arena, own, counters);
#elif defined(V128_FILTERS)
    if (path == PATH_V128)
        return run_v128(steps, n, arena, own, counters);
#endif
    return run_c(steps, n, arena, own, counters);
}

/* Runs n steps on what the arena holds. */
EXPORT void run_steps(int path, const struct step *steps, int64_t n, float *arena)
{
    share_steps(path, steps, n, arena, 0, 0);
}

/* images [count][channels][pixels] -> logits [count][channels_out of the last step]. */
EXPORT void run_network(int path, const struct step *steps, int64_t n, float *arena, const float *images,
                        int64_t count, int64_t channels, int64_t pixels, float *logits)
{
    const struct step *last = steps + n - 1;
    for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < channels; c++, images += pixels)
            memcpy(arena + c * padded(pixels), images, pixels * sizeof(float));
        run_steps(path, steps, n, arena);
        memcpy(logits + i * last->channels_out, arena + last->target, last->channels_out * sizeof(float));
    }
}

#else /* ------------------------------------------------------------------------------------ one path */

/* Per path: `bytes`, a vector of LANES pixels of a byte plane; `tap`, such a vector made ready to be compared
   with many filters; FILTERS, as many filters at once as the registers hold; FLOATS in a float vector. */

#if defined(AVX512)

#define LANES 64
#define FILTERS 8
#define FLOATS 16
typedef __m512i FN(bytes);
typedef struct { __m512i x, mask; } FN(tap);

INLINE FN(bytes) FN(zero)(void) { return _mm512_setzero_si512(); }
INLINE void FN(store)(uint8_t *to, FN(bytes) v) { _mm512_storeu_si512(to, v); }

INLINE FN(tap) FN(load_tap)(const uint8_t *x, const uint8_t *mask)
{
    return (FN(tap)){_mm512_loadu_si512(x), _mm512_loadu_si512(mask)};
}

INLINE FN(bytes) FN(add_differing)(FN(bytes) count, FN(tap) t, uint32_t w)
{
    const __m512i weights = _mm512_set1_epi32((int)w);
    const __m512i differs = _mm512_ternarylogic_epi32(t.mask, t.x, weights, 0x60); /* mask & (x ^ weights) */
    return _mm512_add_epi8(count, _mm512_popcnt_epi8(differs));
}

INLINE FN(bytes) FN(pack)(const float *x, int64_t plane, const float *threshold, int channels)
{
    __m512i bits = _mm512_setzero_si512();
    for (int c = 0; c < channels; c++, x += plane) {
        const __m512 t = _mm512_set1_ps(threshold[c]);
        __mmask64 above = 0;
        for (int i = 0; i < 4; i++)
            above |= (__mmask64)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16 * i), t, _CMP_GE_OQ) << 16 * i;
        bits = _mm512_mask_add_epi8(bits, above, bits, _mm512_set1_epi8(1 << c));
    }
    return bits;
}

#elif defined(AVX2)

/* No popcount of bytes here, but a table look-up of nibbles, and a weight selects its table: `differing`
   gives the count without an XOR. An index with its top bit set looks up 0, which serves as the mask. */
#define LANES 64
#define FILTERS 4
#define FLOATS 8
typedef struct { __m256i half[2]; } FN(bytes);
typedef struct { __m256i low[2], high[2]; } FN(tap);

INLINE FN(bytes) FN(zero)(void)
{
    return (FN(bytes)){{_mm256_setzero_si256(), _mm256_setzero_si256()}};
}

INLINE void FN(store)(uint8_t *to, FN(bytes) v)
{
    for (int i = 0; i < 2; i++)
        _mm256_storeu_si256((__m256i *)(to + 32 * i), v.half[i]);
}

INLINE FN(tap) FN(load_tap)(const uint8_t *x, const uint8_t *mask)
{
    const __m256i nibble = _mm256_set1_epi8(15), top = _mm256_set1_epi8((char)0x80);
    FN(tap) t;
    for (int i = 0; i < 2; i++) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(x + 32 * i));
        const __m256i inside = _mm256_loadu_si256((const __m256i *)(mask + 32 * i));
        const __m256i outside = _mm256_andnot_si256(inside, top);
        t.low[i] = _mm256_or_si256(_mm256_and_si256(v, nibble), outside);
        t.high[i] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), outside);
    }
    return t;
}

INLINE FN(bytes) FN(add_differing)(FN(bytes) count, FN(tap) t, uint32_t w)
{
    const uint8_t *row = differing[0];
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(row + (w & 0xffff))));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(row + (w >> 16))));
    for (int i = 0; i < 2; i++) {
        count.half[i] = _mm256_add_epi8(count.half[i], _mm256_shuffle_epi8(low, t.low[i]));
        count.half[i] = _mm256_add_epi8(count.half[i], _mm256_shuffle_epi8(high, t.high[i]));
    }
    return count;
}

INLINE FN(bytes) FN(pack)(const float *x, int64_t plane, const float *threshold, int channels)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the lanes of the two packs */
    FN(bytes) bits = FN(zero)();
    for (int c = 0; c < channels; c++, x += plane) {
        const __m256 t = _mm256_set1_ps(threshold[c]);
        const __m256i bit = _mm256_set1_epi8((char)(1 << c));
        for (int i = 0; i < 2; i++) {
            __m256i above[4];
            for (int j = 0; j < 4; j++) {
                const __m256 v = _mm256_loadu_ps(x + 32 * i + 8 * j);
                above[j] = _mm256_castps_si256(_mm256_cmp_ps(v, t, _CMP_GE_OQ));
            }
            const __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(above[0], above[1]),
                                                   _mm256_packs_epi32(above[2], above[3]));
            bits.half[i] = _mm256_or_si256(bits.half[i], _mm256_and_si256(all, bit));
        }
    }
    for (int i = 0; i < 2; i++)
        bits.half[i] = _mm256_permutevar8x32_epi32(bits.half[i], order);
    return bits;
}

#elif defined(V128)

/* 128-bit vectors with a popcount of bytes: NEON and WebAssembly's, which differ in the two functions that
   come first. ARM's dot product would sum neighbouring bytes, and those are pixels here: of no use. SVE's
   longer vectors and SHA3's BCAX (the XOR and the mask in one) would be, on the processors that have them. */
#define LANES 32
#define FILTERS V128_FILTERS
#define FLOATS 4
typedef uint8_t FN(vector) __attribute__((vector_size(16)));
typedef uint8_t FN(unaligned) __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t FN(words) __attribute__((vector_size(16)));
typedef float FN(quad) __attribute__((vector_size(16), aligned(4), may_alias));
typedef struct { FN(vector) half[2]; } FN(bytes);
typedef struct { FN(vector) x[2], mask[2]; } FN(tap);

#if defined(__aarch64__)
INLINE FN(vector) FN(popcount)(FN(vector) v) { return vcntq_u8(v); }

INLINE FN(vector) FN(narrow)(FN(words) a, FN(words) b, FN(words) c, FN(words) d)
{
    const uint16x8_t low = vuzp1q_u16((uint16x8_t)a, (uint16x8_t)b);
    return vuzp1q_u8((uint8x16_t)low, (uint8x16_t)vuzp1q_u16((uint16x8_t)c, (uint16x8_t)d));
}
#else
INLINE FN(vector) FN(popcount)(FN(vector) v) { return (FN(vector))wasm_i8x16_popcnt((v128_t)v); }

INLINE FN(vector) FN(narrow)(FN(words) a, FN(words) b, FN(words) c, FN(words) d)
{
    return (FN(vector))wasm_i8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4((v128_t)a, (v128_t)b),
                                               wasm_i16x8_narrow_i32x4((v128_t)c, (v128_t)d));
}
#endif

INLINE FN(bytes) FN(zero)(void) { return (FN(bytes)){{{0}, {0}}}; }

INLINE void FN(store)(uint8_t *to, FN(bytes) v)
{
    for (int i = 0; i < 2; i++)
        *(FN(unaligned) *)(to + 16 * i) = v.half[i];
}

INLINE FN(tap) FN(load_tap)(const uint8_t *x, const uint8_t *mask)
{
    FN(tap) t;
    for (int i = 0; i < 2; i++) {
        t.x[i] = *(const FN(unaligned) *)(x + 16 * i);
        t.mask[i] = *(const FN(unaligned) *)(mask + 16 * i);
    }
    return t;
}

INLINE FN(bytes) FN(add_differing)(FN(bytes) count, FN(tap) t, uint32_t w)
{
    const FN(vector) weights = (FN(vector))(FN(words)){w, w, w, w};
    for (int i = 0; i < 2; i++)
        count.half[i] += FN(popcount)((t.x[i] ^ weights) & t.mask[i]);
    return count;
}

INLINE FN(bytes) FN(pack)(const float *x, int64_t plane, const float *threshold, int channels)
{
    FN(bytes) bits = FN(zero)();
    for (int c = 0; c < channels; c++, x += plane)
        for (int i = 0; i < 2; i++) {
            FN(words) above[4];
            for (int j = 0; j < 4; j++)
                above[j] = (FN(words))(*(const FN(quad) *)(x + 16 * i + 4 * j) >= threshold[c]);
            bits.half[i] |= FN(narrow)(above[0], above[1], above[2], above[3]) & (uint8_t)(1 << c);
        }
    return bits;
}

#else

/* board: from here */
#define FILTERS 4
#define FLOATS 4
#if defined(BOARD) /* a register of a microcontroller */
#define LANES 4
typedef uint32_t FN(bytes);
#else
#define LANES 16
typedef uint32_t FN(bytes) __attribute__((vector_size(16)));
#endif
typedef struct { FN(bytes) x, mask; } FN(tap);

INLINE FN(bytes) FN(zero)(void) { return (FN(bytes)){0}; }
INLINE void FN(store)(uint8_t *to, FN(bytes) v) { memcpy(to, &v, sizeof v); }

INLINE FN(tap) FN(load_tap)(const uint8_t *x, const uint8_t *mask)
{
    FN(tap) t;
    memcpy(&t.x, x, sizeof t.x);
    memcpy(&t.mask, mask, sizeof t.mask);
    return t;
}

INLINE FN(bytes) FN(add_differing)(FN(bytes) count, FN(tap) t, uint32_t w)
{
    FN(bytes) v = (t.x ^ w) & t.mask;
    v -= v >> 1 & 0x55555555u; /* sums of 2, 4 and 8 bits, side by side */
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    return count + ((v + (v >> 4)) & 0x0f0f0f0fu);
}

INLINE FN(bytes) FN(pack)(const float *x, int64_t plane, const float *threshold, int channels)
{
    uint8_t bits[LANES] = {0};
    for (int c = 0; c < channels; c++, x += plane)
        for (int i = 0; i < LANES; i++)
            bits[i] = (uint8_t)(bits[i] | (x[i] >= threshold[c]) << c);
    FN(bytes) v;
    memcpy(&v, bits, sizeof v);
    return v;
}
/* board: to here */

#endif

/* board: from here */
typedef float FN(floats) __attribute__((vector_size(4 * FLOATS), aligned(4), may_alias));

/* board: to here */

/* Does items first to end of a phase; `own` is where this thread's scratch memory is. */
typedef void FN(part)(const struct step *step, float *arena, float *own, int64_t first, int64_t end);

/* Does what other threads leave of a phase, and waits until all of it is done. The first thread begins at
   the first chunk and the others at the last: they mostly find in their caches what they wrote before. */
static int64_t FN(share)(FN(part) *part, int64_t items, const struct step *step, float *arena, float *own,
                         struct counter *counter)
{
    if (counter == 0) {
        part(step, arena, own, 0, items);
        return 0;
    }
    const int from_last = own != arena + step->scratch;
    for (;;) {
        const uint32_t taken = __atomic_fetch_add(&counter->taken, from_last ? 1 << 16 : 1, __ATOMIC_RELAXED);
        const int64_t lower = taken & 0xffff, upper = taken >> 16;
        if (lower + upper >= step->chunks)
            break;
        const int64_t i = from_last ? step->chunks - 1 - upper : lower;
        part(step, arena, own, items * i / step->chunks, items * (i + 1) / step->chunks);
        __atomic_fetch_add(&counter->done, 1, __ATOMIC_RELEASE);
    }
    return wait_for(&counter->done, step->chunks);
}

/* board: from here */
static void FN(split_bytes)(const struct step *step, const uint8_t *restrict whole, uint8_t *restrict phases,
                            int64_t plane_out)
{
    for (int64_t y = 0, width = step->width_in; y < step->height_in; y++, whole += width)
        for (int64_t phase = 0; phase < 2; phase++) {
            uint8_t *restrict row = phases + (y % 2 * 2 + phase) * plane_out + y / 2 * step->width_out;
            for (int64_t i = 0; i < (width + 1 - phase) / 2; i++)
                row[i] = whole[2 * i + phase];
        }
}

/* Signs of the source as byte planes, [group][byte of 8 channels][phase][pixel]: bit = (x >= threshold).
   An item is such a byte. */
static void FN(pack_signs)(const struct step *step, float *arena, float *own, int64_t first, int64_t end)
{
    const int64_t plane_in = padded(step->height_in * step->width_in);
    const int64_t plane_out = padded(step->height_out * step->width_out);
    const int64_t channels = step->channels_in / step->groups, bytes = group_bytes(step);
    const int64_t size = step->stride * step->stride * plane_out;
    uint8_t *planes = (uint8_t *)(arena + step->scratch) + step->slack;
    uint8_t *whole = (uint8_t *)own + step->slack + step->groups * group_stride(step);
    for (; first < end; first++) {
        const int64_t g = first / bytes, byte = first % bytes, left = channels - 8 * byte;
        const float *x = arena + step->source + (g * channels + 8 * byte) * plane_in;
        const float *threshold = step->threshold + g * channels + 8 * byte;
        uint8_t *plane = planes + g * group_stride(step) + byte * size;
        uint8_t *to = step->stride == 1 ? plane : whole;
        if (left >= 8)
            for (int64_t p = 0; p < plane_in; p += LANES)
                FN(store)(to + p, FN(pack)(x + p, plane_in, threshold, 8));
        else
            for (int64_t p = 0; p < plane_in; p += LANES)
                FN(store)(to + p, FN(pack)(x + p, plane_in, threshold, (int)left));
        if (step->stride == 2)
            FN(split_bytes)(step, whole, plane, plane_out);
    }
}

/* For LANES pixels and `filters` filters: how many bits differ under the masks. */
INLINE void FN(count_differing)(const int filters, const struct step *step, const uint8_t *x,
                                const uint8_t *masks, const encoded *w, uint16_t count[FILTERS][LANES])
{
    for (int64_t start = 0; start < step->terms; start += 31) { /* 31 * 8 fits into the byte of a lane */
        const int64_t end = least(start + 31, step->terms);
        FN(bytes) sum[FILTERS];
        for (int f = 0; f < filters; f++)
            sum[f] = FN(zero)();
        for (int64_t t = start; t < end; t++, w += filters) {
            const FN(tap) tap = FN(load_tap)(x + step->term[t].input, masks + step->term[t].mask);
            for (int f = 0; f < filters; f++)
                sum[f] = FN(add_differing)(sum[f], tap, SPREAD(w[f]));
        }
        for (int f = 0; f < filters; f++) {
            uint8_t low[LANES];
            FN(store)(low, sum[f]);
            for (int i = 0; i < LANES; i++)
                count[f][i] = (uint16_t)((start ? count[f][i] : 0) + low[i]);
        }
    }
}

INLINE void FN(finish)(const uint16_t *restrict count, const int16_t *restrict valid, float scale, float bias,
                       float slope, const float *restrict residual, const int add, float *restrict target)
{
    for (int i = 0; i < LANES; i++) {
        float y = scale * (float)(valid[i] - 2 * count[i]) + bias;
        if (residual)
            y += residual[i];
        const float sloped = slope * y; /* computed in any case: a selection, not a branch */
        y = y > 0 ? y : sloped;
        target[i] = add ? target[i] + y : y;
    }
}

/* From the counts of LANES pixels, p and on, and of `filters` filters, c and on, to their outputs. */
static NOINLINE void FN(finish_filters)(int filters, const struct step *step, int64_t c, int64_t p,
                                        const uint16_t count[FILTERS][LANES], float *arena)
{
    const int64_t plane = padded(step->height_out * step->width_out);
    for (int f = 0; f < filters; f++, c++) {
        const float *residual = arena + step->residual + c * plane + p;
        float *target = arena + step->target + c * plane + p;
        const int16_t *valid = step->valid + p;
        const float scale = step->scale[c], bias = step->bias[c], slope = step->slope[c];
        if (step->residual < 0)
            FN(finish)(count[f], valid, scale, bias, slope, 0, 0, target);
        else if (step->add)
            FN(finish)(count[f], valid, scale, bias, slope, residual, 1, target);
        else
            FN(finish)(count[f], valid, scale, bias, slope, residual, 0, target);
    }
}

INLINE void FN(convolve_filters)(const int filters, const struct step *step, const uint8_t *planes,
                                 const encoded *w, int64_t first, int64_t p, int64_t end, float *arena)
{
    for (; p < end; p += LANES) {
        uint16_t count[FILTERS][LANES];
        FN(count_differing)(filters, step, planes + p, step->masks + p, w, count);
        FN(finish_filters)(filters, step, first, p, (const uint16_t(*)[LANES])count, arena);
    }
}

/* The signs are packed. An item is LANES pixels of a block of filters, in the order [group][block][pixel]. */
static void FN(convolve_packed)(const struct step *step, float *arena, float *own, int64_t begin, int64_t end)
{
    (void)own;
    const int64_t plane = padded(step->height_out * step->width_out), items = plane / LANES;
    const int64_t filters = step->channels_out / step->groups;
    const uint8_t *planes = (uint8_t *)(arena + step->scratch) + step->slack;
    const encoded *w = step->bits;
    int64_t c = 0;
    for (int64_t g = 0; g < step->groups; g++, planes += group_stride(step))
        for (int64_t first = 0, size; first < filters; first += size, c += size, w += size * step->terms) {
            size = block_size(filters - first, FILTERS);
            const int64_t from = begin > 0 ? begin * LANES : 0, to = least(end, items) * LANES;
            begin -= items, end -= items;
            switch (from < to ? size : 0) {
            case 1: FN(convolve_filters)(1, step, planes, w, c, from, to, arena); break;
            case 2: FN(convolve_filters)(2, step, planes, w, c, from, to, arena); break;
            case 4: FN(convolve_filters)(4, step, planes, w, c, from, to, arena); break;
#if FILTERS >= 6
            case 6: FN(convolve_filters)(6, step, planes, w, c, from, to, arena); break;
#endif
#if FILTERS == 8
            case 8: FN(convolve_filters)(8, step, planes, w, c, from, to, arena); break;
#endif
            }
        }
}

/* board: to here */

/* Of a group, the items of convolve_packed. */
static int64_t FN(group_items)(const struct step *step)
{
    int64_t blocks = 0, left = step->channels_out / step->groups;
    for (; left > 0; blocks++)
        left -= block_size(left, FILTERS);
    return blocks * padded(step->height_out * step->width_out) / LANES;
}

/* An item is a group. */
static void FN(convolve_groups)(const struct step *step, float *arena, float *own, int64_t first, int64_t end)
{
    const int64_t items = FN(group_items)(step);
    FN(pack_signs)(step, arena, own, first * group_bytes(step), end * group_bytes(step));
    FN(convolve_packed)(step, arena, own, first * items, end * items);
}

static int64_t FN(convolve_binary)(const struct step *step, float *arena, float *own,
                                   struct counter *counters)
{
    if (counters == 0 || step->groups >= least(step->chunks, 8))
        return FN(share)(FN(convolve_groups), step->groups, step, arena, own, counters);
    /* too few groups to share: all signs first, then blocks of filters */
    return FN(share)(FN(pack_signs), step->groups * group_bytes(step), step, arena, own, counters) +
           FN(share)(FN(convolve_packed), step->groups * FN(group_items)(step), step, arena, own, counters + 1);
}

/* board: from here */
/* The padded source of one group, each channel split into stride * stride phases of height * width floats. */
static void FN(split_phases)(const struct step *step, const float *source, float *phases, int64_t height,
                             int64_t width)
{
    const int64_t channels = step->channels_in / step->groups, stride = step->stride, pad = step->padding;
    const int64_t plane = padded(step->height_in * step->width_in);
    memset(phases, 0, (size_t)(channels * stride * stride * height * width) * sizeof(float));
    for (int64_t c = 0; c < channels; c++, source += plane, phases += stride * stride * height * width)
        for (int64_t y = 0; y < step->height_in; y++)
            for (int64_t phase = 0; phase < stride; phase++) {
                const int64_t first = (phase + stride * pad - pad) % stride; /* this phase's first column */
                const int64_t of_phase = (y + pad) % stride * stride + phase;
                float *row = phases + (of_phase * height + (y + pad) / stride) * width;
                row += (first + pad) / stride;
                for (int64_t x = first; x < step->width_in; x += stride)
                    *row++ = source[y * step->width_in + x];
            }
}

/* Four filters at a time over vectors of pixels. Rows of output are as long as the phases' rows; what lies
   past the image is dropped as the result is copied out. An item is four filters of one group. */
static void FN(convolve_float)(const struct step *step, float *arena, float *own, int64_t item, int64_t end)
{
    enum { VECTORS = FLOATS == 16 ? 4 : 2, WIDTH = VECTORS * FLOATS };
    const int64_t s = step->stride, k = step->kernel, channels = step->channels_in / step->groups;
    const int64_t filters = step->channels_out / step->groups;
    const int64_t height = step->height_out + (k - 1) / s, width = step->width_out + (k - 1) / s;
    const int64_t plane_in = padded(step->height_in * step->width_in);
    const int64_t plane_out = padded(step->height_out * step->width_out);
    const int64_t row_length = padded(step->height_out * width);
    const int64_t channel = s * s * height * width, taps = k * k;
    float *phases = own, *rows = phases + padded(channels * channel) + 128;
    const float *weight = step->weight + item * 4 * channels * taps;
    int64_t offset[LARGEST_KERNEL * LARGEST_KERNEL]; /* of the taps: no division in the inner loop */
    for (int64_t t = 0; t < taps; t++) {
        const int64_t dy = t / k, dx = t % k, phase = dy % s * s + dx % s;
        offset[t] = (phase * height + dy / s) * width + dx / s;
    }

    for (const int64_t blocks = (filters + 3) / 4; item < end;) {
        const int64_t g = item / blocks;
        FN(split_phases)(step, arena + step->source + g * channels * plane_in, phases, height, width);
        for (; item < least(end, (g + 1) * blocks); item++, weight += 4 * channels * taps) {
            const int64_t first = item % blocks * 4;
            for (int64_t q = 0; q < row_length; q += WIDTH) {
                FN(floats) sum[4][VECTORS] = {{{0}}};
                const float *w = weight;
                for (const float *x = phases + q; x < phases + channels * channel + q; x += channel)
                    for (int64_t t = 0; t < taps; t++, w += 4)
                        for (int v = 0; v < VECTORS; v++)
                            for (int f = 0; f < 4; f++)
                                sum[f][v] += *(const FN(floats) *)(x + offset[t] + v * FLOATS) * w[f];
                for (int f = 0; f < 4; f++)
                    memcpy(rows + f * row_length + q, sum[f], sizeof sum[f]);
            }
            for (int64_t f = 0; f < least(4, filters - first); f++) {
                const int64_t c = g * filters + first + f;
                const float bias = step->bias[c], floor = step->relu ? 0 : -INFINITY;
                for (int64_t y = 0; y < step->height_out; y++) {
                    const float *restrict row = rows + f * row_length + y * width;
                    float *restrict to = arena + step->target + c * plane_out + y * step->width_out;
                    for (int64_t x = 0; x < step->width_out; x++) {
                        const float y = row[x] + bias;
                        to[x] = y < floor ? floor : y;
                    }
                }
            }
        }
    }
}

INLINE float FN(combine)(const int average, float a, float b) { return average ? a + b : a > b ? a : b; }

/* Windows of kernel x kernel, what lies outside counted neither as a maximum nor in the average; kernel 1 is
   the identity. Every pixel's window is combined, in flat loops over the plane, and stride 2 keeps every
   other one. Above and below a plane lie margins; a neighbour across the left or right border is overruled
   by its entry in weight [kernel][pixel]: a limit of -inf for a maximum, a factor of 0 for an average. */
INLINE void FN(pool_windows)(const int k, const int average, const int add, const struct step *step,
                             float *arena, float *own, int64_t first, int64_t end)
{
    const int64_t pixels = step->height_in * step->width_in, plane = padded(pixels), width = step->width_in;
    const int64_t margin = padded(width) + 64, before = step->padding;
    float *restrict x = own + margin, *restrict rows = x + plane + 2 * margin;
    float *restrict pooled = rows + plane + margin;
    const float outside = average ? 0 : -INFINITY;
    for (int64_t p = 0; p < margin; p++)
        x[p - margin] = rows[p - margin] = x[plane + p] = rows[plane + p] = outside;
    for (int64_t p = pixels; p < plane; p++)
        x[p] = outside;

    for (int64_t c = first; c < end; c++) {
        memcpy(x, arena + step->source + c * plane, (size_t)pixels * sizeof(float));
        for (int64_t p = 0; p < plane; p++) {
            float y = x[p - before * width];
            for (int i = 1; i < k; i++)
                y = FN(combine)(average, y, x[p + (i - before) * width]);
            rows[p] = y;
        }
        float *restrict target = arena + step->target + c * padded(step->height_out * step->width_out);
        float *restrict to = step->stride == 1 ? target : pooled;
        for (int64_t p = 0; p < plane; p++) {
            float y = outside;
            for (int i = 0; i < k; i++) {
                const float next = rows[p + i - before], inside = step->weight[i * plane + p];
                y = FN(combine)(average, y, average ? next * inside : next < inside ? next : inside);
            }
            if (average)
                y *= step->scale[p];
            to[p] = add && step->stride == 1 ? to[p] + y : y;
        }
        if (step->stride == 2)
            for (int64_t y = 0; y < step->height_out; y++, target += step->width_out)
                for (int64_t i = 0; i < step->width_out; i++)
                    target[i] = pooled[2 * (y * width + i)] + (add ? target[i] : 0);
    }
}

/* An item is a channel. */
static void FN(pool)(const struct step *step, float *arena, float *own, int64_t c, int64_t end)
{
    const int average = step->average != 0, add = step->add != 0;
    if (step->kernel == 1 && !add)
        FN(pool_windows)(1, 0, 0, step, arena, own, c, end);
    else if (step->kernel == 1)
        FN(pool_windows)(1, 0, 1, step, arena, own, c, end);
    else if (step->kernel == 2)
        FN(pool_windows)(2, 1, 0, step, arena, own, c, end);
    else if (average && add)
        FN(pool_windows)(3, 1, 1, step, arena, own, c, end);
    else if (average)
        FN(pool_windows)(3, 1, 0, step, arena, own, c, end);
    else if (add)
        FN(pool_windows)(3, 0, 1, step, arena, own, c, end);
    else
        FN(pool_windows)(3, 0, 0, step, arena, own, c, end);
}

INLINE float FN(total)(FN(floats) v)
{
    float sum = 0;
    for (int i = 0; i < FLOATS; i++)
        sum += v[i];
    return sum;
}

/* Mean over space, then a matrix; its rows are padded with zeros to a multiple of 64. All is one item. */
static void FN(classify)(const struct step *step, float *arena, float *own, int64_t item, int64_t end)
{
    if (item == end)
        return;
    const int64_t pixels = step->height_in * step->width_in, plane = padded(pixels);
    const int64_t length = padded(step->channels_in);
    float *means = own;
    memset(means, 0, (size_t)length * sizeof(float));
    for (int64_t c = 0; c < step->channels_in; c++) {
        const float *x = arena + step->source + c * plane;
        FN(floats) sums = {0};
        int64_t p = 0;
        for (; p + FLOATS <= pixels; p += FLOATS)
            sums += *(const FN(floats) *)(x + p);
        float sum = FN(total)(sums);
        for (; p < pixels; p++)
            sum += x[p];
        means[c] = sum / (float)pixels;
    }
    for (int64_t f = 0; f < step->channels_out; f++) {
        const float *w = step->weight + f * length;
        FN(floats) sums[4] = {{0}};
        for (int64_t c = 0; c < length; c += 4 * FLOATS)
            for (int i = 0; i < 4; i++)
                sums[i] += *(const FN(floats) *)(means + c + i * FLOATS) *
                           *(const FN(floats) *)(w + c + i * FLOATS);
        arena[step->target + f] = step->bias[f] + FN(total)((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

/* board: to here */

static int64_t FN(run)(const struct step *steps, int64_t n, float *arena, int64_t own,
                       struct counter *counters)
{
    int64_t slept = 0;
    for (const struct step *step = steps; step < steps + n; step++) {
        float *scratch = arena + step->scratch + own;
        struct counter *counter = counters ? counters + 2 * (step - steps) : 0;
        const int64_t blocks = /* of four filters */
            step->op == FLOAT ? step->groups * ((step->channels_out / step->groups + 3) / 4) : 0;
        switch (step->op) {
        case BINARY: slept += FN(convolve_binary)(step, arena, scratch, counter); break;
        case FLOAT: slept += FN(share)(FN(convolve_float), blocks, step, arena, scratch, counter); break;
        case POOL: slept += FN(share)(FN(pool), step->channels_in, step, arena, scratch, counter); break;
        case LINEAR: slept += FN(share)(FN(classify), 1, step, arena, scratch, counter); break;
        }
    }
    return slept;
}

#undef LANES
#undef FILTERS
#undef FLOATS

#endif
