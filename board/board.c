/* --------------------------------------------------------------------------- what a board does otherwise */

/* One task: a step of binary_cpu.c, in which signs are packed by a task of their own, SIGNS, and the
   masks of a convolution and the borders of a pool are made in the arena, at `tables`, when they are needed. */
struct task {
    struct step step;
    int32_t dilation;   /* BINARY */
    int32_t first, end; /* SIGNS: the bytes of 8 channels that are packed */
    int32_t tables;     /* in floats */
};

enum { SIGNS = LINEAR + 1 };

/* masks [tap][pixel], 0xff where a tap lies inside the image; valid [pixel], the weights inside. */
static void make_masks(const struct step *step, int32_t dilation, uint8_t *masks, int16_t *valid)
{
    const int32_t plane = padded(step->height_out * step->width_out), k = step->kernel;
    const int16_t channels = (int16_t)(step->channels_in / step->groups);
    memset(masks, 0, (size_t)(k * k * plane));
    memset(valid, 0, (size_t)plane * sizeof *valid);
    for (int32_t tap = 0; tap < k * k; tap++, masks += plane)
        for (int32_t y = 0; y < step->height_out; y++) {
            const int32_t row = y * step->stride + tap / k * dilation - step->padding;
            if (row < 0 || row >= step->height_in)
                continue;
            for (int32_t x = 0, p = y * step->width_out; x < step->width_out; x++, p++) {
                const int32_t column = x * step->stride + tap % k * dilation - step->padding;
                if (column >= 0 && column < step->width_in) {
                    masks[p] = 0xff;
                    valid[p] = (int16_t)(valid[p] + channels);
                }
            }
        }
}

/* weight [column of the window][pixel], whether it is inside: a factor for an average, a limit for a maximum;
   scale [pixel], of an average: 1 / the window's pixels inside. */
static void make_borders(const struct step *step, float *weight, float *scale)
{
    const int32_t plane = padded(step->height_in * step->width_in), k = step->kernel;
    for (int32_t y = 0, p = 0; p < plane; y++)
        for (int32_t x = 0; x < step->width_in && p < plane; x++, p++) {
            int32_t rows = 0, columns = 0;
            for (int32_t i = 0; i < k; i++) {
                const int32_t row = y + i - step->padding, column = x + i - step->padding;
                const int inside =
                    p < step->height_in * step->width_in && column >= 0 && column < step->width_in;
                rows += row >= 0 && row < step->height_in;
                columns += inside;
                weight[i * plane + p] = step->average ? (float)inside : inside ? INFINITY : -INFINITY;
            }
            if (step->average)
                scale[p] = rows * columns > 0 ? 1.0f / (float)(rows * columns) : 1.0f;
        }
}

static void run_task(const struct task *t, float *arena)
{
    struct step step = t->step;
    float *own = arena + step.scratch, *tables = arena + t->tables;
    switch (step.op) {
    case SIGNS: pack_signs(&step, arena, own, t->first, t->end); break;
    case BINARY: {
        const int32_t plane = padded(step.height_out * step.width_out);
        int16_t *valid = (int16_t *)(void *)tables;
        uint8_t *masks = (uint8_t *)(valid + plane);
        make_masks(&step, t->dilation, masks, valid);
        step.masks = masks;
        step.valid = valid;
        convolve_packed(&step, arena, own, 0, INT32_MAX);
        break;
    }
    case FLOAT:
        convolve_float(&step, arena, own, 0, step.groups * ((step.channels_out / step.groups + 3) / 4));
        break;
    case POOL: {
        float *scale = tables + step.kernel * padded(step.height_in * step.width_in);
        make_borders(&step, tables, scale);
        step.weight = tables;
        step.scale = scale;
        pool(&step, arena, own, 0, step.channels_in);
        break;
    }
    default: classify(&step, arena, own, 0, 1);
    }
}
