/* A cell of the supernet after its preprocessing, forward and backward: see model_search.SearchCell.

   States.  0 and 1 are the cell's inputs, 2 to 5 its nodes, which are the result, one after another along the
   channels. Of a state's channels the first c, c = channels / k, go through the operations of the m edges that
   leave it; the others bypass them. Channel j * k + g of a node is the shuffled channel g * c + j.

   Sources.  States 0 to 4. A source keeps, for each image, `planes` planes of the size of the result: the
   results of its convolutions, [kind][edge][channel]; its maximum and its average pool, [channel] each; and at
   stride 2 the 2x2 averages that are its residual. BN has no weights, so a node is a sum of planes with a
   factor each, plus a constant; and the gradient of a convolution's result is a sum of two planes and a
   constant.

   Visits.  The statistics of a BN are of the whole batch, so the batch is visited state after state: a visit
   computes node t - 2 and at once the convolutions and pools of source t. Backward, a visit computes the
   gradient of state t and at once the sums over pixels that the sources before it need. Sums are taken image by
   image, or, of weights, in chunks of images that depend on the shape alone, then in order: the result is the
   same for any number of threads.

   Planes and vectors are as in convolution.h, but that the terms of a convolution are sorted by the line that
   they read: vectors of lines r0 to r1 then skip the terms that read only zeros above or below the image. */

enum { SOURCES = 5, NODES = 4, EDGES = 14, KINDS = 4, OPERATIONS = 7, MARGIN = 4, MOST_BANKS = KINDS + 8 };
enum { SKIP, MAX_POOL, AVG_POOL, FIRST_CONVOLUTION }; /* of an edge's operations */
enum { MOST_IMAGES = 16, GRADIENTS_CACHED = 1 << 19 };

static const int64_t edges_of[SOURCES] = {4, 4, 3, 2, 1}, edge_from[SOURCES] = {0, 4, 8, 11, 13};
static const struct {
    int64_t size, padding, dilation;
} kind_shape[KINDS] = {{3, 1, 1}, {5, 2, 1}, {3, 2, 2}, {5, 4, 2}};

struct cell {
    int64_t n, channels, k, stride; /* stride: of what is read from states 0 and 1 */
    int64_t height, width, height_out, width_out, training, threads;
    double eps;
    const real *state[2];
    int64_t state_image[2];                  /* from an image of theirs to the next */
    const real *edges, *operations;          /* (14,) and (14, 7), source by source */
    const real *weight[SOURCES][KINDS + 2];  /* the last two: halves of the factorised reduction, at stride 2 */
    const real *mean, *var;                  /* running, if not training */
    real *statistics;                        /* (3, all): mean, 1 / std, unbiased variance; by source: planes
                                                but for the residual's */
    real *kept;                              /* by source: (n, planes, height_out, width_out) */
    real *out;
    const real *grad; /* of out; from here on for the backward pass; NULL: not wanted */
    real *grad_state[2], *grad_weight[SOURCES][KINDS + 2];
    real *grad_edges, *grad_operations;
};

struct terms {
    int64_t count;
    int32_t *offset, *index;       /* where in the planes; which of a filter's weights */
    int32_t from[2 * MARGIN + 2];  /* the first term that reads line i - MARGIN or a later one */
};

/* Planes of one source: `phases` for each channel, [channel][phase][image]. */
struct field {
    int64_t stride, phases, channels, images;
    int64_t rows, columns, across /* vectors of a line */, vectors /* of an image */;
    int64_t pitch, origin, plane;
    int32_t *start, pool[9];
    struct terms terms[KINDS + 2];
    void *memory;
};

/* Filters that read the same terms. */
struct bank {
    const real *weight;
    real *grad;
    int64_t filters, first; /* plane of the first filter */
    const struct terms *terms;
};

struct source {
    int64_t index, stride, edges, kinds, filters, planes, banks; /* filters: all convolutions' */
    int64_t first;                                               /* of its planes in the statistics */
    real *kept;
    struct bank bank[MOST_BANKS];
};

struct cell_run {
    const struct cell *c;
    int64_t sampled, pixels_in, pixels, all /* planes with statistics */, chunks, failed;
    struct source source[SOURCES];
    real *pooled[2];       /* at stride 2: the channels of an input that bypass, (n, channels - c, pixels) */
    real *counts;          /* [pixel of the result]: how many pixels its 3x3 window holds */
    struct moments *parts; /* [image][plane] of one source */
    int64_t visit;
    struct field field;    /* of the source that is visited */
    real *packed;
    /* backward */
    real *grad_nodes;                  /* of nodes 0 to 2: (n, 3 * channels, pixels) */
    double *sums;                      /* [image][edge][channel][SUMS] */
    double *bypassed;                  /* [image][edge]: node's gradient times what bypasses */
    real *by_grad, *by_plane, *offset; /* of one source, [plane]: see prepare_source */
    struct terms reverse[4];           /* of one source, by phase */
    real *reversed[4];                 /* its weights, as these are read */
    real *partial_weight;              /* [chunk][weights of one source] */
};

enum { OF_GRAD, OF_KIND, OF_MAX = OF_KIND + KINDS + 1, OF_AVG, OF_RESIDUAL, SUMS };

INLINE int64_t first_node(int64_t source) { return source < 2 ? 0 : source - 1; }

static int plan_field(struct field *field, int64_t channels, int64_t stride, int64_t rows, int64_t columns, int64_t images)
{
    *field = (struct field){.stride = stride, .phases = stride * stride, .channels = channels, .images = images};
    field->rows = rows;
    field->columns = columns;
    field->across = (columns + LANES - 1) / LANES;
    field->vectors = rows * field->across;
    const int64_t margin = MARGIN / stride;
    field->pitch = most(columns + margin, field->across * LANES);
    field->origin = rounded_up(margin * field->pitch + margin, LANES);
    field->plane = rounded_up((rows + margin) * field->pitch, LANES);
    int64_t terms = 2 * channels;
    for (int p = 0; p < KINDS; p++)
        terms += channels * kind_shape[p].size * kind_shape[p].size;
    if (!(field->memory = malloc(sizeof(int32_t) * (field->vectors + 2 * terms))))
        return -1;
    int32_t *next = field->start = field->memory;
    for (int64_t v = 0; v < field->vectors; v++)
        *next++ = (int32_t)(field->origin + v / field->across * field->pitch + v % field->across * LANES);
    const int64_t by_phase = images * field->plane, by_channel = field->phases * by_phase;
    for (int p = 0; p < KINDS + 2; p++) {
        struct terms *t = &field->terms[p];
        const int skip = p >= KINDS;
        const int64_t size = skip ? 1 : kind_shape[p].size, padding = skip ? KINDS - p : kind_shape[p].padding;
        const int64_t dilation = skip ? 1 : kind_shape[p].dilation;
        t->offset = next;
        t->index = next + channels * size * size;
        next += 2 * channels * size * size;
        for (int64_t line = -MARGIN; line <= MARGIN; line++) {
            t->from[line + MARGIN] = (int32_t)t->count;
            for (int64_t c = 0; c < channels; c++)
                for (int64_t tap = 0; tap < size * size; tap++) {
                    const int64_t dy = tap / size * dilation - padding, dx = tap % size * dilation - padding;
                    const int64_t row = floor_divided(dy, stride), column = floor_divided(dx, stride);
                    if (row != line)
                        continue;
                    const int64_t phase = (dy - row * stride) * stride + dx - column * stride;
                    t->offset[t->count] =
                        (int32_t)(c * by_channel + phase * by_phase + row * field->pitch + column);
                    t->index[t->count++] = (int32_t)(c * size * size + tap);
                }
        }
        t->from[2 * MARGIN + 1] = (int32_t)t->count;
    }
    for (int64_t tap = 0; tap < 9; tap++) {
        const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
        const int64_t row = floor_divided(dy, stride), column = floor_divided(dx, stride);
        const int64_t phase = (dy - row * stride) * stride + dx - column * stride;
        field->pool[tap] = (int32_t)(phase * by_phase + row * field->pitch + column);
    }
    return 0;
}

INLINE int64_t field_size(const struct field *field, int64_t planes)
{
    return field->origin + planes * field->images * field->plane + (MARGIN + 1) * field->pitch + 4 * LANES;
}

/* out[f * stride + v * LANES] of all vectors of an image; `weight` in blocks of filters, [term][filter]. */
static void convolve_lines(
    const struct field *field, const struct terms *terms, const real *weight, int64_t filters,
    const real *planes, real *out, int64_t stride)
{
    for (int64_t f = 0, block; f < filters; f += block, out += block * stride) {
        block = filter_block(filters - f);
        const struct convolve_size *size = convolve_sizes[block];
        for (int64_t v = 0; v < field->vectors; v += size->vectors) {
            while (size->vectors > field->vectors - v)
                size++;
            const int64_t r0 = v / field->across, r1 = (v + size->vectors - 1) / field->across;
            const int64_t from = terms->from[most(-MARGIN, -r1) + MARGIN];
            const int64_t to = terms->from[least(MARGIN, field->rows - 1 - r0) + MARGIN + 1];
            size->run(
                planes, field->start + v, terms->offset + from, to - from, weight + from * block,
                out + v * LANES, stride);
        }
        weight += terms->count * block;
    }
}

/* A plane of an image, (height, width), into the phases of its channel: as it is, or its signs. */
static void fill_phases(
    const struct field *field, const real *x, int64_t height, int64_t width, int signs, real *planes)
{
    const int64_t stride = field->stride;
    for (int64_t i = 0; i < height; i++, x += width) {
        real *to = planes + field->origin + i % stride * stride * field->images * field->plane +
                   i / stride * field->pitch;
        if (stride == 1) {
            for (int64_t j = 0; j < width; j += LANES) {
                const int64_t left = width - j;
                const vec v = load_n(x + j, left);
                store_n(to + j, signs ? sign(v) : v, left);
            }
            continue;
        }
        if (width % (2 * LANES) == 0) {
            real *odd = to + field->images * field->plane;
            for (int64_t j = 0; j < width / 2; j += LANES) {
                const vec a = load(x + 2 * j), b = load(x + 2 * j + LANES);
                const vec first = even_lanes(a, b), second = odd_lanes(a, b);
                store(to + j, signs ? sign(first) : first);
                store(odd + j, signs ? sign(second) : second);
            }
            continue;
        }
        for (int64_t b = 0; b < stride; b++, to += field->images * field->plane)
            for (int64_t j = 0; j * stride + b < width; j++) {
                const real v = x[j * stride + b];
                to[j] = !signs || v != v ? v : v < 0 ? -1 : 1;
            }
    }
}

static int begin_cell(struct cell_run *run, const struct cell *c, int backward)
{
    memset(run, 0, sizeof *run);
    run->c = c;
    run->sampled = c->channels / c->k;
    run->pixels_in = c->height * c->width;
    run->pixels = c->height_out * c->width_out;
    run->chunks = least(c->n, c->n < 128 ? MOST_CHUNKS / 2 : MOST_CHUNKS);
    real *kept = c->kept;
    int64_t most_planes = 0, most_weights = 0;
    for (int64_t s = 0; s < SOURCES; s++) {
        struct source *source = &run->source[s];
        *source = (struct source){.index = s, .stride = s < 2 ? c->stride : 1, .edges = edges_of[s]};
        const int64_t wide = source->edges * run->sampled, half = run->sampled / 2;
        source->kinds = KINDS + (source->stride == 2);
        source->filters = source->kinds * wide;
        source->planes = source->filters + run->sampled * (source->stride == 2 ? 3 : 2);
        source->first = run->all;
        source->kept = kept;
        run->all += source->filters + 2 * run->sampled;
        kept += c->n * source->planes * run->pixels;
        most_planes = most(most_planes, source->planes);
        for (int64_t p = 0; p < KINDS; p++)
            source->bank[source->banks++] =
                (struct bank){c->weight[s][p], c->grad_weight[s][p], wide, p * wide, &run->field.terms[p]};
        for (int64_t e = 0; e < source->edges && source->stride == 2; e++)
            for (int64_t h = 0; h < 2; h++) {
                const int64_t at = e * half * run->sampled;
                real *grad = c->grad_weight[s][KINDS + h];
                source->bank[source->banks++] = (struct bank){
                    c->weight[s][KINDS + h] + at, grad ? grad + at : NULL, half,
                    KINDS * wide + e * run->sampled + h * half, &run->field.terms[KINDS + h]};
            }
        int64_t weights = 0;
        for (int64_t p = 0; p < KINDS; p++)
            weights += wide * run->sampled * kind_shape[p].size * kind_shape[p].size;
        most_weights = most(most_weights, weights + wide * run->sampled);
    }
    const int64_t bypassing = c->stride == 2 ? c->n * (c->channels - run->sampled) * run->pixels : 0;
    int64_t doubles = 2 * c->n * most_planes; /* of struct moments */
    if (backward)
        doubles = c->n * EDGES * (run->sampled * SUMS + 1);
    int64_t numbers = run->pixels + most_weights + 2 * bypassing;
    if (backward) /* `reversed` takes what `packed` does */
        numbers += c->n * 3 * c->channels * run->pixels + 3 * most_planes + run->chunks * most_weights;
    real *next = malloc(sizeof(double) * doubles + sizeof(real) * numbers + sizeof(int32_t) * (backward ? most_weights : 0));
    if (!next)
        return -1;
    run->parts = (struct moments *)next;
    run->sums = (double *)next;
    run->bypassed = run->sums + c->n * EDGES * run->sampled * SUMS;
    next = (real *)(run->sums + doubles);
    run->counts = next;
    run->packed = next += run->pixels;
    next += most_weights;
    run->pooled[0] = next;
    run->pooled[1] = next += bypassing;
    next += bypassing;
    if (backward) {
        run->grad_nodes = next;
        run->by_grad = next += c->n * 3 * c->channels * run->pixels;
        run->by_plane = next += most_planes;
        run->offset = next += most_planes;
        run->partial_weight = next += most_planes;
        run->reverse[0].offset = (int32_t *)(next + run->chunks * most_weights);
    }
    return 0;
}

/* Of the 3x3 windows at a stride: how many pixels each holds. */
static void count_windows(int64_t height, int64_t width, int64_t stride, int64_t rows, int64_t columns, real *counts)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            const int64_t y = i * stride, x = j * stride;
            *counts++ = (real)((least(y + 2, height) - most(y - 1, 0)) * (least(x + 2, width) - most(x - 1, 0)));
        }
}

/* The size of a source's state. */
INLINE int64_t height_of(const struct cell *c, const struct source *s) { return s->index < 2 ? c->height : c->height_out; }
INLINE int64_t width_of(const struct cell *c, const struct source *s) { return s->index < 2 ? c->width : c->width_out; }

static int begin_source(struct cell_run *run, const struct source *s, int64_t images)
{
    const struct cell *c = run->c;
    count_windows(height_of(c, s), width_of(c, s), s->stride, c->height_out, c->width_out, run->counts);
    return plan_field(&run->field, run->sampled, s->stride, c->height_out, c->width_out, images);
}

INLINE const real *state_of(const struct cell_run *run, int64_t state, int64_t image, int64_t channel)
{
    const struct cell *c = run->c;
    return state < 2 ? c->state[state] + image * c->state_image[state] + channel * run->pixels_in
                     : c->out + ((image * NODES + state - 2) * c->channels + channel) * run->pixels;
}

INLINE real *kept_of(const struct cell_run *run, const struct source *s, int64_t image, int64_t plane)
{
    return s->kept + (image * s->planes + plane) * run->pixels;
}

/* What bypasses the operations: a channel of the state, or its 2x2 maxima. */
INLINE const real *bypass_of(const struct cell_run *run, const struct source *s, int64_t image, int64_t channel)
{
    if (s->stride == 1)
        return state_of(run, s->index, image, channel);
    const int64_t others = run->c->channels - run->sampled;
    return run->pooled[s->index] + (image * others + channel - run->sampled) * run->pixels;
}

INLINE const real *residual_plane(const struct cell_run *run, const struct source *s, int64_t image, int64_t j)
{
    return s->stride == 1 ? state_of(run, s->index, image, j)
                          : kept_of(run, s, image, s->filters + 2 * run->sampled + j);
}

/* 2x2 maxima at stride 2, of what a window over an odd edge holds; a NaN wins. `line` takes a line of x. */
static void halve_maximum(const real *x, int64_t height, int64_t width, real *restrict line, real *restrict out)
{
    const int64_t across = (width + 1) / 2;
    for (int64_t i = 0; i < height; i += 2, out += across) {
        const real *upper = x + i * width, *lower = i + 1 < height ? upper + width : upper;
        for (int64_t j = 0; j < width; j++)
            line[j] = (lower[j] <= upper[j]) | (upper[j] != upper[j]) ? upper[j] : lower[j];
        for (int64_t j = 0; j < width / 2; j++) {
            const real a = line[2 * j], b = line[2 * j + 1];
            out[j] = (b <= a) | (a != a) ? a : b;
        }
        if (width & 1)
            out[across - 1] = line[width - 1];
    }
}

/* Write the gradient of halve_maximum: to the first of the largest, row by row. */
static void spread_maximum(
    const real *x, const real *maximum, const real *grad, int64_t height, int64_t width, real *grad_x)
{
    const int64_t across = (width + 1) / 2;
    if (height % 2 == 0 && width % (2 * LANES) == 0) {
        for (int64_t i = 0; i < height / 2; i++, x += 2 * width, grad_x += 2 * width)
            for (int64_t j = 0; j < across; j += LANES) {
                const vec m = load(maximum + i * across + j);
                vec open = load(grad + i * across + j), taken[4], value[4];
                for (int row = 0; row < 2; row++) {
                    const vec a = load(x + row * width + 2 * j), b = load(x + row * width + 2 * j + LANES);
                    value[2 * row] = even_lanes(a, b);
                    value[2 * row + 1] = odd_lanes(a, b);
                }
                for (int q = 0; q < 4; q++) {
                    taken[q] = if_less(value[q], m, splat(0), open);
                    open = if_less(value[q], m, open, splat(0));
                }
                for (int row = 0; row < 2; row++) {
                    real *to = grad_x + row * width + 2 * j;
                    store(to, first_pairs(taken[2 * row], taken[2 * row + 1]));
                    store(to + LANES, last_pairs(taken[2 * row], taken[2 * row + 1]));
                }
            }
        return;
    }
    memset(grad_x, 0, sizeof(real) * height * width);
    for (int64_t i = 0; i < height; i += 2, maximum += across, grad += across)
        for (int64_t j = 0; j < across; j++) {
            const int64_t at = i * width + 2 * j, right = 2 * j + 1 < width, below = i + 1 < height;
            const real m = maximum[j];
            int64_t to = at;
            if (!(x[at] >= m)) {
                if (right && x[at + 1] >= m)
                    to = at + 1;
                else if (below && x[at + width] >= m)
                    to = at + width;
                else if (right && below && x[at + width + 1] >= m)
                    to = at + width + 1;
            }
            grad_x[to] = grad[j];
        }
}

/* out = constant, or out itself, + the sum of factor[i] * plane[i] */
INLINE void add_some(
    const int number, real *out, int64_t count, const real *constant, const real *const *plane, const real *factor)
{
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        if (left >= LANES) {
            vec total = constant ? splat(*constant) : load(out + i);
            UNROLL for (int q = 0; q < number; q++) total = fma(load(plane[q] + i), splat(factor[q]), total);
            store(out + i, total);
        } else {
            vec total = constant ? splat(*constant) : load_part(out + i, left);
            for (int q = 0; q < number; q++)
                total = fma(load_part(plane[q] + i, left), splat(factor[q]), total);
            store_part(out + i, total, left);
        }
    }
}

static void add_planes(
    real *out, int64_t count, real constant, int64_t number, const real *const *plane, const real *factor)
{
    const real *first = &constant;
    do {
        const int64_t some = least(number, 6);
        switch (some) {
        case 0: add_some(0, out, count, first, plane, factor); break;
        case 1: add_some(1, out, count, first, plane, factor); break;
        case 2: add_some(2, out, count, first, plane, factor); break;
        case 3: add_some(3, out, count, first, plane, factor); break;
        case 4: add_some(4, out, count, first, plane, factor); break;
        case 5: add_some(5, out, count, first, plane, factor); break;
        default: add_some(6, out, count, first, plane, factor);
        }
        first = NULL;
        number -= some;
        plane += some;
        factor += some;
    } while (number > 0);
}

/* An edge's factor of a kind of convolution (the last: the factorised reduction), and of the residual. */
INLINE real kind_factor(const real *operations, int64_t kind)
{
    return kind < KINDS ? operations[FIRST_CONVOLUTION + kind] : operations[SKIP];
}

INLINE real residual_factor(const struct source *s, const real *operations)
{
    real factor = s->stride == 1 ? operations[SKIP] : 0;
    for (int64_t p = 0; p < KINDS; p++)
        factor += operations[FIRST_CONVOLUTION + p];
    return factor;
}

INLINE const real *statistic(const struct cell_run *run, const struct source *s, int which)
{
    return run->c->statistics + which * run->all + s->first;
}

/* Node `node` of an image: the sum over its edges of the mixed operations and of what bypasses them. */
static void compute_node(const struct cell_run *run, int64_t node, int64_t image)
{
    const struct cell *c = run->c;
    const int64_t sampled = run->sampled;
    real *out = c->out + (image * NODES + node) * c->channels * run->pixels;
    const real *plane[SOURCES * (KINDS + 4)];
    real factor[SOURCES * (KINDS + 4)];
    for (int64_t j = 0; j < sampled; j++) {
        int64_t number = 0;
        double constant = 0;
        for (int64_t i = 0; i <= node + 1; i++) {
            const struct source *s = &run->source[i];
            const int64_t e = node - first_node(i);
            const real *operations = c->operations + (edge_from[i] + e) * OPERATIONS;
            const real *mean = statistic(run, s, 0), *inverse_std = statistic(run, s, 1);
            for (int64_t p = 0; p < s->kinds + 2; p++) {
                const int64_t pool = p - s->kinds;
                const int64_t at = pool < 0 ? (p * s->edges + e) * sampled + j : s->filters + pool * sampled + j;
                const real by = pool < 0 ? kind_factor(operations, p) : operations[MAX_POOL + pool];
                plane[number] = kept_of(run, s, image, at);
                factor[number] = by * inverse_std[at];
                constant -= (double)factor[number++] * mean[at];
            }
            plane[number] = residual_plane(run, s, image, j);
            factor[number++] = residual_factor(s, operations);
        }
        add_planes(out + j * c->k * run->pixels, run->pixels, (real)constant, number, plane, factor);
    }
    for (int64_t channel = sampled; channel < c->channels; channel++) {
        const int64_t to = channel % sampled * c->k + channel / sampled;
        for (int64_t i = 0; i <= node + 1; i++) {
            plane[i] = bypass_of(run, &run->source[i], image, channel);
            factor[i] = c->edges[edge_from[i] + node - first_node(i)];
        }
        add_planes(out + to * run->pixels, run->pixels, 0, node + 2, plane, factor);
    }
}

/* Both 3x3 pools of a channel, of whose plane two copies lie in phases: for the maximum with -inf around. */
static void pool_channel(
    const struct field *field, const real *for_maximum, const real *for_average, const real *counts,
    real *maximum, real *average)
{
    for (int64_t v = 0; v < field->vectors; v++) {
        const int64_t j = v % field->across * LANES, at = v / field->across * field->columns + j;
        const int64_t left = field->columns - j;
        const real *a = for_maximum + field->start[v], *b = for_average + field->start[v];
        vec m = load(a + field->pool[0]), total = load(b + field->pool[0]);
        UNROLL for (int tap = 1; tap < 9; tap++)
        {
            const vec x = load(a + field->pool[tap]);
            m = if_nan(x, x, if_less(m, x, x, m));
            total = total + load(b + field->pool[tap]);
        }
        store_n(maximum + at, m, left);
        store_n(average + at, total / (left < LANES ? load_part(counts + at, left) : load(counts + at)), left);
    }
}

/* The planes that a source keeps of an image, and their moments. `planes` are signs, and x twice. */
static void visit_source(struct cell_run *run, const struct source *s, int64_t image, real *const *planes, real *aside)
{
    const struct cell *c = run->c;
    const struct field *field = &run->field;
    const int64_t height = height_of(c, s), width = width_of(c, s), sampled = run->sampled;
    const int direct = field->across * LANES == field->columns;
    for (int64_t j = 0; j < sampled; j++) {
        const real *x = state_of(run, s->index, image, j);
        const int64_t at = j * field->phases * field->plane;
        for (int i = 0; i < 3; i++)
            fill_phases(field, x, height, width, i == 0, planes[i] + at);
        pool_channel(
            field, planes[1] + at, planes[2] + at, run->counts, kept_of(run, s, image, s->filters + j),
            kept_of(run, s, image, s->filters + sampled + j));
        if (s->stride == 2)
            halve(x, height, width, kept_of(run, s, image, s->filters + 2 * sampled + j));
    }
    const real *packed = run->packed;
    for (int64_t b = 0; b < s->banks; b++) {
        const struct bank *bank = &s->bank[b];
        real *y = kept_of(run, s, image, bank->first);
        convolve_lines(
            field, bank->terms, packed, bank->filters, planes[0], direct ? y : aside,
            direct ? run->pixels : field->vectors * LANES);
        for (int64_t i = 0; i < bank->filters * field->rows && !direct; i++)
            for (int64_t j = 0; j < field->columns; j += LANES)
                store_n(
                    y + i * field->columns + j, load(aside + i * field->across * LANES + j), field->columns - j);
        packed += bank->filters * bank->terms->count;
    }
    struct moments *parts = run->parts + image * (s->filters + 2 * sampled);
    for (int64_t i = 0; i < s->filters + 2 * sampled && c->training; i++)
        parts[i] = plane_moments(kept_of(run, s, image, i), run->pixels);
    for (int64_t channel = sampled; channel < c->channels && s->stride == 2; channel++)
        halve_maximum(
            state_of(run, s->index, image, channel), height, width, aside,
            (real *)bypass_of(run, s, image, channel));
}

static void fill_with(real *to, int64_t count, real value)
{
    for (int64_t i = 0; i < count; i++)
        to[i] = value;
}

/* State run->visit of the images of a chunk: as a node, and as a source. */
static void visit_forward(void *argument, int64_t chunk)
{
    struct cell_run *run = argument;
    const struct field *field = &run->field;
    const int64_t n = run->c->n, visit = run->visit;
    const struct source *s = visit < SOURCES ? &run->source[visit] : NULL;
    real *planes[3] = {0}, *aside = NULL;
    if (s) {
        const int64_t size = rounded_up(field_size(field, run->sampled * field->phases), LANES);
        const int64_t for_aside = most(s->edges * run->sampled * field->vectors * LANES, run->c->width);
        planes[0] = scratch(sizeof(real) * (3 * size + for_aside));
        if (!planes[0]) {
            __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        planes[1] = planes[0] + size;
        planes[2] = planes[1] + size;
        aside = planes[2] + size;
        memset(planes[0], 0, sizeof(real) * 3 * size);
        fill_with(planes[1], size, -(real)INFINITY);
    }
    for (int64_t image = chunk * n / run->chunks; image < (chunk + 1) * n / run->chunks; image++) {
        if (visit >= 2)
            compute_node(run, visit - 2, image);
        if (s)
            visit_source(run, s, image, planes, aside);
    }
}

static void finish_statistics(struct cell_run *run, const struct source *s)
{
    const struct cell *c = run->c;
    const int64_t number = s->filters + 2 * run->sampled;
    const double count = (double)(c->n * run->pixels);
    real *statistics = c->statistics + s->first;
    for (int64_t i = 0; i < number; i++) {
        struct moments all;
        if (c->training) {
            all = joined_moments(run->parts + i, c->n, number, run->pixels);
            statistics[2 * run->all + i] = (real)(all.squares / (count - 1));
        } else
            all = (struct moments){c->mean[s->first + i], c->var[s->first + i] * count};
        statistics[i] = (real)all.mean;
        statistics[run->all + i] = (real)(1 / sqrt(all.squares / count + c->eps));
    }
}

static void pack_bank(const struct bank *bank, int64_t weights, real *packed)
{
    for (int64_t f = 0, block; f < bank->filters; f += block) {
        block = filter_block(bank->filters - f);
        for (int64_t t = 0; t < bank->terms->count; t++)
            for (int64_t i = 0; i < block; i++)
                *packed++ = bank->weight[(f + i) * weights + bank->terms->index[t]];
    }
}

/* Returns 0, or -1 where there is no memory. */
EXPORT int cell_forward(const struct cell *c)
{
    struct cell_run run;
    if (begin_cell(&run, c, 0))
        return -1;
    for (run.visit = 0; run.visit < 2 + NODES && !run.failed; run.visit++) {
        const struct source *s = run.visit < SOURCES ? &run.source[run.visit] : NULL;
        if (s) {
            if (begin_source(&run, s, 1)) {
                run.failed = 1;
                break;
            }
            real *packed = run.packed;
            for (int64_t b = 0; b < s->banks; b++) {
                const struct bank *bank = &s->bank[b];
                pack_bank(bank, bank->terms->count, packed);
                packed += bank->filters * bank->terms->count;
            }
        }
        parallel_for(run.chunks, c->threads, visit_forward, &run);
        if (s) {
            finish_statistics(&run, s);
            free(run.field.memory);
        }
    }
    free(run.parts);
    return run.failed ? -1 : 0;
}

/* Backward */

/* The gradient of a channel of a node. */
INLINE real *node_gradient(const struct cell_run *run, int64_t node, int64_t image, int64_t channel)
{
    const struct cell *c = run->c;
    if (node == NODES - 1)
        return (real *)c->grad + ((image * NODES + node) * c->channels + channel) * run->pixels;
    return run->grad_nodes + ((image * (NODES - 1) + node) * c->channels + channel) * run->pixels;
}

/* sums[0] the sum of grad, and sums[1 + i] that of grad * plane[i] */
INLINE void some_products(const int number, const real *grad, int64_t count, const real *const *plane, double *sums)
{
    vec total[9];
    UNROLL for (int q = 0; q <= number; q++) total[q] = splat(0);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vec g = load(grad + i);
        total[0] = total[0] + g;
        UNROLL for (int q = 0; q < number; q++) total[1 + q] = fma(g, load(plane[q] + i), total[1 + q]);
    }
    if (i < count) {
        const vec g = load_part(grad + i, count - i);
        total[0] = total[0] + g;
        UNROLL for (int q = 0; q < number; q++)
            total[1 + q] = fma(g, load_part(plane[q] + i, count - i), total[1 + q]);
    }
    UNROLL for (int q = 0; q <= number; q++) sums[q] = sum(total[q]);
}

/* The sums over an image's pixels that the gradients of a node's edges need. */
static void sum_node(const struct cell_run *run, int64_t node, int64_t image)
{
    const struct cell *c = run->c;
    const int64_t sampled = run->sampled;
    for (int64_t i = 0; i <= node + 1; i++) {
        const struct source *s = &run->source[i];
        const int64_t e = node - first_node(i), edge = edge_from[i] + e;
        for (int64_t j = 0; j < sampled; j++) {
            const real *plane[KINDS + 4], *grad = node_gradient(run, node, image, j * c->k);
            double found[KINDS + 5], *sums = run->sums + ((image * EDGES + edge) * sampled + j) * SUMS;
            int64_t number = 0;
            for (; number < s->kinds; number++)
                plane[number] = kept_of(run, s, image, (number * s->edges + e) * sampled + j);
            plane[number++] = kept_of(run, s, image, s->filters + j);
            plane[number++] = kept_of(run, s, image, s->filters + sampled + j);
            if (c->grad_operations)
                plane[number++] = residual_plane(run, s, image, j);
            switch (number) {
            case 6: some_products(6, grad, run->pixels, plane, found); break;
            case 7: some_products(7, grad, run->pixels, plane, found); break;
            default: some_products(8, grad, run->pixels, plane, found);
            }
            sums[OF_GRAD] = found[0];
            for (int64_t p = 0; p < s->kinds; p++)
                sums[OF_KIND + p] = found[1 + p];
            sums[OF_MAX] = found[1 + s->kinds];
            sums[OF_AVG] = found[2 + s->kinds];
            sums[OF_RESIDUAL] = c->grad_operations ? found[3 + s->kinds] : 0;
        }
        if (c->grad_edges) {
            double total = 0;
            for (int64_t channel = sampled; channel < c->channels; channel++) {
                const real *plane = bypass_of(run, s, image, channel);
                double found[2];
                some_products(
                    1, node_gradient(run, node, image, channel % sampled * c->k + channel / sampled),
                    run->pixels, &plane, found);
                total += found[1];
            }
            run->bypassed[image * EDGES + edge] = total;
        }
    }
}

/* From the sums over the batch: the gradients of the mixing, and by plane of a source, with g the gradient of
   the node's channel, the gradient of a convolution's result as by_grad * g + by_plane * y + offset; of a pool
   likewise, where by_grad * factor of the edge is summed over the edges. */
static void prepare_source(struct cell_run *run, const struct source *s)
{
    const struct cell *c = run->c;
    const int64_t sampled = run->sampled;
    const double count = (double)(c->n * run->pixels);
    const real *mean = statistic(run, s, 0), *inverse_std = statistic(run, s, 1);
    for (int64_t j = 0; j < sampled; j++) {
        double pool_grad[2] = {0}, pool_along[2] = {0};
        for (int64_t e = 0; e < s->edges; e++) {
            const int64_t edge = edge_from[s->index] + e;
            const real *operations = c->operations + edge * OPERATIONS;
            real *to = c->grad_operations ? c->grad_operations + edge * OPERATIONS : NULL;
            double total[SUMS] = {0};
            for (int64_t image = 0; image < c->n; image++)
                for (int i = 0; i < SUMS; i++)
                    total[i] += run->sums[((image * EDGES + edge) * sampled + j) * SUMS + i];
            for (int64_t p = 0; p < s->kinds; p++) {
                const int64_t at = (p * s->edges + e) * sampled + j;
                const double scale = (double)kind_factor(operations, p) * inverse_std[at];
                const double along = (total[OF_KIND + p] - mean[at] * total[OF_GRAD]) * inverse_std[at];
                const double slope = -scale / count * inverse_std[at] * along;
                run->by_grad[at] = (real)scale;
                run->by_plane[at] = c->training ? (real)slope : 0;
                run->offset[at] = c->training ? (real)(-scale / count * total[OF_GRAD] - slope * mean[at]) : 0;
                if (to)
                    to[p < KINDS ? FIRST_CONVOLUTION + p : SKIP] += (real)along;
            }
            for (int i = 0; i < 2; i++) {
                const int64_t at = s->filters + i * sampled + j;
                const double along = (total[OF_MAX + i] - mean[at] * total[OF_GRAD]) * inverse_std[at];
                pool_grad[i] += operations[MAX_POOL + i] * total[OF_GRAD];
                pool_along[i] += operations[MAX_POOL + i] * along;
                if (to)
                    to[MAX_POOL + i] += (real)along;
            }
            if (to)
                for (int64_t o = s->stride == 1 ? SKIP : FIRST_CONVOLUTION; o < OPERATIONS; o++)
                    if (o == SKIP || o >= FIRST_CONVOLUTION)
                        to[o] += (real)total[OF_RESIDUAL];
        }
        for (int i = 0; i < 2; i++) {
            const int64_t at = s->filters + i * sampled + j;
            const double slope = -pool_along[i] / count * inverse_std[at] * inverse_std[at];
            run->by_grad[at] = inverse_std[at];
            run->by_plane[at] = c->training ? (real)slope : 0;
            run->offset[at] =
                c->training ? (real)(-inverse_std[at] / count * pool_grad[i] - slope * mean[at]) : 0;
        }
    }
    for (int64_t e = 0; e < s->edges && c->grad_edges; e++) {
        double total = 0;
        for (int64_t image = 0; image < c->n; image++)
            total += run->bypassed[image * EDGES + edge_from[s->index] + e];
        c->grad_edges[edge_from[s->index] + e] = (real)total;
    }
}

/* The terms of a source's data gradient, by phase, sorted by line, and the weights in their order. */
static void reverse_source(struct cell_run *run, const struct source *s)
{
    const struct field *field = &run->field;
    const int64_t by_plane = field->images * field->plane, sampled = run->sampled;
    int32_t *next = run->reverse[0].offset;
    real *packed = run->packed;
    for (int64_t phase = 0; phase < field->phases; phase++) {
        struct terms *to = &run->reverse[phase];
        to->offset = next;
        to->count = 0;
        /* of one channel: the terms of the first; `weight` of each */
        for (int64_t line = -MARGIN; line <= MARGIN; line++) { /* of the gradient */
            to->from[line + MARGIN] = (int32_t)to->count;
            for (int64_t b = 0; b < s->banks; b++) {
                const struct terms *terms = s->bank[b].terms;
                const int64_t first = terms->from[MARGIN - line], taps = terms->count / sampled;
                for (int64_t f = 0; f < s->bank[b].filters; f++)
                    for (int64_t t = first; t < terms->from[MARGIN - line + 1]; t++)
                        if (terms->index[t] < taps) { /* of channel 0 */
                            const int64_t at = terms->offset[t], shift = line * field->pitch;
                            /* the phase, and the column in -MARGIN ... MARGIN, from the offset */
                            const int64_t of = floor_divided(at + shift + MARGIN, by_plane);
                            if (of != phase)
                                continue;
                            to->offset[to->count++] =
                                (int32_t)((s->bank[b].first + f) * by_plane - (at - of * by_plane));
                        }
            }
        }
        to->from[2 * MARGIN + 1] = (int32_t)to->count;
        next += to->count;
        run->reversed[phase] = packed;
        for (int64_t c = 0, block; c < sampled; c += block) {
            block = filter_block(sampled - c);
            for (int64_t line = -MARGIN; line <= MARGIN; line++)
                for (int64_t b = 0; b < s->banks; b++) {
                    const struct bank *bank = &s->bank[b];
                    const struct terms *terms = bank->terms;
                    const int64_t first = terms->from[MARGIN - line], taps = terms->count / sampled;
                    for (int64_t f = 0; f < bank->filters; f++)
                        for (int64_t t = first; t < terms->from[MARGIN - line + 1]; t++)
                            if (terms->index[t] < taps) {
                                const int64_t at = terms->offset[t];
                                if (floor_divided(at + line * field->pitch + MARGIN, by_plane) != phase)
                                    continue;
                                for (int64_t i = 0; i < block; i++)
                                    *packed++ = bank->weight[f * terms->count + (c + i) * taps + terms->index[t]];
                            }
                }
        }
    }
}

/* The gradient of a convolution's result, of one image, into its plane. */
static void fill_gradient(
    const struct field *field, const real *grad, const real *y, real by_grad, real by_plane, real offset, real *plane)
{
    const vec a = splat(by_grad), b = splat(by_plane), constant = splat(offset);
    real *to = plane + field->origin;
    for (int64_t i = 0; i < field->rows; i++, grad += field->columns, y += field->columns, to += field->pitch) {
        int64_t j = 0;
        for (; j + LANES <= field->columns; j += LANES)
            store(to + j, fma(load(grad + j), a, fma(load(y + j), b, constant)));
        if (j < field->columns) {
            const int64_t left = field->columns - j;
            const vec value = fma(load_part(grad + j, left), a, fma(load_part(y + j, left), b, constant));
            store_part(to + j, value, left);
        }
    }
}

/* The gradients of both pools of a channel, added to planes of its phases. `grads` are the pools' (pixels each),
   that of the average already divided by the counts. */
static void add_pools(
    const struct field *field, const real *for_maximum, const real *maximum, const real *const *grads, real *line, real *to)
{
    for (int64_t i = 0; i < field->rows; i++) {
        const int64_t row = i * field->columns;
        const int32_t *start = field->start + i * field->across;
        for (int64_t j = 0; j < field->columns; j += LANES)
            store(line + j, load_n(grads[0] + row + j, field->columns - j));
        for (int tap = 0; tap < 9; tap++)
            for (int64_t v = 0; v < field->across; v++) {
                const int64_t j = v * LANES, left = field->columns - j, at = start[v] + field->pool[tap];
                const vec open = load(line + j), x = load(for_maximum + at), m = load_n(maximum + row + j, left);
                const vec taken = if_less(x, m, splat(0), open);
                store(line + j, if_less(x, m, open, splat(0)));
                store(to + at, load(to + at) + (taken + load_n(grads[1] + row + j, left)));
            }
    }
}

/* Scratch memory of a backward visit, in numbers. */
struct visit_memory {
    int64_t signs, grads, maximum, pools, results, pool_grads, line, sums, end;
};

static struct visit_memory memory_of(const struct cell_run *run, const struct source *s)
{
    const struct field *field = &run->field;
    const int64_t planes = run->sampled * field->phases, wide = field->vectors * LANES;
    struct visit_memory at = {0};
    at.grads = at.signs + rounded_up(field_size(field, planes), LANES);
    at.maximum = at.grads + rounded_up(field_size(field, s->filters), LANES);
    at.pools = at.maximum + rounded_up(field_size(field, field->phases), LANES);
    at.results = at.pools + rounded_up(field_size(field, field->phases), LANES);
    at.pool_grads = at.results + planes * wide;
    at.line = at.pool_grads + 3 * rounded_up(run->pixels, LANES) + LANES;
    at.sums = at.line + field->across * LANES;
    at.end = at.sums + MOST_FILTERS * LANES * 25 * run->sampled;
    return at;
}

/* The gradient of the first c channels of a state, from that of their signs, of the pools and the residual. */
static void operations_gradient(
    const struct cell_run *run, const struct source *s, int64_t image, int64_t slot, real *memory,
    const struct visit_memory *at, real *grad_state)
{
    const struct cell *c = run->c;
    const struct field *field = &run->field;
    const int64_t height = height_of(c, s), width = width_of(c, s), sampled = run->sampled;
    const int64_t wide = field->vectors * LANES, size = height * width;
    real *results = memory + at->results, *to_pools = memory + at->pools;
    for (int64_t phase = 0; phase < field->phases; phase++)
        convolve_lines(
            field, &run->reverse[phase], run->reversed[phase], sampled, memory + at->grads + slot * field->plane,
            results + phase * sampled * wide, wide);
    for (int64_t j = 0; j < sampled; j++) {
        const real *x = state_of(run, s->index, image, j), *plane[NODES + 1];
        real *grad_x = grad_state + j * size, *pool_grads[3], factor[NODES + 1];
        for (int i = 0; i < 3; i++)
            pool_grads[i] = memory + at->pool_grads + i * rounded_up(run->pixels, LANES);
        for (int64_t e = 0; e < s->edges; e++)
            plane[e] = node_gradient(run, first_node(s->index) + e, image, j * c->k);
        for (int i = 0; i < 2; i++) {
            const int64_t of = s->filters + i * sampled + j;
            for (int64_t e = 0; e < s->edges; e++)
                factor[e] = run->by_grad[of] * c->operations[(edge_from[s->index] + e) * OPERATIONS + MAX_POOL + i];
            plane[s->edges] = kept_of(run, s, image, of);
            factor[s->edges] = run->by_plane[of];
            add_planes(pool_grads[i], run->pixels, run->offset[of], s->edges + 1, plane, factor);
        }
        for (int64_t i = 0; i < run->pixels; i++)
            pool_grads[1][i] /= run->counts[i];
        for (int64_t e = 0; e < s->edges; e++)
            factor[e] = residual_factor(s, c->operations + (edge_from[s->index] + e) * OPERATIONS);
        add_planes(pool_grads[2], run->pixels, 0, s->edges, plane, factor);

        /* for a NaN or the largest of a window, and for both pools' gradients, planes of one image */
        struct field one = *field;
        one.images = 1;
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t of = floor_divided(field->pool[tap] + 2 * field->pitch, field->images * field->plane);
            one.pool[tap] -= (int32_t)(of * (field->images - 1) * field->plane);
        }
        fill_phases(&one, x, height, width, 0, memory + at->maximum);
        memset(to_pools, 0, sizeof(real) * field_size(&one, field->phases));
        add_pools(
            &one, memory + at->maximum, kept_of(run, s, image, s->filters + j), (const real *const *)pool_grads,
            memory + at->line, to_pools);

        const real *outer =
            s->index < 2 ? NULL : c->grad + ((image * NODES + s->index - 2) * c->channels + j) * size;
        for (int64_t i = 0; i < height; i++) {
            const int64_t row = i / s->stride;
            if (s->stride == 2 && width % (2 * LANES) == 0) {
                const int64_t phase = i % 2 * 2;
                const real *signs = results + (phase * sampled + j) * wide + row * field->across * LANES;
                const real *pools = to_pools + phase * field->plane + field->origin + row * field->pitch;
                for (int64_t q = 0; q < width / 2; q += LANES) {
                    const real *line = x + i * width + 2 * q;
                    const vec a = load(line), b = load(line + LANES);
                    const vec even = fma(load(signs + q), sign_slope(even_lanes(a, b)), load(pools + q));
                    const vec odd = fma(
                        load(signs + sampled * wide + q), sign_slope(odd_lanes(a, b)), load(pools + field->plane + q));
                    store(grad_x + i * width + 2 * q, first_pairs(even, odd));
                    store(grad_x + i * width + 2 * q + LANES, last_pairs(even, odd));
                }
                continue;
            }
            for (int64_t b = 0; b < s->stride; b++) {
                const int64_t phase = i % s->stride * s->stride + b;
                const real *of_signs = results + (phase * sampled + j) * wide + row * field->across * LANES;
                const real *of_pools = to_pools + phase * field->plane + field->origin + row * field->pitch;
                if (s->stride == 2) {
                    for (int64_t q = 0; 2 * q + b < width; q++) {
                        const real value = x[i * width + 2 * q + b], slope = 2 - (real)2 * (value < 0 ? -value : value);
                        grad_x[i * width + 2 * q + b] = of_signs[q] * (slope < 0 ? 0 : slope) + of_pools[q];
                    }
                    continue;
                }
                for (int64_t q = 0; q < width; q += LANES) {
                    const int64_t left = width - q, pixel = i * width + q;
                    vec total = load(of_pools + q) + load_n(pool_grads[2] + pixel, left);
                    if (outer)
                        total = total + load_n(outer + pixel, left);
                    total = fma(load(of_signs + q), sign_slope(load_n(x + pixel, left)), total);
                    store_n(grad_x + pixel, total, left);
                }
            }
        }
        if (s->stride == 2)
            add_halved(pool_grads[2], height, width, grad_x);
    }
}

/* The gradient of what bypasses the operations. */
static void bypass_gradient(
    const struct cell_run *run, const struct source *s, int64_t image, real *aside, real *grad_state)
{
    const struct cell *c = run->c;
    const int64_t height = height_of(c, s), width = width_of(c, s), size = height * width;
    for (int64_t channel = run->sampled; channel < c->channels; channel++) {
        const real *plane[NODES + 1];
        real factor[NODES + 1];
        int64_t number = 0;
        for (int64_t e = 0; e < s->edges; e++) {
            const int64_t node = first_node(s->index) + e;
            plane[number] =
                node_gradient(run, node, image, channel % run->sampled * c->k + channel / run->sampled);
            factor[number++] = c->edges[edge_from[s->index] + e];
        }
        real *to = grad_state + channel * size;
        if (s->stride == 2) {
            add_planes(aside, run->pixels, 0, number, plane, factor);
            spread_maximum(
                state_of(run, s->index, image, channel), bypass_of(run, s, image, channel), aside, height, width, to);
            continue;
        }
        if (s->index >= 2) {
            plane[number] = c->grad + ((image * NODES + s->index - 2) * c->channels + channel) * size;
            factor[number++] = 1;
        }
        add_planes(to, size, 0, number, plane, factor);
    }
}

/* Add the weight gradients of `images` images to those of the chunk. */
static void weight_gradients(
    const struct cell_run *run, const struct source *s, int64_t images, real *memory,
    const struct visit_memory *at, real *grad_weight)
{
    const struct field *field = &run->field;
    const int64_t by_plane = field->images * field->plane;
    int32_t *start = malloc(sizeof(int32_t) * field->vectors * images), *next = start;
    for (int64_t i = 0; i < field->rows && start; i++)
        for (int64_t image = 0; image < images; image++)
            for (int64_t v = 0; v < field->across; v++)
                *next++ = (int32_t)(image * field->plane + field->start[i * field->across + v]);
    const int64_t of_line = images * field->across;
    real *sums = memory + at->sums;
    for (int64_t b = 0; b < s->banks && start; b++) {
        const struct bank *bank = &s->bank[b];
        const struct terms *terms = bank->terms;
        for (int64_t f = 0, block; f < bank->filters; f += block) {
            block = filter_block(bank->filters - f);
            memset(sums, 0, sizeof(real) * block * terms->count * LANES);
            const real *grads = memory + at->grads + (bank->first + f) * by_plane;
            for (int64_t line = -MARGIN; line <= MARGIN; line++) {
                const int64_t from = most(0, -line), to = least(field->rows, field->rows - line);
                const struct correlate_size *size = correlate_sizes[block];
                const int64_t end = terms->from[line + MARGIN + 1];
                for (int64_t t = terms->from[line + MARGIN]; t < end && from < to; t += size->taps) {
                    while (size->taps > end - t)
                        size++;
                    size->run(
                        grads, by_plane, memory + at->signs, start + from * of_line, (to - from) * of_line,
                        terms->offset + t, sums + t * LANES, terms->count * LANES);
                }
            }
            for (int64_t i = 0; i < block; i++)
                for (int64_t t = 0; t < terms->count; t++)
                    grad_weight[(f + i) * terms->count + terms->index[t]] +=
                        sum(load(sums + (i * terms->count + t) * LANES));
        }
        grad_weight += bank->filters * terms->count;
    }
    free(start);
}

static int64_t weights_of(const struct source *s)
{
    int64_t weights = 0;
    for (int64_t b = 0; b < s->banks; b++)
        weights += s->bank[b].filters * s->bank[b].terms->count;
    return weights;
}

/* State run->visit of the images of a chunk. */
static void visit_backward(void *argument, int64_t chunk)
{
    struct cell_run *run = argument;
    const struct cell *c = run->c;
    const struct field *field = &run->field;
    const int64_t visit = run->visit, begin = chunk * c->n / run->chunks, end = (chunk + 1) * c->n / run->chunks;
    if (visit == SOURCES) {
        for (int64_t image = begin; image < end; image++)
            sum_node(run, NODES - 1, image);
        return;
    }
    const struct source *s = &run->source[visit];
    const struct visit_memory at = memory_of(run, s);
    const int64_t height = height_of(c, s), width = width_of(c, s), sampled = run->sampled;
    const int wants_state = visit >= 2 || c->grad_state[visit], wants_weights = s->bank[0].grad != NULL;
    real *memory = scratch(sizeof(real) * at.end), *of_weights = run->partial_weight + chunk * weights_of(s);
    if (!memory) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    memset(memory, 0, sizeof(real) * at.maximum);
    fill_with(memory + at.maximum, at.pools - at.maximum, -(real)INFINITY);
    if (wants_weights)
        memset(of_weights, 0, sizeof(real) * weights_of(s));
    for (int64_t first = begin; first < end; first += field->images) {
        const int64_t images = least(field->images, end - first);
        for (int64_t slot = 0; slot < images && (wants_state || wants_weights); slot++) {
            const int64_t image = first + slot;
            for (int64_t i = 0; i < s->filters; i++) {
                const int64_t e = i / sampled % s->edges, j = i % sampled;
                fill_gradient(
                    field, node_gradient(run, first_node(visit) + e, image, j * c->k), kept_of(run, s, image, i),
                    run->by_grad[i], run->by_plane[i], run->offset[i],
                    memory + at.grads + (i * field->images + slot) * field->plane);
            }
            if (wants_state) {
                real *to = visit < 2 ? c->grad_state[visit] + image * c->channels * run->pixels_in
                                     : node_gradient(run, visit - 2, image, 0);
                operations_gradient(run, s, image, slot, memory, &at, to);
                bypass_gradient(run, s, image, memory + at.pool_grads, to);
            }
            for (int64_t j = 0; j < sampled && wants_weights; j++)
                fill_phases(
                    field, state_of(run, visit, image, j), height, width, 1,
                    memory + at.signs + (j * field->phases * field->images + slot) * field->plane);
        }
        if (wants_weights)
            weight_gradients(run, s, images, memory, &at, of_weights);
        for (int64_t image = first; image < first + images && visit >= 2; image++)
            sum_node(run, visit - 2, image);
    }
}

static void halve_inputs(void *argument, int64_t image)
{
    struct cell_run *run = argument;
    const struct cell *c = run->c;
    real *line = scratch(sizeof(real) * c->width);
    if (!line) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t i = 0; i < 2; i++)
        for (int64_t channel = run->sampled; channel < c->channels; channel++)
            halve_maximum(
                state_of(run, i, image, channel), c->height, c->width, line,
                (real *)bypass_of(run, &run->source[i], image, channel));
}

/* Returns 0, or -1 where there is no memory. grad_edges and grad_operations must hold zeros. */
EXPORT int cell_backward(const struct cell *c)
{
    struct cell_run run;
    if (begin_cell(&run, c, 1))
        return -1;
    if (c->stride == 2)
        parallel_for(c->n, c->threads, halve_inputs, &run);
    int32_t *offsets = run.reverse[0].offset;
    for (run.visit = SOURCES; run.visit >= 0 && !run.failed; run.visit--) {
        if (run.visit == SOURCES) {
            parallel_for(run.chunks, c->threads, visit_backward, &run);
            continue;
        }
        const struct source *s = &run.source[run.visit];
        const int64_t of_chunk = (c->n + run.chunks - 1) / run.chunks;
        struct field one;
        if (plan_field(&one, run.sampled, s->stride, c->height_out, c->width_out, 1)) {
            run.failed = 1;
            break;
        }
        free(one.memory);
        const int64_t fitting = GRADIENTS_CACHED / (int64_t)sizeof(real) / (s->filters * one.plane);
        if (begin_source(&run, s, most(1, least(least(fitting, of_chunk), MOST_IMAGES)))) {
            run.failed = 1;
            break;
        }
        prepare_source(&run, s);
        run.reverse[0].offset = offsets;
        reverse_source(&run, s);
        parallel_for(run.chunks, c->threads, visit_backward, &run);
        const real *partial = run.partial_weight;
        const int64_t weights = weights_of(s);
        for (int64_t b = 0; b < s->banks && s->bank[0].grad; b++) {
            const int64_t number = s->bank[b].filters * s->bank[b].terms->count;
            for (int64_t i = 0; i < number; i++) {
                real total = 0;
                for (int64_t chunk = 0; chunk < run.chunks; chunk++)
                    total += partial[chunk * weights + i];
                s->bank[b].grad[i] = total;
            }
            partial += number;
        }
        free(run.field.memory);
    }
    free(run.sums);
    return run.failed ? -1 : 0;
}
