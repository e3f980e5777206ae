/* --------------------------------------------------------------------------- what a board does otherwise */

/* One step of the network: binary_cpu.c's unit, in which signs are packed by a task of their own, SIGNS, and the
   masks of a convolution and the borders of a pool are made in the arena, at `tables`, when they are needed. */
struct task {
    struct unit unit;
    int32_t dilation;   /* BINARY */
    int32_t first, end; /* SIGNS: the bytes of 8 channels that are packed */
    int32_t tables;     /* in floats */
};

enum { SIGNS = LINEAR + 1 };

/* masks [tap][pixel], 0xff where a tap lies inside the image; valid [pixel], the weights inside. */
static void make_masks(const struct unit *u, int32_t dilation, uint8_t *masks, int16_t *valid)
{
    const int32_t plane = padded(u->height_out * u->width_out), k = u->kernel;
    const int16_t channels = (int16_t)(u->channels_in / u->groups);
    memset(masks, 0, (size_t)(k * k * plane));
    memset(valid, 0, (size_t)plane * sizeof *valid);
    for (int32_t tap = 0; tap < k * k; tap++, masks += plane)
        for (int32_t y = 0; y < u->height_out; y++) {
            const int32_t row = y * u->stride + tap / k * dilation - u->padding;
            if (row < 0 || row >= u->height_in)
                continue;
            for (int32_t x = 0, p = y * u->width_out; x < u->width_out; x++, p++) {
                const int32_t column = x * u->stride + tap % k * dilation - u->padding;
                if (column >= 0 && column < u->width_in) {
                    masks[p] = 0xff;
                    valid[p] = (int16_t)(valid[p] + channels);
                }
            }
        }
}

/* weight [column of the window][pixel], whether it is inside: a factor for an average, a limit for a maximum;
   scale [pixel], of an average: 1 / the window's pixels inside. */
static void make_borders(const struct unit *u, float *weight, float *scale)
{
    const int32_t plane = padded(u->height_in * u->width_in), k = u->kernel;
    for (int32_t y = 0, p = 0; p < plane; y++)
        for (int32_t x = 0; x < u->width_in && p < plane; x++, p++) {
            int32_t rows = 0, columns = 0;
            for (int32_t i = 0; i < k; i++) {
                const int32_t row = y + i - u->padding, column = x + i - u->padding;
                const int inside = p < u->height_in * u->width_in && column >= 0 && column < u->width_in;
                rows += row >= 0 && row < u->height_in;
                columns += inside;
                weight[i * plane + p] = u->flag ? (float)inside : inside ? INFINITY : -INFINITY;
            }
            if (u->flag)
                scale[p] = rows * columns > 0 ? 1.0f / (float)(rows * columns) : 1.0f;
        }
}

static void run_task(const struct task *t, float *arena)
{
    struct unit u = t->unit;
    float *own = arena + u.scratch, *tables = arena + t->tables;
    switch (u.op) {
    case SIGNS: pack_signs(&u, arena, own, t->first, t->end); break;
    case BINARY: {
        const int32_t plane = padded(u.height_out * u.width_out);
        int16_t *valid = (int16_t *)(void *)tables;
        uint8_t *masks = (uint8_t *)(valid + plane);
        make_masks(&u, t->dilation, masks, valid);
        u.masks = masks;
        u.valid = valid;
        convolve_packed(&u, arena, own, 0, INT32_MAX);
        break;
    }
    case FLOAT:
        convolve_float(&u, arena, own, 0, u.groups * ((u.channels_out / u.groups + 3) / 4));
        break;
    case POOL: {
        float *scale = tables + u.kernel * padded(u.height_in * u.width_in);
        make_borders(&u, tables, scale);
        u.weight = tables;
        u.scale = scale;
        pool(&u, arena, own, 0, u.channels_in);
        break;
    }
    default: classify(&u, arena, own, 0, 1);
    }
}
