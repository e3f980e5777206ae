/* A grouped convolution, its data gradient and its weight gradient, of one group at a time.

   Planes.  What is convolved lies in padded planes in scratch memory: `rows` lines of `pitch` numbers, with
   lines of zeros above and below and columns of zeros between one line and the next. A tap of the kernel is
   then a load at a constant offset. With a stride of (s, t) an image has s * t planes, its phases: of the
   lines that are a modulo s and the columns that are b modulo t. That makes every tap a constant offset
   again. Input planes lie [channel][phase][image], the planes of the result's gradient [filter][image], all
   of the same size, for the `images` that are convolved at once.

   Vectors.  The result is computed in vectors of LANES numbers of a plane: whole planes in one go
   (`line` == pitch, columns between the lines are computed for nothing), or line by line where that takes
   no more vectors. Vector v begins in the planes at start[v], and is written to v * LANES of the result:
   there, an image takes `image` numbers and its line i begins at i * line.

     plan_convolution(&plan, &shape, ...)      the layout, once a call; free_plan(&plan) at its end
     fill_plane, clear_planes                  numbers into planes
     pack_weights, pack_transposed             the weights of a group, as the next two read them
     convolve(...)                             [filter][vector] of results; forward, and the data gradient of a
                                               phase, which differ in `terms`, offsets and weights
     correlate(...)                            the weight gradient, as a vector of partial sums a weight */

struct shape {
    int64_t n, channels_in, channels_out, groups;
    int64_t height_in, width_in, height_out, width_out;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
};

struct phase {
    int64_t taps;     /* of the kernel, that read this phase */
    int32_t *tap;     /* which ones: [taps] */
    int32_t *offset;  /* from a pixel of the result to what the tap reads: [taps] */
    int32_t *reverse; /* of the data gradient: [filter][taps] */
};

struct plan {
    struct shape shape;
    int64_t cin, cout, taps; /* of a group; taps of the kernel */
    int64_t rows, pitch;     /* lines of a plane without the zeros around, and from line to line */
    int64_t origin, plane;   /* where pixel (0, 0) lies in a plane; numbers of a plane */
    int64_t phases, images;
    int64_t line, image, vectors; /* of the result: see above; vectors of `images` images */
    int32_t *start;               /* [vectors] */
    int32_t *offset;              /* [channel][tap], forward and weight gradient */
    struct phase *phase;
    void *memory; /* of all these arrays */
};

static inline int64_t floor_divided(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

/* Sizes of blocks: filters, and by them the largest number of vectors (convolve) or taps (correlate) whose
   sums fit the registers. */
enum { MOST_FILTERS = 6, MOST_VECTORS = 12 };

static inline int64_t filter_block(int64_t left)
{
    return left >= 12 || left == 6 ? 6 : left >= 8 || left == 4 ? 4 : left >= 5 || left == 3 ? 3 : left;
}

/* Returns 0, or -1 where there is no memory. */
static int plan_convolution(struct plan *plan, const struct shape *shape)
{
    memset(plan, 0, sizeof *plan);
    plan->shape = *shape;
    plan->cin = shape->channels_in / shape->groups;
    plan->cout = shape->channels_out / shape->groups;
    plan->taps = shape->kernel[0] * shape->kernel[1];
    plan->phases = shape->stride[0] * shape->stride[1];
    const int64_t in[2] = {shape->height_in, shape->width_in}, out[2] = {shape->height_out, shape->width_out};
    int64_t size[2], margin[2];
    for (int i = 0; i < 2; i++) {
        const int64_t last = (shape->kernel[i] - 1) * shape->dilation[i] - shape->padding[i];
        const int64_t before = -floor_divided(-shape->padding[i], shape->stride[i]);
        const int64_t after = floor_divided(last, shape->stride[i]);
        size[i] = most(out[i], (in[i] + shape->stride[i] - 1) / shape->stride[i]);
        margin[i] = most(most(before, after), 0);
    }
    plan->rows = size[0];
    const int64_t columns = size[1], in_line = rounded_up(columns, LANES);
    const int64_t whole = ((plan->rows - 1) * (columns + margin[1]) + columns + LANES - 1) / LANES;
    const int64_t by_lines = plan->rows * in_line / LANES;
    plan->pitch = columns + margin[1];
    plan->line = plan->pitch;
    int64_t of_image = whole;
    if (by_lines <= whole) {
        of_image = by_lines;
        plan->pitch = most(plan->pitch, in_line);
        plan->line = in_line;
    }
    plan->image = of_image * LANES;
    plan->origin = rounded_up(margin[0] * plan->pitch + margin[1], LANES);
    plan->plane =
        rounded_up(plan->origin + (plan->rows + margin[0]) * plan->pitch + margin[1] + 2 * LANES, LANES);
    plan->images = most(1, least(shape->n, 32 / of_image));
    plan->vectors = plan->images * of_image;

    const int64_t terms = plan->cin * plan->taps;
    const size_t bytes = sizeof(struct phase) * plan->phases +
                         sizeof(int32_t) * (plan->vectors + terms + plan->taps * (2 + plan->cout));
    if (by_lines <= whole && plan->line == out[1] && plan->line == in[1] && of_image >= 16) {
        plan->images = 1; /* results go straight to their tensor */
        plan->vectors = of_image;
    }
    if (plan->phases * plan->plane * plan->images * most(plan->cin, plan->cout) > INT32_MAX)
        return -1;
    if (!(plan->memory = malloc(bytes)))
        return -1;
    plan->phase = plan->memory;
    int32_t *next = plan->start = (int32_t *)(plan->phase + plan->phases);
    for (int64_t i = 0; i < plan->images; i++)
        for (int64_t v = 0; v < of_image; v++) {
            const int64_t position = plan->line == plan->pitch
                                         ? v * LANES
                                         : v / (in_line / LANES) * plan->pitch + v % (in_line / LANES) * LANES;
            *next++ = (int32_t)(i * plan->plane + plan->origin + position);
        }
    plan->offset = next;
    next += terms;
    for (int64_t p = 0; p < plan->phases; p++) {
        struct phase *phase = &plan->phase[p];
        phase->taps = 0;
        for (int pass = 0; pass < 2; pass++) { /* the first one counts */
            int64_t found = 0;
            for (int64_t tap = 0; tap < plan->taps; tap++) {
                const int64_t dy = tap / shape->kernel[1] * shape->dilation[0] - shape->padding[0];
                const int64_t dx = tap % shape->kernel[1] * shape->dilation[1] - shape->padding[1];
                const int64_t row = floor_divided(dy, shape->stride[0]);
                const int64_t column = floor_divided(dx, shape->stride[1]);
                const int64_t of =
                    (dy - row * shape->stride[0]) * shape->stride[1] + dx - column * shape->stride[1];
                if (of != p)
                    continue;
                if (pass) {
                    const int64_t shift = row * plan->pitch + column;
                    phase->tap[found] = (int32_t)tap;
                    phase->offset[found] = (int32_t)shift;
                    for (int64_t c = 0; c < plan->cin; c++)
                        plan->offset[c * plan->taps + tap] =
                            (int32_t)((c * plan->phases + p) * plan->images * plan->plane + shift);
                    for (int64_t f = 0; f < plan->cout; f++)
                        phase->reverse[f * phase->taps + found] =
                            (int32_t)(f * plan->images * plan->plane - shift);
                }
                found++;
            }
            if (!pass) {
                phase->taps = found;
                phase->tap = next;
                phase->offset = next + found;
                phase->reverse = next + 2 * found;
                next += (2 + plan->cout) * found;
            }
        }
    }
    return 0;
}

static void free_plan(struct plan *plan) { free(plan->memory); }

/* How many numbers the planes of `channels` take, with room to read beyond them. */
static inline int64_t planes_size(const struct plan *plan, int64_t channels, int64_t phases)
{
    return channels * phases * plan->images * plan->plane + 4 * LANES;
}

/* Zeros in planes, before the first fill: a fill leaves the zeros around the pixels as they are. */
static inline void clear_planes(real *planes, const struct plan *plan, int64_t channels, int64_t phases)
{
    memset(planes, 0, planes_size(plan, channels, phases) * sizeof(real));
}

/* Weights (filters, channels, taps) of a group, [block of filters][channel][tap][filter of the block]. */
static void pack_weights(const struct plan *plan, const real *weight, real *packed)
{
    const int64_t terms = plan->cin * plan->taps;
    for (int64_t f = 0, block; f < plan->cout; f += block, packed += terms * block) {
        block = filter_block(plan->cout - f);
        for (int64_t i = 0; i < block; i++)
            for (int64_t t = 0; t < terms; t++)
                packed[t * block + i] = weight[(f + i) * terms + t];
    }
}

/* The same weights for the data gradient of a phase: [block of channels][filter][tap][channel of the block].
   Takes cin * cout * phase->taps numbers. */
static void pack_transposed(
    const struct plan *plan, const struct phase *phase, const real *weight, real *packed)
{
    for (int64_t c = 0, block; c < plan->cin; c += block) {
        block = filter_block(plan->cin - c);
        for (int64_t f = 0; f < plan->cout; f++)
            for (int64_t t = 0; t < phase->taps; t++)
                for (int64_t i = 0; i < block; i++)
                    *packed++ = weight[(f * plan->cin + c + i) * plan->taps + phase->tap[t]];
    }
}

typedef void convolve_block(
    const real *in,
    const int32_t *start,
    const int32_t *offset,
    int64_t terms,
    const real *weight,
    real *out,
    int64_t out_stride);

INLINE void convolve_body(
    const int F,
    const int V,
    const real *in,
    const int32_t *start,
    const int32_t *offset,
    int64_t terms,
    const real *weight,
    real *out,
    int64_t out_stride)
{
    const real *from[MOST_VECTORS];
    vec sums[MOST_FILTERS][MOST_VECTORS];
    UNROLL for (int v = 0; v < V; v++)
    {
        from[v] = in + start[v];
        UNROLL for (int f = 0; f < F; f++) sums[f][v] = splat(0);
    }
    for (int64_t t = 0; t < terms; t++, weight += F) {
        const int64_t shift = offset[t];
        vec inputs[MOST_VECTORS];
        UNROLL for (int v = 0; v < V; v++) inputs[v] = load(from[v] + shift);
        UNROLL for (int f = 0; f < F; f++)
        {
            const vec factor = splat(weight[f]);
            UNROLL for (int v = 0; v < V; v++) sums[f][v] = fma(inputs[v], factor, sums[f][v]);
        }
    }
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int v = 0; v < V; v++) store(out + f * out_stride + v * LANES, sums[f][v]);
}

#define CONVOLVE(F, V)                                                                                       \
    static void convolve_##F##_##V(                                                                          \
        const real *in, const int32_t *start, const int32_t *offset, int64_t terms, const real *weight,      \
        real *out, int64_t out_stride)                                                                       \
    {                                                                                                        \
        convolve_body(F, V, in, start, offset, terms, weight, out, out_stride);                              \
    }

struct convolve_size {
    int64_t vectors;
    convolve_block *run;
};

/* By filters, the sizes of blocks from the largest on; the last one is 1. */
#if REGISTERS == 32
CONVOLVE(1, 12) CONVOLVE(1, 6) CONVOLVE(1, 3) CONVOLVE(1, 1)
CONVOLVE(2, 12) CONVOLVE(2, 6) CONVOLVE(2, 3) CONVOLVE(2, 1)
CONVOLVE(3, 8) CONVOLVE(3, 4) CONVOLVE(3, 2) CONVOLVE(3, 1)
CONVOLVE(4, 6) CONVOLVE(4, 3) CONVOLVE(4, 2) CONVOLVE(4, 1)
CONVOLVE(6, 4) CONVOLVE(6, 3) CONVOLVE(6, 2) CONVOLVE(6, 1)
static const struct convolve_size convolve_sizes[MOST_FILTERS + 1][4] = {
    [1] = {{12, convolve_1_12}, {6, convolve_1_6}, {3, convolve_1_3}, {1, convolve_1_1}},
    [2] = {{12, convolve_2_12}, {6, convolve_2_6}, {3, convolve_2_3}, {1, convolve_2_1}},
    [3] = {{8, convolve_3_8}, {4, convolve_3_4}, {2, convolve_3_2}, {1, convolve_3_1}},
    [4] = {{6, convolve_4_6}, {3, convolve_4_3}, {2, convolve_4_2}, {1, convolve_4_1}},
    [6] = {{4, convolve_6_4}, {3, convolve_6_3}, {2, convolve_6_2}, {1, convolve_6_1}}};
#else
CONVOLVE(1, 8) CONVOLVE(1, 4) CONVOLVE(1, 2) CONVOLVE(1, 1)
CONVOLVE(2, 6) CONVOLVE(2, 3) CONVOLVE(2, 2) CONVOLVE(2, 1)
CONVOLVE(3, 4) CONVOLVE(3, 3) CONVOLVE(3, 2) CONVOLVE(3, 1)
CONVOLVE(4, 3) CONVOLVE(4, 2) CONVOLVE(4, 1)
CONVOLVE(6, 2) CONVOLVE(6, 1)
static const struct convolve_size convolve_sizes[MOST_FILTERS + 1][4] = {
    [1] = {{8, convolve_1_8}, {4, convolve_1_4}, {2, convolve_1_2}, {1, convolve_1_1}},
    [2] = {{6, convolve_2_6}, {3, convolve_2_3}, {2, convolve_2_2}, {1, convolve_2_1}},
    [3] = {{4, convolve_3_4}, {3, convolve_3_3}, {2, convolve_3_2}, {1, convolve_3_1}},
    [4] = {{3, convolve_4_3}, {2, convolve_4_2}, {1, convolve_4_1}},
    [6] = {{2, convolve_6_2}, {1, convolve_6_1}}};
#endif

/* out[f * out_stride + v * LANES + lane] = sum over terms of weight[f][term] * in[start[v] + offset[term] +
   lane] of `filters` filters, whose weights are packed in blocks of filter_block(). */
static void convolve(
    const real *in,
    const int32_t *start,
    int64_t vectors,
    const int32_t *offset,
    int64_t terms,
    const real *weight,
    int64_t filters,
    real *out,
    int64_t out_stride)
{
    const int64_t first = filter_block(filters);
    const struct convolve_size *size = convolve_sizes[first];
    for (int64_t v = 0; v < vectors; v += size->vectors) {
        while (size->vectors > vectors - v)
            size++;
        int64_t f = 0;
        for (int64_t block; f < filters; f += block) {
            block = filter_block(filters - f);
            int64_t done = 0; /* of the vectors: another block of filters may take fewer at once */
            for (const struct convolve_size *part = convolve_sizes[block]; done < size->vectors;
                 done += part->vectors) {
                while (part->vectors > size->vectors - done)
                    part++;
                part->run(
                    in, start + v + done, offset, terms, weight + f * terms,
                    out + f * out_stride + (v + done) * LANES, out_stride);
            }
        }
    }
}

typedef void correlate_block(
    const real *grad,
    int64_t grad_stride,
    const real *in,
    const int32_t *start,
    int64_t vectors,
    const int32_t *offset,
    real *sums,
    int64_t sums_stride);

INLINE void correlate_body(
    const int F,
    const int T,
    const real *grad,
    int64_t grad_stride,
    const real *in,
    const int32_t *start,
    int64_t vectors,
    const int32_t *offset,
    real *sums,
    int64_t sums_stride)
{
    const real *from[MOST_VECTORS];
    vec total[MOST_FILTERS][MOST_VECTORS];
    UNROLL for (int t = 0; t < T; t++)
    {
        from[t] = in + offset[t];
        UNROLL for (int f = 0; f < F; f++) total[f][t] = splat(0);
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t at = start[v];
        vec factor[MOST_FILTERS];
        UNROLL for (int f = 0; f < F; f++) factor[f] = load(grad + f * grad_stride + at);
        UNROLL for (int t = 0; t < T; t++)
        {
            const vec input = load(from[t] + at);
            UNROLL for (int f = 0; f < F; f++) total[f][t] = fma(input, factor[f], total[f][t]);
        }
    }
    UNROLL for (int f = 0; f < F; f++)
        UNROLL for (int t = 0; t < T; t++)
        {
            real *to = sums + f * sums_stride + t * LANES;
            store(to, load(to) + total[f][t]);
        }
}

#define CORRELATE(F, T)                                                                                      \
    static void correlate_##F##_##T(                                                                         \
        const real *grad, int64_t grad_stride, const real *in, const int32_t *start, int64_t vectors,        \
        const int32_t *offset, real *sums, int64_t sums_stride)                                              \
    {                                                                                                        \
        correlate_body(F, T, grad, grad_stride, in, start, vectors, offset, sums, sums_stride);              \
    }

struct correlate_size {
    int64_t taps;
    correlate_block *run;
};

/* As convolve_sizes; 9 and 25 taps divide by 3 and 5. */
#if REGISTERS == 32
CORRELATE(1, 9) CORRELATE(1, 5) CORRELATE(1, 3) CORRELATE(1, 1)
CORRELATE(2, 9) CORRELATE(2, 5) CORRELATE(2, 3) CORRELATE(2, 1)
CORRELATE(3, 7) CORRELATE(3, 5) CORRELATE(3, 3) CORRELATE(3, 1)
CORRELATE(4, 6) CORRELATE(4, 5) CORRELATE(4, 3) CORRELATE(4, 1)
CORRELATE(6, 4) CORRELATE(6, 3) CORRELATE(6, 2) CORRELATE(6, 1)
static const struct correlate_size correlate_sizes[MOST_FILTERS + 1][4] = {
    [1] = {{9, correlate_1_9}, {5, correlate_1_5}, {3, correlate_1_3}, {1, correlate_1_1}},
    [2] = {{9, correlate_2_9}, {5, correlate_2_5}, {3, correlate_2_3}, {1, correlate_2_1}},
    [3] = {{7, correlate_3_7}, {5, correlate_3_5}, {3, correlate_3_3}, {1, correlate_3_1}},
    [4] = {{6, correlate_4_6}, {5, correlate_4_5}, {3, correlate_4_3}, {1, correlate_4_1}},
    [6] = {{4, correlate_6_4}, {3, correlate_6_3}, {2, correlate_6_2}, {1, correlate_6_1}}};
#else
CORRELATE(1, 9) CORRELATE(1, 5) CORRELATE(1, 3) CORRELATE(1, 1)
CORRELATE(2, 6) CORRELATE(2, 5) CORRELATE(2, 3) CORRELATE(2, 1)
CORRELATE(3, 4) CORRELATE(3, 3) CORRELATE(3, 2) CORRELATE(3, 1)
CORRELATE(4, 3) CORRELATE(4, 2) CORRELATE(4, 1)
CORRELATE(6, 2) CORRELATE(6, 1)
static const struct correlate_size correlate_sizes[MOST_FILTERS + 1][4] = {
    [1] = {{9, correlate_1_9}, {5, correlate_1_5}, {3, correlate_1_3}, {1, correlate_1_1}},
    [2] = {{6, correlate_2_6}, {5, correlate_2_5}, {3, correlate_2_3}, {1, correlate_2_1}},
    [3] = {{4, correlate_3_4}, {3, correlate_3_3}, {2, correlate_3_2}, {1, correlate_3_1}},
    [4] = {{3, correlate_4_3}, {2, correlate_4_2}, {1, correlate_4_1}},
    [6] = {{2, correlate_6_2}, {1, correlate_6_1}}};
#endif

/* sums[f][term] (LANES partial sums each) += grad[f * grad_stride + start[v] + lane] * in[start[v] +
   offset[term] + lane] over all vectors v and lanes. */
static void correlate(
    const real *grad,
    int64_t grad_stride,
    int64_t filters,
    const real *in,
    const int32_t *start,
    int64_t vectors,
    const int32_t *offset,
    int64_t terms,
    real *sums)
{
    for (int64_t f = 0, block; f < filters; f += block) {
        block = filter_block(filters - f);
        const struct correlate_size *size = correlate_sizes[block];
        for (int64_t t = 0; t < terms; t += size->taps) {
            while (size->taps > terms - t)
                size++;
            size->run(
                grad + f * grad_stride, grad_stride, in, start, vectors, offset + t,
                sums + (f * terms + t) * LANES, terms * LANES);
        }
    }
}

/* Write one line of an image, `width` numbers, to its place in the planes of its channel. `planes` is where
   the first phase of the channel and the image begins. Lines must come in order: the zeros after a line may
   reach into the next one. */
INLINE void fill_line(const struct plan *plan, real *planes, int64_t row, const real *line, int64_t width)
{
    const int64_t *stride = plan->shape.stride, across = stride[1];
    real *to = planes + row % stride[0] * across * plan->images * plan->plane + plan->origin +
               row / stride[0] * plan->pitch;
    if (across == 1) {
        int64_t x = 0;
        for (; x + LANES <= width; x += LANES)
            store(to + x, load(line + x));
        if (x < width)
            store(to + x, load_part(line + x, width - x));
        return;
    }
    for (int64_t b = 0; b < across; b++, to += plan->images * plan->plane)
        for (int64_t x = 0; x * across + b < width; x++)
            to[x] = line[x * across + b];
}
