/* $NAME: a 1-bit convolutional network. Written by EBNAS's export.py. */

#ifndef ${UPPER}_H
#define ${UPPER}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ${UPPER}_SIZE = $SIZE, /* pixels of a picture's side */
    ${UPPER}_CHANNELS = $CHANNELS,
    ${UPPER}_CLASSES = $CLASSES,
    ${UPPER}_ARENA_BYTES = $ARENA
};

extern const char *const ${NAME}_classes[${UPPER}_CLASSES]; /* their names */

/* Classifies a picture: pixels [row][column][channel], as a camera gives them, RGB. Writes the logits, and
   returns the class of the largest one. `arena` is ${UPPER}_ARENA_BYTES of memory, aligned as a float is; what it
   holds before and after has no meaning. Calls at once are safe, each with an arena of its own. */
int ${NAME}_run(const uint8_t *pixels, float *logits, void *arena);

enum ${NAME}_format { ${UPPER}_GREY, ${UPPER}_RGB565 };

/* Makes such pixels of a frame of width x height: resized and cut as in training, bilinear, so that the shorter
   side has $RESIZE pixels, and the centre. RGB565: two bytes a pixel, the one with red first.
   Returns 0, or -1 for a frame of no pixels or one more than 16 times too large. */
int ${NAME}_frame(const uint8_t *frame, int width, int height, enum ${NAME}_format format, uint8_t *pixels);

#ifdef __cplusplus
}
#endif

#endif
