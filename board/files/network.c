/* $NAME: a 1-bit convolutional network as constants, and what computes it. Written by EBNAS's export.py.

   C99 with GCC's and Clang's attributes; no heap, no file, no global state. Of a library it needs memcpy and
   memset alone. */

#include "$NAME.h"

#include <stddef.h>

void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
#define INFINITY __builtin_inff()

/* A product and a sum are rounded one after the other, as in training's export: the logits are the same bits
   on every processor. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

$KERNEL
$BOARD
/* ---------------------------------------------------------------------------------------- the network */

$ARRAYS

static const struct task tasks[] = {
$TASKS};

const char *const ${NAME}_classes[${UPPER}_CLASSES] = {
    $NAMES};

int ${NAME}_run(const uint8_t *pixels, float *logits, void *memory)
{
    static const float mean[] = {$MEAN}, std[] = {$STD};
    enum { AREA = ${UPPER}_SIZE * ${UPPER}_SIZE };
    float *arena = memory;
    for (int32_t c = 0; c < ${UPPER}_CHANNELS; c++)
        for (int32_t p = 0; p < AREA; p++)
            arena[$IMAGE + c * padded(AREA) + p] =
                ((float)pixels[p * ${UPPER}_CHANNELS + c] / 255.0f - mean[c]) / std[c];
    for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++)
        run_task(tasks + i, arena);
    memcpy(logits, arena + $LOGITS, ${UPPER}_CLASSES * sizeof *logits);
    int best = 0;
    for (int i = 1; i < ${UPPER}_CLASSES; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}
