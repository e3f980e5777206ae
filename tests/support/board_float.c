/* Float convolutions for board_instructions.py, as a microcontroller's library computes them: the input of a
   group is copied with its padding, then 4 filters times 2 pixels are summed in registers.

   SHAPES: {channels in and out, groups, kernel, stride, dilation, padding, size}, ... */

#include <stddef.h>

enum { SPACE = 600000 };
static const struct shape {
    int channels_in, channels_out, groups, kernel, stride, dilation, padding, size;
} shapes[] = {SHAPES};
static float input[SPACE / 4], weights[SPACE / 4], padded[SPACE / 4], output[SPACE / 4];

/* One group; w [filters / 4][channel, tap][4]. */
static void convolve(const struct shape *s, int channels, int filters, const float *x, const float *w, float *y)
{
    const int wide = s->size + 2 * s->padding + 2, pixels = (s->size + s->stride - 1) / s->stride;
    for (int i = 0; i < channels * wide * wide; i++)
        padded[i] = 0;
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < s->size; i++)
            for (int j = 0; j < s->size; j++)
                padded[(c * wide + i + s->padding) * wide + j + s->padding] = *x++;
    for (int f = 0; f < filters; f += 4, w += 4 * channels * s->kernel * s->kernel)
        for (int i = 0; i < pixels; i++)
            for (int j = 0; j < pixels; j += 2) {
                float sum[2][4] = {{0}};
                const float *v = w;
                for (int c = 0; c < channels; c++)
                    for (int k = 0; k < s->kernel; k++) {
                        const float *p = padded + (c * wide + i * s->stride + k * s->dilation) * wide + j * s->stride;
                        for (int l = 0; l < s->kernel; l++, v += 4, p += s->dilation) {
                            const float first = p[0], second = p[s->stride];
                            for (int n = 0; n < 4; n++) {
                                sum[0][n] += first * v[n];
                                sum[1][n] += second * v[n];
                            }
                        }
                    }
                for (int n = 0; n < 4; n++)
                    for (int m = 0; m < 2 && j + m < pixels; m++)
                        y[((f + n) * pixels + i) * pixels + j + m] = sum[m][n];
            }
}

int main(void)
{
    for (int run = 0; run < RUNS; run++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            const struct shape *s = shapes + i;
            const int channels = s->channels_in / s->groups, filters = s->channels_out / s->groups;
            for (int g = 0; g < s->groups; g++)
                convolve(s, channels, filters, input + g * channels * s->size * s->size,
                         weights + g * channels * filters * s->kernel * s->kernel, output);
        }
    return 0;
}
