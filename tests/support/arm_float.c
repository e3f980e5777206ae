/* Float convolutions for arm_instructions.py: im2col and a matrix product of 4 filters times 16 pixels in
   registers, the usual form. A line of the standard input is one convolution: how often it is computed, then
   channels in and out, groups, kernel, stride, dilation, padding, height and width. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef float quad __attribute__((vector_size(16)));

/* x [groups][depth][pixels], w [groups][filters / 4][depth][4] -> y [groups][filters][pixels]; pixels is a
   multiple of 16 and filters of 4. */
static void multiply(const float *x, const float *w, float *y, int depth, int filters, int pixels)
{
    for (int f = 0; f < filters; f += 4, w += 4 * depth)
        for (int p = 0; p < pixels; p += 16) {
            quad sum[4][4] = {{{0}}};
            for (int d = 0; d < depth; d++) {
                const quad weights = *(const quad *)(w + 4 * d);
                for (int v = 0; v < 4; v++) {
                    const quad pixel = *(const quad *)(x + (long)d * pixels + p + 4 * v);
                    for (int i = 0; i < 4; i++)
                        sum[i][v] += pixel * weights[i];
                }
            }
            for (int i = 0; i < 4; i++)
                memcpy(y + (long)(f + i) * pixels + p, sum[i], sizeof sum[i]);
        }
}

/* One group's windows, [channel, tap][pixel]. */
static void im2col(const float *x, float *columns, int channels, int kernel, int stride, int dilation,
                   int padding, int height, int width, int pixels)
{
    const int wide = (width + stride - 1) / stride, high = (height + stride - 1) / stride;
    for (int c = 0; c < channels; c++, x += height * width)
        for (int tap = 0; tap < kernel * kernel; tap++, columns += pixels)
            for (int i = 0; i < high; i++) {
                const int row = i * stride + tap / kernel * dilation - padding;
                const int first = tap % kernel * dilation - padding;
                for (int j = 0; j < wide; j++) {
                    const int column = first + j * stride;
                    const int inside = row >= 0 && row < height && column >= 0 && column < width;
                    columns[i * wide + j] = inside ? x[row * width + column] : 0;
                }
            }
}

int main(void)
{
    int n, c_in, c_out, groups, kernel, stride, dilation, padding, height, width;
    while (scanf("%d %d %d %d %d %d %d %d %d %d", &n, &c_in, &c_out, &groups, &kernel, &stride, &dilation,
                 &padding, &height, &width) == 10) {
        const int pixels = ((height + stride - 1) / stride * ((width + stride - 1) / stride) + 15) & ~15;
        const int channels = c_in / groups, filters = (c_out / groups + 3) & ~3;
        const int depth = channels * kernel * kernel;
        float *x = calloc((size_t)c_in * height * width, 4), *columns = calloc((size_t)depth * pixels, 4);
        float *w = calloc((size_t)groups * filters * depth, 4);
        float *y = calloc((size_t)groups * filters * pixels, 4);
        while (n--)
            for (int g = 0; g < groups; g++) {
                const float *source = x + (long)g * channels * height * width;
                const int windows = kernel == 1 && stride == 1 && height * width == pixels; /* already */
                if (!windows)
                    im2col(source, columns, channels, kernel, stride, dilation, padding, height, width,
                           pixels);
                multiply(windows ? source : columns, w + (long)g * filters * depth,
                         y + (long)g * filters * pixels, depth, filters, pixels);
            }
        free(x), free(columns), free(w), free(y);
    }
    return 0;
}
