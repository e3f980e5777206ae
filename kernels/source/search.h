/* The supernet's operations on the edges that leave one state: their convolutions of the signs of x, of all
   kinds and edges, and the mixture of their normalised results.

   Convolutions.  y (n, kinds, filters, height_out, width_out), with the filters of all edges, is kept for the
   backward pass. A task is a chunk of images; their number depends on n alone, and partial weight gradients are
   added chunk by chunk, so the result does not depend on the number of threads.

   Mixture.  out (n, filters, ...) = sum over kinds p of coefficient[p][edge] * BN(y of kind p), BN without
   affine parameters. A task is a filter: its statistics, and all its planes. */

enum { MOST_KINDS = 8, IMAGE_CHUNKS = 16 };

struct search_call {
    int64_t n, channels, filters, height, width, height_out, width_out, kinds, threads;
    int64_t size[MOST_KINDS], dilation[MOST_KINDS], stride; /* of each kind's kernel; its padding keeps the size */
    const real *x, *weight[MOST_KINDS];
    real *y;
    const real *grad; /* of y; from here on for the backward pass */
    real *grad_x, *grad_weight[MOST_KINDS]; /* NULL: not wanted */
    struct plan *plans;                     /* from here on set by the functions below */
    real *partial;                          /* [chunk][kind][weight] */
    int64_t chunks, failed;
};

/* BN1 that changes nothing: the unit's functions then take the sign of x itself. */
static const struct norm no_norm = {.mean = 0, .inverse_std = 1, .scale = 1, .bias = 0};

static int plan_kinds(struct search_call *s, struct plan *plans)
{
    s->plans = plans;
    s->failed = 0;
    s->chunks = least(s->n, IMAGE_CHUNKS);
    for (int64_t k = 0; k < s->kinds; k++) {
        const int64_t padding = s->size[k] / 2 * s->dilation[k];
        const struct shape shape = {
            .n = (s->n + s->chunks - 1) / s->chunks,
            .channels_in = s->channels,
            .channels_out = s->filters,
            .groups = 1,
            .height_in = s->height,
            .width_in = s->width,
            .height_out = s->height_out,
            .width_out = s->width_out,
            .kernel = {s->size[k], s->size[k]},
            .stride = {s->stride, s->stride},
            .padding = {padding, padding},
            .dilation = {s->dilation[k], s->dilation[k]}};
        if (plan_convolution(&plans[k], &shape)) {
            while (k--)
                free_plan(&plans[k]);
            return -1;
        }
    }
    return 0;
}

static void free_kinds(struct search_call *s)
{
    for (int64_t k = 0; k < s->kinds; k++)
        free_plan(&s->plans[k]);
}

static int64_t largest_weight(const struct search_call *s)
{
    int64_t size = 0;
    for (int64_t k = 0; k < s->kinds; k++)
        size = most(size, s->size[k] * s->size[k]);
    return size * s->channels * s->filters;
}

/* Signs of `images` images from n on into the planes of a kind. */
static void fill_signs(const struct search_call *s, struct plan *plan, int64_t n, int64_t images, real *planes, real *line)
{
    const struct unit u = {.shape = plan->shape, .signs = 1, .plan = plan};
    const int64_t in = s->height * s->width;
    for (int64_t c = 0; c < s->channels; c++)
        for (int64_t i = 0; i < images; i++)
            fill_input(
                &u, s->x + ((n + i) * s->channels + c) * in, no_norm,
                planes + (c * plan->phases * plan->images + i) * plan->plane, line);
}

static void convolve_chunk(void *argument, int64_t chunk)
{
    struct search_call *s = argument;
    const int64_t out = s->height_out * s->width_out, end = (chunk + 1) * s->n / s->chunks;
    for (int64_t k = 0; k < s->kinds; k++) {
        struct plan *plan = &s->plans[k];
        const int64_t terms = plan->cin * plan->taps, of_image = plan->vectors / plan->images;
        const int64_t planes = rounded_up(planes_size(plan, plan->cin, plan->phases), LANES);
        const int64_t results = (plan->cout * plan->vectors + 1) * LANES, weights = rounded_up(terms * plan->cout, LANES);
        real *inputs = scratch((planes + results + weights + s->width + 2 * LANES) * sizeof(real));
        if (!inputs) {
            __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        real *result = inputs + planes, *packed = result + results, *line = packed + weights;
        clear_planes(inputs, plan, plan->cin, plan->phases);
        pack_weights(plan, s->weight[k], packed);
        const int64_t stride = plan->vectors * LANES;
        for (int64_t n = chunk * s->n / s->chunks, images; n < end; n += images) {
            images = least(plan->images, end - n);
            fill_signs(s, plan, n, images, inputs, line);
            convolve(
                inputs, plan->start, images * of_image, plan->offset, terms, packed, plan->cout, result, stride);
            for (int64_t f = 0; f < plan->cout; f++)
                for (int64_t i = 0; i < images; i++)
                    copy_lines(
                        plan, result + f * stride + i * plan->image,
                        s->y + (((n + i) * s->kinds + k) * s->filters + f) * out);
        }
    }
}

/* Add a channel's data gradient, of one image, whose phases are `phase_stride` apart; or set it. */
static void add_phases(
    const struct plan *plan, const real *results, int64_t phase_stride, int set, real *grad_x)
{
    const int64_t *stride = plan->shape.stride, width = plan->shape.width_in, height = plan->shape.height_in;
    for (int64_t i = 0; i < height; i++, grad_x += width) {
        const real *from = results + i % stride[0] * stride[1] * phase_stride + i / stride[0] * plan->line;
        if (stride[1] == 1) {
            for (int64_t p = 0; p < width; p += LANES) {
                vec g = load(from + p);
                if (!set)
                    g = g + load_n(grad_x + p, width - p);
                store_n(grad_x + p, g, width - p);
            }
            continue;
        }
        for (int64_t b = 0; b < stride[1]; b++, from += phase_stride)
            for (int64_t p = 0; p * stride[1] + b < width; p++) {
                real *to = grad_x + p * stride[1] + b;
                *to = set ? from[p] : *to + from[p];
            }
    }
}

static void differentiate_chunk(void *argument, int64_t chunk)
{
    struct search_call *s = argument;
    const int64_t in = s->height * s->width, out = s->height_out * s->width_out;
    const int64_t begin = chunk * s->n / s->chunks, end = (chunk + 1) * s->n / s->chunks;
    const struct norm_gradient as_it_is = {.scale = 1};
    real *partial = s->partial ? s->partial + chunk * s->kinds * largest_weight(s) : NULL;
    for (int64_t k = 0; k < s->kinds; k++) {
        struct plan *plan = &s->plans[k];
        const int64_t terms = plan->cin * plan->taps, of_image = plan->vectors / plan->images;
        const int64_t weights = terms * plan->cout, stride = plan->vectors * LANES;
        const int64_t of_inputs = rounded_up(planes_size(plan, plan->cin, plan->phases), LANES);
        const int64_t of_grads = rounded_up(planes_size(plan, plan->cout, 1), LANES);
        const int64_t of_results = plan->cin * plan->phases * stride + LANES;
        real *inputs = scratch(
            (of_inputs + of_grads + of_results + rounded_up(weights, LANES) + weights * LANES + s->width +
             2 * LANES) *
            sizeof(real));
        if (!inputs) {
            __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        real *grads = inputs + of_inputs, *results = grads + of_grads, *packed = results + of_results;
        real *sums = packed + rounded_up(weights, LANES), *line = sums + weights * LANES, *next = packed;
        clear_planes(inputs, plan, plan->cin, plan->phases);
        clear_planes(grads, plan, plan->cout, 1);
        memset(sums, 0, weights * LANES * sizeof(real));
        for (int64_t p = 0; p < plan->phases; p++) {
            pack_transposed(plan, &plan->phase[p], s->weight[k], next);
            next += plan->cin * plan->cout * plan->phase[p].taps;
        }
        for (int64_t n = begin, images; n < end; n += images) {
            images = least(plan->images, end - n);
            const int64_t vectors = images * of_image;
            for (int64_t f = 0; f < plan->cout; f++)
                for (int64_t i = 0; i < images; i++) {
                    const real *grad = s->grad + (((n + i) * s->kinds + k) * s->filters + f) * out;
                    fill_grad(plan, grad, grad, as_it_is, grads + (f * plan->images + i) * plan->plane);
                }
            if (s->grad_weight[k]) {
                fill_signs(s, plan, n, images, inputs, line);
                correlate(
                    grads, plan->images * plan->plane, plan->cout, inputs, plan->start, vectors, plan->offset,
                    terms, sums);
            }
            if (!s->grad_x)
                continue;
            next = packed;
            for (int64_t p = 0; p < plan->phases; p++) {
                const struct phase *phase = &plan->phase[p];
                convolve(
                    grads, plan->start, vectors, phase->reverse, plan->cout * phase->taps, next, plan->cin,
                    results + p * plan->cin * stride, stride);
                next += plan->cin * plan->cout * phase->taps;
            }
            for (int64_t c = 0; c < plan->cin; c++)
                for (int64_t i = 0; i < images; i++)
                    add_phases(
                        plan, results + c * stride + i * plan->image, plan->cin * stride, k == 0,
                        s->grad_x + ((n + i) * s->channels + c) * in);
        }
        if (s->grad_weight[k])
            for (int64_t i = 0; i < weights; i++)
                partial[k * largest_weight(s) + i] = sum(load(sums + i * LANES));
    }
    if (s->grad_x) /* through the sign */
        for (int64_t p = begin * s->channels * in; p < end * s->channels * in; p += LANES) {
            const int64_t left = end * s->channels * in - p;
            const vec slope = fma(absolute(load_n(s->x + p, left)), splat(-2), splat(2));
            store_n(s->grad_x + p, load_n(s->grad_x + p, left) * if_less(slope, splat(0), splat(0), slope), left);
        }
}

/* All return 0, or -1 where there is no memory. */
EXPORT int search_convolutions(struct search_call *s)
{
    struct plan plans[MOST_KINDS];
    if (plan_kinds(s, plans))
        return -1;
    parallel_for(s->chunks, s->threads, convolve_chunk, s);
    free_kinds(s);
    return s->failed ? -1 : 0;
}

EXPORT int search_convolutions_backward(struct search_call *s)
{
    struct plan plans[MOST_KINDS];
    if (plan_kinds(s, plans))
        return -1;
    const int64_t largest = largest_weight(s);
    s->partial = s->grad_weight[0] ? malloc(s->chunks * s->kinds * largest * sizeof(real)) : NULL;
    if (s->grad_weight[0] && !s->partial)
        s->failed = 1;
    else
        parallel_for(s->chunks, s->threads, differentiate_chunk, s);
    for (int64_t k = 0; k < s->kinds && s->partial && !s->failed; k++)
        for (int64_t i = 0; i < s->size[k] * s->size[k] * s->channels * s->filters; i++) {
            real total = 0;
            for (int64_t chunk = 0; chunk < s->chunks; chunk++)
                total += s->partial[(chunk * s->kinds + k) * largest + i];
            s->grad_weight[k][i] = total;
        }
    free(s->partial);
    free_kinds(s);
    return s->failed ? -1 : 0;
}

struct mixture_call {
    int64_t n, kinds, edges, channels, pixels, training, threads;
    double eps;
    const real *y, *coefficient;   /* (n, kinds, edges * channels, pixels), (kinds, edges) */
    const real *mean, *var;        /* running, (kinds, edges * channels), if not training */
    real *statistics;              /* (3, kinds, edges * channels): mean, 1 / std, unbiased variance */
    real *out;                     /* (n, edges * channels, pixels) */
    const real *grad;              /* of out; from here on for the backward pass */
    real *grad_y;                  /* NULL: not wanted */
    real *grad_coefficient;        /* (kinds, edges * channels): to be summed over channels */
};

static void mix_filter(void *argument, int64_t f)
{
    struct mixture_call *m = argument;
    const int64_t filters = m->edges * m->channels, image = m->kinds * filters * m->pixels;
    const int64_t all = m->kinds * filters;
    const double count = (double)(m->n * m->pixels);
    vec scale[MOST_KINDS];
    real constant = 0;
    for (int64_t k = 0; k < m->kinds; k++) {
        const int64_t at = k * filters + f;
        const real *y = m->y + at * m->pixels;
        real mean;
        double var;
        if (m->training) {
            mean = (real)(sum_of(y, m->n, image, m->pixels, 0, 0) / count);
            const double squares = sum_of(y, m->n, image, m->pixels, mean, 1);
            var = squares / count;
            m->statistics[2 * all + at] = (real)(squares / (count - 1));
        } else {
            mean = m->mean[at];
            var = m->var[at];
        }
        const real inverse_std = (real)(1 / sqrt(var + m->eps));
        m->statistics[at] = mean;
        m->statistics[all + at] = inverse_std;
        const real factor = m->coefficient[k * m->edges + f / m->channels] * inverse_std;
        scale[k] = splat(factor);
        constant -= factor * mean;
    }
    for (int64_t n = 0; n < m->n; n++) {
        const real *y = m->y + n * image + f * m->pixels;
        real *out = m->out + (n * filters + f) * m->pixels;
        for (int64_t p = 0; p < m->pixels; p += LANES) {
            const int64_t left = m->pixels - p;
            vec mixed = splat(constant);
            for (int64_t k = 0; k < m->kinds; k++)
                mixed = fma(load_n(y + k * filters * m->pixels + p, left), scale[k], mixed);
            store_n(out + p, mixed, left);
        }
    }
}

static void unmix_filter(void *argument, int64_t f)
{
    struct mixture_call *m = argument;
    const int64_t filters = m->edges * m->channels, image = m->kinds * filters * m->pixels;
    const int64_t all = m->kinds * filters;
    const double count = (double)(m->n * m->pixels);
    struct total total = {.part = splat(0)}, along[MOST_KINDS];
    vec mean[MOST_KINDS];
    for (int64_t k = 0; k < m->kinds; k++) {
        along[k] = (struct total){.part = splat(0)};
        mean[k] = splat(m->statistics[k * filters + f]);
    }
    for (int64_t n = 0; n < m->n; n++) {
        const real *y = m->y + n * image + f * m->pixels, *grad = m->grad + (n * filters + f) * m->pixels;
        for (int64_t p = 0; p < m->pixels; p += LANES) {
            const int64_t left = m->pixels - p;
            const vec g = load_n(grad + p, left); /* 0 after the last pixel */
            total.part = total.part + g;
            for (int64_t k = 0; k < m->kinds; k++)
                along[k].part =
                    fma(g, load_n(y + k * filters * m->pixels + p, left) - mean[k], along[k].part);
        }
        flush(&total);
        for (int64_t k = 0; k < m->kinds; k++)
            flush(&along[k]);
    }
    vec scale[MOST_KINDS], slope[MOST_KINDS], offset[MOST_KINDS];
    for (int64_t k = 0; k < m->kinds; k++) {
        const int64_t at = k * filters + f;
        const double inverse_std = m->statistics[all + at];
        const double factor = m->coefficient[k * m->edges + f / m->channels] * inverse_std;
        const double by_y = m->training ? -factor * along[k].sum * inverse_std * inverse_std / count : 0;
        m->grad_coefficient[at] = (real)(along[k].sum * inverse_std);
        scale[k] = splat((real)factor);
        slope[k] = splat((real)by_y);
        offset[k] = splat(m->training ? (real)(-factor * total.sum / count - by_y * m->statistics[at]) : 0);
    }
    if (!m->grad_y)
        return;
    for (int64_t n = 0; n < m->n; n++) {
        const real *y = m->y + n * image + f * m->pixels, *grad = m->grad + (n * filters + f) * m->pixels;
        real *grad_y = m->grad_y + n * image + f * m->pixels;
        for (int64_t p = 0; p < m->pixels; p += LANES) {
            const int64_t left = m->pixels - p;
            const vec g = load_n(grad + p, left);
            for (int64_t k = 0; k < m->kinds; k++) {
                const int64_t at = k * filters * m->pixels + p;
                store_n(grad_y + at, fma(g, scale[k], fma(load_n(y + at, left), slope[k], offset[k])), left);
            }
        }
    }
}

EXPORT int search_mixture(struct mixture_call *m)
{
    parallel_for(m->edges * m->channels, m->threads, mix_filter, m);
    return 0;
}

EXPORT int search_mixture_backward(struct mixture_call *m)
{
    parallel_for(m->edges * m->channels, m->threads, unmix_filter, m);
    return 0;
}
