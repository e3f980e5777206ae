/* A unit of a derived network, PReLU(BN2(conv(sign(BN1(x)))) + residual) + shift, forward and backward, one
   group of channels at a time: statistics are of a channel and the convolution mixes the channels of one
   group only, so a group goes through all of it for the whole batch while it is in the cache.

   Tensors are contiguous, (n, channels, height, width). Forward keeps y, the convolution's result, and the
   statistics of both BNs; the backward pass computes the rest again by the same expressions.

   With a = BN1(x), z = BN2(y) + residual and G the gradient of PReLU(z): of z and of the residual it is G
   where z > 0, else slope * G; of the slope the sum of G * z where z <= 0; of the shift the sum of G; of y
   BN2's; of a the convolution's, times max(0, 2 - 2|a|) if it reads signs; of x BN1's. */

enum residual_kind { NONE, INPUT, HALVED_INPUT, TENSOR };

/* What may be missing (NULL): BN1 (`weight1`; then x is what is convolved, or its sign); PReLU (`slope`; then
   ReLU or nothing); the shift; a factor for each sample of the result; in the backward pass x's gradient, where
   there is no BN1.

   statistics1 (3, channels_in) and statistics2 (3, channels_out): mean, 1 / std, unbiased variance. */
struct unit {
    struct shape shape;
    int64_t signs, residual_kind, training, threads, relu /* where there is no slope */;
    double eps;
    const real *x, *residual, *weight, *slope, *shift, *factor;
    const real *weight1, *bias1, *mean1, *var1, *weight2, *bias2, *mean2, *var2; /* running, if not training */
    real *statistics1, *statistics2, *y, *out;
    const real *grad; /* of out; from here on for the backward pass */
    int64_t grad_image; /* from one image of it to the next; the channels of each lie together */
    real *grad_x, *grad_residual, *grad_weight, *grad_slope, *grad_shift;
    real *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2;
    struct plan *plan; /* from here on set by the functions below */
    int64_t tasks;     /* a group each, or where nothing is summed over its filters, a part of a group's */
    int64_t failed;    /* for want of memory */
};

/* A sum of many numbers: in vectors, which are added to a double before they grow long. */
struct total {
    vec part;
    double sum;
};
enum { LONGEST_PART = 64 }; /* vectors */

INLINE void flush(struct total *total)
{
    total->sum += sum(total->part);
    total->part = splat(0);
}

/* BN of a channel: (x - mean) * scale + bias. */
struct norm {
    real mean, inverse_std, scale, bias;
};

INLINE vec normalised(vec x, struct norm norm)
{
    return fma(x - splat(norm.mean), splat(norm.scale), splat(norm.bias));
}

/* The sign as 1 or -1, never 0; NaN stays NaN. */
INLINE vec sign(vec a) { return if_nan(a, a, if_less(a, splat(0), splat(-1), splat(1))); }

INLINE vec add_power(vec total, vec d, const int square)
{
    if (square)
        return fma(d, d, total);
    return total + d;
}

/* Sum of x - shift, or of its square, over n images of a channel. */
INLINE double sum_of(
    const real *x, int64_t n, int64_t image, int64_t size, real shift, const int square)
{
    vec part[4];
    double total = 0;
    int64_t vectors = 0;
    UNROLL for (int k = 0; k < 4; k++) part[k] = splat(0);
    for (int64_t i = 0; i < n; i++, x += image) {
        int64_t p = 0;
        for (; p + 4 * LANES <= size; p += 4 * LANES) {
            UNROLL for (int k = 0; k < 4; k++)
            {
                const vec d = load(x + p + k * LANES) - splat(shift);
                part[k] = add_power(part[k], d, square);
            }
            vectors += 4;
            if (vectors >= 4 * LONGEST_PART) {
                total += sum((part[0] + part[1]) + (part[2] + part[3]));
                UNROLL for (int k = 0; k < 4; k++) part[k] = splat(0);
                vectors = 0;
            }
        }
        for (; p < size; p += LANES) {
            const int64_t left = size - p;
            vec d = load_n(x + p, left) - splat(shift);
            if (left < LANES)
                d = keep(d, left);
            part[0] = add_power(part[0], d, square);
            vectors++;
        }
    }
    return total + sum((part[0] + part[1]) + (part[2] + part[3]));
}

/* The BN of channel c: with the batch's statistics, which it writes, or with the running ones. */
static struct norm norm_of(
    const struct unit *u,
    const real *x,
    int64_t channels,
    int64_t c,
    int64_t size,
    const real *weight,
    const real *bias,
    const real *running_mean,
    const real *running_var,
    real *statistics)
{
    const int64_t n = u->shape.n;
    double var;
    real mean;
    if (u->training) {
        const double count = (double)(n * size);
        mean = (real)(sum_of(x + c * size, n, channels * size, size, 0, 0) / count);
        const double squares = sum_of(x + c * size, n, channels * size, size, mean, 1);
        var = squares / count;
        statistics[2 * channels + c] = (real)(squares / (count - 1));
    } else {
        mean = running_mean[c];
        var = running_var[c];
    }
    const real inverse_std = (real)(1 / sqrt(var + u->eps));
    statistics[c] = mean;
    statistics[channels + c] = inverse_std;
    return (struct norm){mean, inverse_std, weight[c] * inverse_std, bias[c]};
}

static struct norm norm_again(
    const real *statistics, int64_t channels, int64_t c, const real *weight, const real *bias)
{
    const real inverse_std = statistics[channels + c];
    return (struct norm){statistics[c], inverse_std, weight[c] * inverse_std, bias[c]};
}

/* What the convolution reads: BN's result, or its sign. */
INLINE vec convolved(vec x, struct norm norm, const int signs)
{
    const vec a = normalised(x, norm);
    return signs ? sign(a) : a;
}

/* What the convolution reads of a channel of one image, into its planes; `line` holds a line. */
INLINE void fill_input_body(
    const struct unit *u, const real *x, struct norm norm, real *planes, real *restrict line, const int signs)
{
    const struct plan *plan = u->plan;
    const int64_t width = u->shape.width_in, height = u->shape.height_in;
    real *to = planes + plan->origin;
    if (plan->phases == 1) {
        for (int64_t i = 0; i < height; i++, x += width, to += plan->pitch) {
            int64_t p = 0;
            for (; p + LANES <= width; p += LANES)
                store(to + p, convolved(load(x + p), norm, signs));
            if (p < width)
                store(to + p, keep(convolved(load_part(x + p, width - p), norm, signs), width - p));
        }
    } else if (plan->shape.stride[1] == 2) {
        const int64_t phase = plan->images * plan->plane, rows = plan->shape.stride[0];
        for (int64_t i = 0; i < height; i++, x += width) {
            real *even = to + i % rows * 2 * phase + i / rows * plan->pitch, *odd = even + phase;
            int64_t p = 0;
            for (; p + 2 * LANES <= width; p += 2 * LANES, even += LANES, odd += LANES) {
                const vec a = convolved(load(x + p), norm, signs);
                const vec b = convolved(load(x + p + LANES), norm, signs);
                store(even, even_lanes(a, b));
                store(odd, odd_lanes(a, b));
            }
            const int64_t left = width - p;
            if (left > 0) {
                const vec a = keep_n(convolved(load_n(x + p, left), norm, signs), left);
                const vec b =
                    keep_n(convolved(load_n(x + p + LANES, left - LANES), norm, signs), left - LANES);
                store(even, even_lanes(a, b));
                store(odd, odd_lanes(a, b));
            }
        }
    } else {
        for (int64_t i = 0; i < height; i++, x += width) {
            for (int64_t p = 0; p < width; p += LANES)
                store_n(line + p, convolved(load_n(x + p, width - p), norm, signs), width - p);
            fill_line(plan, planes, i, line, width);
        }
    }
}

static void fill_input(
    const struct unit *u, const real *x, struct norm norm, real *planes, real *restrict line)
{
    if (u->signs)
        fill_input_body(u, x, norm, planes, line, 1);
    else
        fill_input_body(u, x, norm, planes, line, 0);
}

/* The signs that the convolution reads of a channel of one image, as bytes, into its planes; `image` and `signs`
   hold an image. Returns whether there is a NaN, which has no sign. */
static int fill_signs(
    const struct unit *u, const real *x, struct norm norm, int8_t *planes, real *restrict image,
    int8_t *restrict signs)
{
    const struct plan *plan = u->plan;
    const int64_t width = u->shape.width_in, height = u->shape.height_in, *stride = plan->shape.stride;
    const int64_t phase = plan->images * plan->plane, size = width * height;
    vec nan = splat(0);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vec a = normalised(load(x + i), norm);
        nan = if_nan(a, splat(1), nan);
        store(image + i, a);
    }
    if (i < size) {
        const vec a = normalised(load_part(x + i, size - i), norm);
        nan = if_nan(a, splat(1), nan);
        store(image + i, a);
    }
    sign_bytes(image, size, signs);
    for (i = 0; i < height; i++, signs += width) {
        int8_t *to = planes + plan->origin + i % stride[0] * stride[1] * phase + i / stride[0] * plan->pitch;
        if (stride[1] == 1)
            memcpy(to, signs, width);
        else if (stride[1] == 2) {
            for (int64_t p = 0; p < width / 2; p++) {
                to[p] = signs[2 * p];
                to[p + phase] = signs[2 * p + 1];
            }
            if (width % 2)
                to[width / 2] = signs[width - 1];
        } else
            for (int64_t p = 0; p < width; p++)
                to[p % stride[1] * phase + p / stride[1]] = signs[p];
    }
    return sum(nan) != 0;
}

/* 2x2 averages at stride 2 of one channel of an image; a window over an odd edge averages what it holds. */
static void halve(const real *restrict x, int64_t height, int64_t width, real *restrict out)
{
    const int64_t across = (width + 1) / 2, pairs = width / 2;
    for (int64_t i = 0; i < height; i += 2, out += across) {
        const real *upper = x + i * width, *lower = upper + width;
        const int both = i + 1 < height;
        int64_t j = 0;
        for (; both && j + LANES <= pairs; j += LANES) {
            const int64_t at = 2 * j;
            const vec a = load(upper + at), b = load(upper + at + LANES);
            const vec c = load(lower + at), d = load(lower + at + LANES);
            const vec total = ((even_lanes(a, b) + odd_lanes(a, b)) + even_lanes(c, d)) + odd_lanes(c, d);
            store(out + j, total * splat((real)0.25));
        }
        for (; j < pairs; j += LANES) {
            const int64_t left = 2 * (pairs - j), at = 2 * j;
            const vec a = load_n(upper + at, left), b = load_n(upper + at + LANES, left - LANES);
            vec total = even_lanes(a, b) + odd_lanes(a, b);
            if (both) {
                const vec c = load_n(lower + at, left), d = load_n(lower + at + LANES, left - LANES);
                total = ((total + even_lanes(c, d)) + odd_lanes(c, d)) * splat((real)0.25);
            } else
                total = total * splat((real)0.5);
            store_n(out + j, total, pairs - j);
        }
        if (width & 1)
            out[pairs] = both ? (upper[width - 1] + lower[width - 1]) * (real)0.5 : upper[width - 1];
    }
}

/* Add the gradient of halve(). */
static void add_halved(const real *restrict grad, int64_t height, int64_t width, real *restrict grad_x)
{
    const int64_t across = (width + 1) / 2, pairs = width / 2;
    for (int64_t i = 0; i < height; i++, grad_x += width) {
        const real *from = grad + i / 2 * across;
        const real factor = (i | 1) < height ? (real)0.25 : (real)0.5;
        for (int64_t j = 0; j < pairs; j += LANES) {
            const int64_t left = 2 * (pairs - j);
            const vec g = load_n(from + j, pairs - j) * splat(factor);
            real *to = grad_x + 2 * j;
            store_n(to, load_n(to, left) + first_pairs(g, g), left);
            store_n(to + LANES, load_n(to + LANES, left - LANES) + last_pairs(g, g), left - LANES);
        }
        if (width & 1)
            grad_x[width - 1] += from[pairs] * (2 * factor);
    }
}

/* The residual of filter f (of all) of an image, or NULL; `halved` holds a plane of results. */
static const real *residual_of(const struct unit *u, int64_t image, int64_t f, real *halved)
{
    const struct shape *s = &u->shape;
    const int64_t in = s->height_in * s->width_in, out = s->height_out * s->width_out;
    switch (u->residual_kind) {
    case INPUT:
        return u->x + (image * s->channels_in + f) * in;
    case TENSOR:
        return u->residual + (image * s->channels_out + f) * out;
    case HALVED_INPUT:
        halve(u->x + (image * s->channels_in + f) * in, s->height_in, s->width_in, halved);
        return halved;
    default:
        return NULL;
    }
}

/* Results of one image and filter, without what was computed between the lines, `line` numbers apart. */
static void copy_lines(const struct plan *plan, const real *from, int64_t line, real *to)
{
    const int64_t width = plan->shape.width_out, height = plan->shape.height_out;
    for (int64_t i = 0; i < height; i++, from += line, to += width)
        for (int64_t p = 0; p < width; p += LANES)
            store_n(to + p, load(from + p), width - p);
}

/* The parts of a thread's scratch memory, in numbers. */
struct parts {
    int64_t inputs, grads, results, packed, sums, line, halved, kept;
    int64_t sign_planes, sign_sums, sign_image, chosen, scale, sign_result, sign_start; /* forward, of signs */
    int64_t end;
};

/* Bytes of a channel's planes of signs: all phases and images. */
static inline int64_t sign_planes_size(const struct plan *plan)
{
    return rounded_up(plan->phases * plan->images * plan->plane, BYTES);
}

/* Vectors of bytes that an image's result takes, which has the lines of its planes. */
static inline int64_t sign_vectors(const struct plan *plan)
{
    return rounded_up(plan->shape.height_out * plan->pitch, BYTES) / BYTES;
}

static struct parts parts_of(const struct unit *u, int backward)
{
    const struct plan *plan = u->plan;
    const int64_t size = u->shape.height_out * u->shape.width_out, weights = plan->cin * plan->cout * plan->taps;
    const int64_t results = backward ? plan->cin * plan->phases : plan->cout;
    struct parts at = {0};
    at.grads = rounded_up(planes_size(plan, plan->cin, plan->phases), LANES);
    at.results = at.grads + (backward ? rounded_up(planes_size(plan, plan->cout, 1), LANES) : 0);
    at.packed = at.results + (results * plan->vectors + 1) * LANES;
    at.sums = at.packed + rounded_up(weights, LANES);
    at.line = at.sums + (backward ? weights * LANES : 0);
    at.halved = at.line + rounded_up(u->shape.width_in, LANES) + LANES;
    at.kept = at.halved + (u->residual_kind == HALVED_INPUT ? rounded_up(size, LANES) + LANES : 0);
    at.end = at.kept;
    if (backward && !u->grad_residual)
        at.end += rounded_up(u->shape.n * plan->cout * size, LANES) + LANES;
    at.sign_planes = rounded_up(at.end, LANES);
    if (!backward && u->signs) {
        const int64_t joins = joins_of(plan->cin), of_channel = sign_planes_size(plan) / (int64_t)sizeof(real);
        at.sign_sums = at.sign_planes + JOINED * of_channel;
        at.sign_image = at.sign_sums + first_sum(plan->cin, joins) * of_channel + BYTES;
        at.chosen = at.sign_image + 2 * rounded_up(u->shape.height_in * u->shape.width_in + LANES, LANES);
        at.scale = at.chosen + rounded_up(plan->cout * joins * plan->taps, LANES);
        at.sign_result = at.scale + rounded_up(plan->cout, LANES);
        at.sign_start = at.sign_result + plan->images * sign_vectors(plan) * BYTES;
        at.end = at.sign_start + rounded_up(plan->images * sign_vectors(plan), LANES);
    }
    return at;
}

/* PReLU is all that is done to z; or with RELU, ReLU; or FULL, PReLU, the shift and the factor. */
enum activation { PRELU, RELU, FULL };

INLINE void activate_part(
    const real *y, const real *residual, int64_t left, struct norm norm, vec slope, vec shift, vec factor,
    real *out, const enum activation activation)
{
    vec z = normalised(load_n(y, left), norm);
    if (residual)
        z = z + load_n(residual, left);
    vec result;
    if (activation == RELU)
        result = if_less(z, splat(0), splat(0), z);
    else
        result = if_less(splat(0), z, z, z * slope);
    if (activation == FULL)
        result = (result + shift) * factor;
    store_n(out, result, left);
}

static void activate(
    const real *y, const real *residual, int64_t size, struct norm norm, real slope, real shift, real factor,
    real *out, enum activation activation)
{
    const vec slopes = splat(slope), shifts = splat(shift), factors = splat(factor);
    int64_t p = 0;
    if (activation == PRELU && residual)
        for (; p + LANES <= size; p += LANES)
            activate_part(y + p, residual + p, LANES, norm, slopes, shifts, factors, out + p, PRELU);
    else if (activation == PRELU)
        for (; p + LANES <= size; p += LANES)
            activate_part(y + p, NULL, LANES, norm, slopes, shifts, factors, out + p, PRELU);
    else if (activation == RELU)
        for (; p + LANES <= size; p += LANES)
            activate_part(y + p, NULL, LANES, norm, slopes, shifts, factors, out + p, RELU);
    for (; p < size; p += LANES)
        activate_part(
            y + p, residual ? residual + p : NULL, size - p, norm, slopes, shifts, factors, out + p,
            activation);
}

static const struct norm no_norm = {0, 1, 1, 0};

/* What a group's convolution of signs with binary filters has in scratch memory: see signs.h. */
struct sign_product {
    int8_t *planes, *sums; /* of one join of channels; of all */
    real *image;           /* a channel's plane of an image */
    int8_t *signs;         /* of that */
    int32_t *chosen;       /* [filter][join][tap] */
    real *scale, *result;  /* [filter]; of one filter, [image][of_image][BYTES] */
    int32_t *start;        /* where in the planes a vector of the result begins: [image][of_image] */
    int64_t of_image;
    int64_t size;          /* bytes of a channel's planes: all phases and images */
};

/* The convolution of some images of a group. Returns 0 where there is a NaN, with no result. */
static int convolve_signs(
    const struct unit *u, const struct sign_product *p, const real *x, const struct norm *norms, int64_t images,
    real *y)
{
    const struct plan *plan = u->plan;
    const struct shape *s = &u->shape;
    const int64_t in = s->height_in * s->width_in, out = s->height_out * s->width_out;
    const int64_t joins = joins_of(plan->cin), terms = joins * plan->taps;
    for (int64_t j = 0; j < joins; j++) {
        const int64_t first = first_joined(plan->cin, j), number = joined(plan->cin, j);
        for (int64_t c = 0; c < number; c++)
            for (int64_t i = 0; i < images; i++)
                if (fill_signs(
                        u, x + (i * s->channels_in + first + c) * in, norms[first + c],
                        p->planes + c * p->size + i * plan->plane, p->image, p->signs))
                    return 0;
        join_planes(number, p->planes, p->size, p->sums + first_sum(plan->cin, j) * p->size);
    }
    for (int64_t f = 0; f < plan->cout; f++) {
        add_signs(
            p->sums, p->start, images * p->of_image, p->chosen + f * terms, terms, p->scale[f], p->result);
        for (int64_t i = 0; i < images; i++)
            copy_lines(
                plan, p->result + i * p->of_image * BYTES, plan->pitch, y + (i * s->channels_out + f) * out);
    }
    return 1;
}

static void forward_group(void *argument, int64_t task)
{
    struct unit *u = argument;
    const struct plan *plan = u->plan;
    const struct shape *s = &u->shape;
    const int64_t in = s->height_in * s->width_in, out = s->height_out * s->width_out;
    const int64_t first_in = task * s->groups / u->tasks * plan->cin, first_out = task * plan->cout;
    const int64_t terms = plan->cin * plan->taps, of_image = plan->vectors / plan->images;
    const struct parts at = parts_of(u, 0);
    real *memory = scratch((at.end + plan->cin * sizeof(struct norm)) * sizeof(real));
    if (!memory) {
        __atomic_store_n(&u->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    real *inputs = memory, *results = memory + at.results, *packed = memory + at.packed;
    struct norm *norms = (struct norm *)(memory + at.end);

    for (int64_t c = 0; c < plan->cin; c++)
        norms[c] = !u->weight1 ? no_norm
                               : norm_of(
                                     u, u->x, s->channels_in, first_in + c, in, u->weight1, u->bias1, u->mean1,
                                     u->var1, u->statistics1);
    const real *weight = u->weight + first_out * terms;
    const struct sign_product product = {
        .planes = (int8_t *)(memory + at.sign_planes), .sums = (int8_t *)(memory + at.sign_sums),
        .image = memory + at.sign_image, .signs = (int8_t *)(memory + at.sign_image + in + LANES),
        .chosen = (int32_t *)(memory + at.chosen), .scale = memory + at.scale,
        .result = memory + at.sign_result, .start = (int32_t *)(memory + at.sign_start),
        .of_image = sign_vectors(plan), .size = sign_planes_size(plan)};
    int in_bytes = u->signs && find_scales(weight, plan->cout, terms, product.scale);
    if (in_bytes) {
        memset(product.planes, 0, JOINED * product.size);
        choose_sums(weight, plan->cout, plan->cin, plan->taps, product.size, plan->offset, product.chosen);
        for (int64_t v = 0; v < plan->images * product.of_image; v++)
            product.start[v] = (int32_t)(v / product.of_image * plan->plane + plan->origin +
                                         v % product.of_image * BYTES);
    }
    int packs = 1; /* not yet done */
    const int direct = plan->images == 1 && plan->line == s->width_out && plan->image == out;
    for (int64_t n = 0; n < s->n; n += plan->images) {
        const int64_t images = least(plan->images, s->n - n);
        if (in_bytes && convolve_signs(
                            u, &product, u->x + (n * s->channels_in + first_in) * in, norms, images,
                            u->y + (n * s->channels_out + first_out) * out))
            continue;
        if (packs) {
            clear_planes(inputs, plan, plan->cin, plan->phases);
            pack_weights(plan, weight, packed);
            packs = 0;
        }
        for (int64_t c = 0; c < plan->cin; c++)
            for (int64_t i = 0; i < images; i++)
                fill_input(
                    u, u->x + ((n + i) * s->channels_in + first_in + c) * in, norms[c],
                    inputs + (c * plan->phases * plan->images + i) * plan->plane, memory + at.line);
        real *y = u->y + (n * s->channels_out + first_out) * out;
        const int64_t stride = direct ? out : plan->vectors * LANES;
        convolve(
            inputs, plan->start, images * of_image, plan->offset, terms, packed, plan->cout,
            direct ? y : results, stride);
        if (!direct)
            for (int64_t f = 0; f < plan->cout; f++)
                for (int64_t i = 0; i < images; i++)
                    copy_lines(
                        plan, results + f * stride + i * plan->image, plan->line,
                        y + (i * s->channels_out + f) * out);
    }
    for (int64_t f = first_out; f < first_out + plan->cout; f++) {
        const struct norm norm = norm_of(
            u, u->y, s->channels_out, f, out, u->weight2, u->bias2, u->mean2, u->var2, u->statistics2);
        const real slope = u->slope ? u->slope[f] : 1, shift = u->shift ? u->shift[f] : 0;
        const enum activation activation = u->shift || u->factor ? FULL : u->slope || !u->relu ? PRELU : RELU;
        for (int64_t n = 0; n < s->n; n++) {
            const int64_t place = (n * s->channels_out + f) * out;
            const real *residual = residual_of(u, n, f, memory + at.halved);
            activate(
                u->y + place, residual, out, norm, slope, shift, u->factor ? u->factor[n] : 1, u->out + place,
                activation);
        }
    }
}

/* Sums over the batch of one channel for its BN's gradient, the slope's and the shift's. */
struct channel_sums {
    struct total grad, grad_y, slope, shift;
};

/* Of one image and filter: z's gradient, and what it adds to the sums. */
INLINE void activation_gradient_part(
    const real *grad, const real *y, const real *residual, int64_t left, struct norm norm, vec slope,
    vec factor, real *kept, struct channel_sums *s)
{
    const vec of_y = load_n(y, left), g = load_n(grad, left) * factor;
    vec z = normalised(of_y, norm);
    if (residual)
        z = z + load_n(residual, left);
    const vec grad_z = if_less(splat(0), z, g, g * slope);
    store_n(kept, grad_z, left);
    s->grad.part = s->grad.part + keep_n(grad_z, left);
    s->grad_y.part = s->grad_y.part + keep_n(grad_z * (of_y - splat(norm.mean)), left);
    s->slope.part = s->slope.part + keep_n(if_less(splat(0), z, splat(0), g * z), left);
    s->shift.part = s->shift.part + keep_n(g, left);
}

static void activation_gradient(
    const real *grad, const real *y, const real *residual, int64_t size, struct norm norm, real slope,
    real factor, real *kept, struct channel_sums *sums)
{
    struct channel_sums s = *sums;
    const vec slopes = splat(slope), factors = splat(factor);
    int64_t p = 0;
    if (residual)
        for (; p + LANES <= size; p += LANES)
            activation_gradient_part(
                grad + p, y + p, residual + p, LANES, norm, slopes, factors, kept + p, &s);
    else
        for (; p + LANES <= size; p += LANES)
            activation_gradient_part(grad + p, y + p, NULL, LANES, norm, slopes, factors, kept + p, &s);
    if (p < size)
        activation_gradient_part(
            grad + p, y + p, residual ? residual + p : NULL, size - p, norm, slopes, factors, kept + p, &s);
    *sums = s;
}

/* The gradient through BN: grad * scale + (x - mean) * along + constant; only grad * scale where the
   statistics are the running ones. */
struct norm_gradient {
    real mean, scale, along, constant;
    int batch;
};

static struct norm_gradient norm_gradient(
    const struct unit *u, struct norm norm, double grad, double grad_x, double count, real *of_weight, real *of_bias)
{
    *of_weight = (real)(grad_x * norm.inverse_std);
    *of_bias = (real)grad;
    const double along = -grad_x / count * norm.inverse_std * norm.inverse_std * norm.scale;
    return (struct norm_gradient){
        norm.mean, norm.scale, (real)along, (real)(-grad / count * norm.scale), u->training != 0};
}

INLINE vec through_norm(vec grad, vec x, struct norm_gradient g, const int batch)
{
    if (!batch)
        return grad * splat(g.scale);
    return fma(grad, splat(g.scale), fma(x - splat(g.mean), splat(g.along), splat(g.constant)));
}

/* The gradient of the convolution's result, of one image and filter, into its plane. */
static void fill_grad(
    const struct plan *plan, const real *kept, const real *y, struct norm_gradient g, real *plane)
{
    const int64_t width = plan->shape.width_out, height = plan->shape.height_out;
    real *to = plane + plan->origin;
    for (int64_t i = 0; i < height; i++, kept += width, y += width, to += plan->pitch) {
        int64_t p = 0;
        for (; p + LANES <= width; p += LANES)
            store(to + p, through_norm(load(kept + p), load(y + p), g, g.batch));
        if (p < width) {
            const int64_t left = width - p;
            store(
                to + p, keep(through_norm(load_part(kept + p, left), load_part(y + p, left), g, g.batch), left));
        }
    }
}

struct input_sums {
    vec grad, along;
};

/* The gradient g of what the convolution reads becomes that of BN's result, and goes into BN's sums. */
INLINE void pass_sign(
    vec g, const real *x, int64_t left, struct norm norm, const int signs, real *grad_x,
    struct input_sums *sums)
{
    const vec of_x = load_n(x, left), centred = of_x - splat(norm.mean);
    if (signs) {
        const vec passed = fma(absolute(normalised(of_x, norm)), splat(-2), splat(2));
        g = g * if_less(passed, splat(0), splat(0), passed);
    }
    const vec product = g * centred;
    sums->grad = sums->grad + keep_n(g, left);
    sums->along = sums->along + keep_n(product, left);
    store_n(grad_x, g, left);
}

/* From the convolution's data gradient, of one image and channel, that of a = BN1(x), and BN1's sums. */
INLINE void input_gradient_body(
    const struct unit *u, const real *results, int64_t phase_stride, const real *x, struct norm norm,
    real *grad_x, struct total *grad, struct total *along, real *restrict line, const int signs)
{
    const struct plan *plan = u->plan;
    const int64_t *stride = plan->shape.stride, width = u->shape.width_in, height = u->shape.height_in;
    struct input_sums sums = {splat(0), splat(0)};
    for (int64_t i = 0; i < height; i++, x += width, grad_x += width) {
        const real *from = results + i % stride[0] * stride[1] * phase_stride + i / stride[0] * plan->line;
        if (stride[1] == 2) {
            const real *odd = from + phase_stride;
            for (int64_t p = 0; p < width; p += 2 * LANES, from += LANES, odd += LANES) {
                const vec e = load(from), o = load(odd);
                const int64_t left = width - p;
                pass_sign(first_pairs(e, o), x + p, left, norm, signs, grad_x + p, &sums);
                if (left > LANES)
                    pass_sign(
                        last_pairs(e, o), x + p + LANES, left - LANES, norm, signs, grad_x + p + LANES, &sums);
            }
            continue;
        }
        if (stride[1] > 2) {
            for (int64_t b = 0; b < stride[1]; b++, from += phase_stride)
                for (int64_t p = 0; p * stride[1] + b < width; p++)
                    line[p * stride[1] + b] = from[p];
            from = line;
        }
        int64_t p = 0;
        for (; p + LANES <= width; p += LANES)
            pass_sign(load(from + p), x + p, LANES, norm, signs, grad_x + p, &sums);
        if (p < width)
            pass_sign(load_n(from + p, width - p), x + p, width - p, norm, signs, grad_x + p, &sums);
    }
    grad->part = grad->part + sums.grad;
    along->part = along->part + sums.along;
}

static void input_gradient(
    const struct unit *u, const real *results, int64_t phase_stride, const real *x, struct norm norm,
    real *grad_x, struct total *grad, struct total *along, real *restrict line)
{
    if (u->signs)
        input_gradient_body(u, results, phase_stride, x, norm, grad_x, grad, along, line, 1);
    else
        input_gradient_body(u, results, phase_stride, x, norm, grad_x, grad, along, line, 0);
}

static void backward_group(void *argument, int64_t task)
{
    struct unit *u = argument;
    const struct plan *plan = u->plan;
    const struct shape *s = &u->shape;
    const int64_t in = s->height_in * s->width_in, out = s->height_out * s->width_out;
    const int64_t first_in = task * s->groups / u->tasks * plan->cin, first_out = task * plan->cout;
    const int64_t terms = plan->cin * plan->taps, of_image = plan->vectors / plan->images;
    const struct parts at = parts_of(u, 1);
    const size_t of_norms = plan->cin * (sizeof(struct norm) + 2 * sizeof(struct total)) +
                            plan->cout * sizeof(struct norm_gradient) + 64;
    real *memory = scratch(at.end * sizeof(real) + of_norms);
    if (!memory) {
        __atomic_store_n(&u->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    real *inputs = memory, *grads = memory + at.grads, *results = memory + at.results;
    real *packed = memory + at.packed, *sums = memory + at.sums, *line = memory + at.line;
    struct total *grad_of = (struct total *)(memory + rounded_up(at.end, LANES)), *along_of = grad_of + plan->cin;
    struct norm *norms = (struct norm *)(along_of + plan->cin);
    struct norm_gradient *through = (struct norm_gradient *)(norms + plan->cin);

    /* z's gradient, kept in the residual's or in scratch memory: image after image, filter after filter */
    const int64_t kept_image = (u->grad_residual ? s->channels_out : plan->cout) * out;
    real *kept = u->grad_residual ? u->grad_residual + first_out * out : memory + at.kept;
    for (int64_t i = 0; i < plan->cout; i++) {
        const int64_t f = first_out + i;
        const struct norm norm = norm_again(u->statistics2, s->channels_out, f, u->weight2, u->bias2);
        struct channel_sums of_channel = {0};
        const int64_t flushed = most(1, LONGEST_PART * LANES / out); /* after so many images */
        for (int64_t n = 0; n < s->n; n++) {
            const int64_t place = (n * s->channels_out + f) * out;
            activation_gradient(
                u->grad + n * u->grad_image + f * out, u->y + place, residual_of(u, n, f, memory + at.halved), out, norm,
                u->slope ? u->slope[f] : !u->relu, u->factor ? u->factor[n] : 1, kept + n * kept_image + i * out, &of_channel);
            if ((n + 1) % flushed == 0 || n + 1 == s->n) {
                flush(&of_channel.grad);
                flush(&of_channel.grad_y);
                flush(&of_channel.slope);
                flush(&of_channel.shift);
            }
        }
        through[i] = norm_gradient(
            u, norm, of_channel.grad.sum, of_channel.grad_y.sum, (double)(s->n * out), &u->grad_weight2[f],
            &u->grad_bias2[f]);
        if (u->grad_slope)
            u->grad_slope[f] = (real)of_channel.slope.sum;
        if (u->grad_shift)
            u->grad_shift[f] = (real)of_channel.shift.sum;
    }

    for (int64_t c = 0; c < plan->cin; c++) {
        norms[c] = !u->weight1
                       ? no_norm
                       : norm_again(u->statistics1, s->channels_in, first_in + c, u->weight1, u->bias1);
        grad_of[c] = along_of[c] = (struct total){0};
    }
    clear_planes(inputs, plan, plan->cin, plan->phases);
    clear_planes(grads, plan, plan->cout, 1);
    memset(sums, 0, plan->cout * terms * LANES * sizeof(real));
    const real *weight = u->weight + first_out * terms;
    real *next = packed;
    for (int64_t p = 0; p < plan->phases; p++) {
        pack_transposed(plan, &plan->phase[p], weight, next);
        next += plan->cin * plan->cout * plan->phase[p].taps;
    }
    const int direct = plan->images == 1 && plan->line == s->width_in && plan->image == in;
    for (int64_t n = 0; n < s->n; n += plan->images) {
        const int64_t images = least(plan->images, s->n - n), vectors = images * of_image;
        for (int64_t f = 0; f < plan->cout; f++)
            for (int64_t i = 0; i < images; i++)
                fill_grad(
                    plan, kept + (n + i) * kept_image + f * out,
                    u->y + ((n + i) * s->channels_out + first_out + f) * out, through[f],
                    grads + (f * plan->images + i) * plan->plane);
        for (int64_t c = 0; c < plan->cin; c++)
            for (int64_t i = 0; i < images; i++)
                fill_input(
                    u, u->x + ((n + i) * s->channels_in + first_in + c) * in, norms[c],
                    inputs + (c * plan->phases * plan->images + i) * plan->plane, line);
        correlate(
            grads, plan->images * plan->plane, plan->cout, inputs, plan->start, vectors, plan->offset, terms,
            sums);
        if (!u->grad_x)
            continue;
        real *grad_x = u->grad_x + (n * s->channels_in + first_in) * in;
        const int64_t stride = direct ? in : plan->vectors * LANES;
        next = packed;
        for (int64_t p = 0; p < plan->phases; p++) {
            const struct phase *phase = &plan->phase[p];
            convolve(
                grads, plan->start, vectors, phase->reverse, plan->cout * phase->taps, next, plan->cin,
                direct ? grad_x : results + p * plan->cin * stride, stride);
            next += plan->cin * plan->cout * phase->taps;
        }
        for (int64_t c = 0; c < plan->cin; c++) {
            for (int64_t i = 0; i < images; i++) {
                const int64_t place = (i * s->channels_in + c) * in;
                input_gradient(
                    u, direct ? grad_x + place : results + c * stride + i * plan->image, plan->cin * stride,
                    u->x + (n * s->channels_in + first_in) * in + place, norms[c], grad_x + place,
                    &grad_of[c], &along_of[c], line);
            }
            flush(&grad_of[c]);
            flush(&along_of[c]);
        }
    }
    for (int64_t i = 0; i < plan->cout * terms; i++)
        u->grad_weight[first_out * terms + i] = sum(load(sums + i * LANES));

    for (int64_t i = 0; i < plan->cin && u->weight1; i++) {
        const int64_t c = first_in + i;
        const struct norm_gradient g = norm_gradient(
            u, norms[i], grad_of[i].sum, along_of[i].sum, (double)(s->n * in), &u->grad_weight1[c],
            &u->grad_bias1[c]);
        for (int64_t n = 0; n < s->n; n++) {
            const int64_t place = (n * s->channels_in + c) * in;
            const real *of_z = kept + n * kept_image + i * out, *x = u->x + place;
            real *grad_x = u->grad_x + place;
            for (int64_t p = 0; p < in; p += LANES) {
                const int64_t left = in - p;
                vec grad = through_norm(load_n(grad_x + p, left), load_n(x + p, left), g, g.batch);
                if (u->residual_kind == INPUT)
                    grad = grad + load_n(of_z + p, left);
                store_n(grad_x + p, grad, left);
            }
            if (u->residual_kind == HALVED_INPUT)
                add_halved(of_z, s->height_in, s->width_in, grad_x);
        }
    }
}

/* How many tasks share the filters of a group: one, where channels have sums over them. */
static int64_t parts_of_group(int64_t filters, int shared)
{
    static const int64_t sizes[] = {12, 6, 8, 4, 10, 5, 9, 3, 7, 2};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes && !shared; i++)
        if (filters % sizes[i] == 0)
            return filters / sizes[i];
    return shared ? 1 : filters;
}

static int run_groups(struct unit *u, task_function *run)
{
    struct plan plan;
    struct shape shape = u->shape;
    const int64_t parts = parts_of_group(shape.channels_out / shape.groups, u->weight1 || u->grad_x);
    shape.channels_out /= parts;
    if (plan_convolution(&plan, &shape))
        return -1;
    u->plan = &plan;
    u->tasks = shape.groups * parts;
    u->failed = 0;
    parallel_for(u->tasks, u->threads, run, u);
    free_plan(&plan);
    return u->failed ? -1 : 0;
}
