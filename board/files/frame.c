/* From a camera's frame to the pixels that $NAME takes. Written by EBNAS's export.py. */

#include "$NAME.h"

enum { LARGEST_SHRINK = 16, MOST_WEIGHTS = 2 * LARGEST_SHRINK + 3, PRECISION = 22 };

/* Which source pixels one output pixel takes, and how much of each, in 2^-PRECISION: Pillow's bilinear filter,
   a triangle that is widened where it shrinks. */
struct window {
    int first, count;
    int32_t weight[MOST_WEIGHTS];
};

static struct window window_of(int from, int to, int at)
{
    const double scale = (double)from / to, support = scale > 1 ? scale : 1, centre = (at + 0.5) * scale;
    double weight[MOST_WEIGHTS], sum = 0;
    struct window w;
    w.first = centre - support + 0.5 > 0 ? (int)(centre - support + 0.5) : 0;
    const int end = (int)(centre + support + 0.5) < from ? (int)(centre + support + 0.5) : from;
    w.count = end - w.first;
    for (int i = 0; i < w.count; i++) {
        const double x = (i + w.first - centre + 0.5) * (1 / support), distance = x < 0 ? -x : x;
        weight[i] = distance < 1 ? 1 - distance : 0;
        sum += weight[i];
    }
    for (int i = 0; i < w.count; i++)
        w.weight[i] = (int32_t)(0.5 + weight[i] * (1 / sum) * (1 << PRECISION));
    return w;
}

/* Colour c of a frame's pixel, 0 to 255. */
static int32_t colour(const uint8_t *frame, enum ${NAME}_format format, int p, int c)
{
    if (format == ${UPPER}_GREY)
        return frame[p];
    const int rgb = frame[2 * p] << 8 | frame[2 * p + 1];
    if (c == 1)
        return (rgb >> 5 & 63) * 255 / 63;
    return (c == 0 ? rgb >> 11 : rgb & 31) * 255 / 31;
}

static uint8_t rounded(int32_t sum)
{
    const int32_t value = (sum + (1 << (PRECISION - 1))) >> PRECISION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Half of a difference, rounded as Python rounds: to the even one of two that are as near. */
static int half(int difference) { return difference % 4 == 3 ? difference / 2 + 1 : difference / 2; }

int ${NAME}_frame(const uint8_t *frame, int width, int height, enum ${NAME}_format format, uint8_t *pixels)
{
    const int shorter = width < height ? width : height, longer = width < height ? height : width;
    if (shorter < 1 || longer > 200 * shorter || shorter > LARGEST_SHRINK * $RESIZE)
        return -1;
    const int other = (int)((int64_t)$RESIZE * longer / shorter);
    const int wide = width < height ? $RESIZE : other, high = width < height ? other : $RESIZE;
    const int left = half(wide - ${UPPER}_SIZE), top = half(high - ${UPPER}_SIZE);
    for (int x = 0; x < ${UPPER}_SIZE; x++) {
        const struct window across = window_of(width, wide, left + x);
        for (int y = 0; y < ${UPPER}_SIZE; y++) {
            const struct window down = window_of(height, high, top + y);
            for (int c = 0; c < ${UPPER}_CHANNELS; c++) {
                int32_t sum = 0;
                for (int i = 0; i < down.count; i++) {
                    int32_t row = 0;
                    for (int j = 0; j < across.count; j++) {
                        const int p = (down.first + i) * width + across.first + j;
                        row += colour(frame, format, p, c) * across.weight[j];
                    }
                    sum += rounded(row) * down.weight[i];
                }
                pixels[(y * ${UPPER}_SIZE + x) * ${UPPER}_CHANNELS + c] = rounded(sum);
            }
        }
    }
    return 0;
}
