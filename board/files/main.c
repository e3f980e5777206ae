/* Runs $NAME on one picture and compares its logits with those that EBNAS's packed form gives, to the bit.

   Prints a line, and exits with 0 where they are the same. RUNS: how often it is computed. */

#include "$NAME.h"

#include <stdio.h>
#include <string.h>

#ifndef RUNS
#define RUNS 1
#endif

static const uint8_t pixels[${UPPER}_SIZE * ${UPPER}_SIZE * ${UPPER}_CHANNELS] = {
$PIXELS};

static const float expected[${UPPER}_CLASSES] = {
$EXPECTED};

static float arena[${UPPER}_ARENA_BYTES / sizeof(float)];

int main(void)
{
    float logits[${UPPER}_CLASSES];
    int class = 0;
    for (int i = 0; i < RUNS; i++)
        class = ${NAME}_run(pixels, logits, arena);
    const int same = memcmp(logits, expected, sizeof logits) == 0;
    printf("%s: %s\n", ${NAME}_classes[class], same ? "the same bits" : "other logits than EBNAS's");
    return !same;
}
