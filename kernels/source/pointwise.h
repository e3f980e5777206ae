/* 1x1 convolutions of all channels, and the factorised reduction, which is two of them at stride 2.

       y = conv(sign(BN1(x))),  out = PReLU(BN2(y) [+ residual]) [* factor of the sample] [+ shift]

   Each of BN1, the sign, BN2's weight and bias, the residual, PReLU, the factor and the shift may be missing.

   The product visits the pixels in tiles of TILE pixels of one image; a tile is [channel][TILE] numbers, so
   that the block kernels of convolution.h read it with offsets of channel * TILE. Tiles are grouped into
   chunks, whose number depends on the shape alone: each thread takes whole chunks, sums over pixels are taken
   chunk by chunk, and then over the chunks in order. So the result does not depend on the number of threads.

   A factorised reduction has two halves. Half h reads the pixels (2i + h, 2j + h) and gives the filters from
   h * channels_out / 2 on; where the image has no such pixel it reads zeros. */

enum { TILE_VECTORS = REGISTERS == 32 ? 4 : 2, TILE = TILE_VECTORS * LANES, MOST_CHUNKS = 16, MOST_TILES = 32, MOST_PARTS = 3 };
enum { CACHED = 1 << 18 /* bytes that tiles may take */ };

struct pointwise {
    int64_t n, channels_in, channels_out, height, width, height_out, width_out;
    int64_t halves;         /* 1, or 2: a factorised reduction */
    int64_t signs;          /* whether the product reads signs */
    int64_t training;       /* whether BN uses the statistics of the batch */
    int64_t normalized;     /* backward: y holds (y - mean2) * inverse_std2, as a BN without PReLU gives */
    int64_t adds_input;     /* backward: the residual is x, so grad_x takes its gradient, too */
    int64_t threads;
    double eps;
    const real *x, *residual;
    const real *weight[2];          /* of each half: (channels_out / halves, channels_in) */
    const real *weight1, *bias1;    /* BN1; NULL: there is none */
    const real *weight2, *bias2;    /* BN2; NULL: 1 and 0 */
    const real *slope, *shift;      /* NULL: none */
    const real *factor;             /* (n,), NULL: none */
    const real *mean1, *var1, *mean2, *var2; /* running, if not training */
    real *statistics1, *statistics2; /* as in unit.h */
    real *y, *out;                  /* may be the same where there is no backward pass to come */
    const real *grad;               /* of out */
    int64_t grad_image;             /* from one image of it to the next; the channels of each lie together */
    real *grad_x, *grad_residual;   /* NULL: not wanted, and so on */
    real *grad_weight[2], *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2, *grad_slope, *grad_shift;
    /* Backward, where there are several: the gradients of parts of out's channels, each a tensor of its own, and
       how many channels each has. They stand in the place of grad. */
    int64_t parts, part_channels[MOST_PARTS];
    const real *part_grad[MOST_PARTS];
};

struct pointwise_run {
    const struct pointwise *p;
    int64_t pixels_in, pixels;     /* of an image, before and after */
    int64_t tiles, chunks;         /* tiles of an image and half; chunks of all images' tiles */
    int64_t filters;               /* of a half */
    int64_t failed;                /* there was no memory */
    int32_t *offset;               /* [largest number of channels]: i * TILE */
    int32_t *pixel[2];             /* of a half: where each pixel of the result reads; -1: nowhere */
    int by_pairs;                  /* LANES of these are always every other pixel of a line of x */
    real *packed[2];               /* weights of a half; in the backward pass the transposed ones */
    int32_t *chosen[2];            /* instead of these, for multiply_joined; NULL: not binary, or too few */
    real *scale[2];                /* then of each filter of a half */
    struct norm *norm1, *norm2;
    real *by_grad, *by_y, *offset_y;       /* the gradient of y is by_grad * gz + by_y * y + offset_y */
    double *partial;                       /* sums of the chunks or images */
    real *partial_weight;                  /* [chunk][weights] */
    int whole;                             /* the weight gradient is taken of all pixels at once, see below */
    real *inputs, *grads;                  /* then: [half][pixel][wide], [half][block][pixel][block's filter] */
    int32_t *at_pixel;                     /* [pixel]: where its inputs begin */
    int64_t wide;                          /* channels_in, rounded up to LANES */
    void *memory;
};

/* max(0, 2 - 2|a|), NaN where a is */
INLINE vec sign_slope(vec a)
{
    const vec slope = splat(2) - (absolute(a) + absolute(a));
    return if_less(slope, splat(0), splat(0), slope);
}

/* The number, the mean and the sum of squared differences from it, of values that come in parts. */
struct moments {
    double mean, squares;
};

INLINE struct moments plane_moments(const real *plane, int64_t count)
{
    vec part[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        UNROLL for (int q = 0; q < 4; q++) part[q] = part[q] + load(plane + i + q * LANES);
    for (; i < count; i += LANES)
        part[0] = part[0] + load_n(plane + i, count - i);
    const real mean = sum((part[0] + part[1]) + (part[2] + part[3])) / (real)count;
    UNROLL for (int q = 0; q < 4; q++) part[q] = splat(0);
    for (i = 0; i + 4 * LANES <= count; i += 4 * LANES)
        UNROLL for (int q = 0; q < 4; q++)
        {
            const vec apart = load(plane + i + q * LANES) - splat(mean);
            part[q] = fma(apart, apart, part[q]);
        }
    for (; i < count; i += LANES) {
        const vec apart = keep_n(load_n(plane + i, count - i) - splat(mean), count - i);
        part[0] = fma(apart, apart, part[0]);
    }
    return (struct moments){mean, sum((part[0] + part[1]) + (part[2] + part[3]))};
}

/* Of parts of equal size `count`, `stride` apart. */
static struct moments joined_moments(const struct moments *parts, int64_t number, int64_t stride, int64_t count)
{
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < number; i++)
        mean += parts[i * stride].mean;
    mean /= (double)number;
    for (int64_t i = 0; i < number; i++) {
        const double apart = parts[i * stride].mean - mean;
        squares += parts[i * stride].squares + (double)count * apart * apart;
    }
    return (struct moments){mean, squares};
}

/* weight (filters, terms), at f * by_filter + t * by_term, as the block kernels read it */
static void pack_matrix(
    const real *weight, int64_t filters, int64_t terms, int64_t by_filter, int64_t by_term, real *packed)
{
    for (int64_t f = 0, block; f < filters; f += block) {
        block = filter_block(filters - f);
        for (int64_t t = 0; t < terms; t++)
            for (int64_t i = 0; i < block; i++)
                *packed++ = weight[(f + i) * by_filter + t * by_term];
    }
}

/* Products with binary filters, in numbers that are joined as in signs.h: of JOINED rows of a tile there are the
   sums with all choices of signs, and a row of the result adds one of them where it would multiply JOINED times.

   As many sums as stay in the cache are made at once. Results are taken ROWS rows at a time, so that their
   additions need not wait for one another. */
enum { CHOICES = 1 << JOINED, ROWS = 4, JOINS_AT_ONCE = (1 << 15) / (CHOICES * TILE * (int)sizeof(real)) };

/* How many numbers choose_rows writes. */
INLINE int64_t choices_size(int64_t rows, int64_t terms) { return rounded_up(rows, ROWS) * joins_of(terms); }

/* For results of `rows` rows and sums over `terms`, with signs of weight[row * by_row + term * by_term]: which
   sums each row adds, [block of ROWS rows][join][row of the block]. */
static void choose_rows(
    const real *weight, int64_t rows, int64_t terms, int64_t by_row, int64_t by_term, int32_t *chosen)
{
    for (int64_t first = 0; first < rows; first += ROWS, chosen += ROWS * joins_of(terms)) {
        const int64_t number = least(ROWS, rows - first);
        for (int64_t j = 0; j < joins_of(terms); j++)
            for (int64_t r = 0; r < ROWS; r++)
                chosen[j * ROWS + r] = (int32_t)(j % JOINS_AT_ONCE * CHOICES * TILE);
        for (int64_t t = 0; t < terms; t++)
            for (int64_t r = 0; r < number; r++)
                chosen[t / JOINED * ROWS + r] |=
                    (weight[(first + r) * by_row + t * by_term] < 0) * (int32_t)(TILE << t % JOINED);
    }
}

/* All sums of `number` rows of a tile, each times its factor. */
INLINE void join_rows(const real *tile, const real *factor, int64_t number, real *sums)
{
    UNROLL for (int v = 0; v < TILE; v += LANES)
    {
        vec sum[CHOICES];
        sum[0] = load(tile + v) * splat(factor ? factor[0] : 1);
        sum[1] = splat(0) - sum[0];
        UNROLL for (int c = 1; c < JOINED; c++)
        {
            vec row = splat(0);
            if (c < number)
                row = load(tile + c * TILE + v) * splat(factor ? factor[c] : 1);
            UNROLL for (int k = 0; k < 1 << c; k++)
            {
                sum[k + (1 << c)] = sum[k] - row;
                sum[k] = sum[k] + row;
            }
        }
        UNROLL for (int k = 0; k < CHOICES; k++) store(sums + k * TILE + v, sum[k]);
    }
}

/* out (rows, TILE) = scale[row] * the sum over terms of (+ or -) factor[term] * tile (terms, TILE), by the
   choices of choose_rows. A factor or scale that is NULL is 1. */
static void multiply_joined(
    const real *tile, const real *factor, int64_t terms, const int32_t *chosen, const real *scale, int64_t rows,
    real *out, int64_t out_stride)
{
    real sums[JOINS_AT_ONCE * CHOICES * TILE] __attribute__((aligned(64)));
    const int64_t joins = joins_of(terms);
    for (int64_t first = 0; first < joins; first += JOINS_AT_ONCE) {
        const int64_t number = least(JOINS_AT_ONCE, joins - first);
        for (int64_t j = 0; j < number; j++) {
            const int64_t term = (first + j) * JOINED;
            join_rows(tile + term * TILE, factor ? factor + term : NULL, terms - term, sums + j * CHOICES * TILE);
        }
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int32_t *from = chosen + (row * joins + first * ROWS);
            vec total[ROWS][TILE_VECTORS];
            UNROLL for (int r = 0; r < ROWS; r++)
                UNROLL for (int v = 0; v < TILE_VECTORS; v++) total[r][v] = splat(0);
            for (int64_t j = 0; j < number; j++, from += ROWS)
                UNROLL for (int r = 0; r < ROWS; r++)
                    UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                        total[r][v] = total[r][v] + load(sums + from[r] + v * LANES);
            UNROLL for (int r = 0; r < ROWS; r++)
            {
                if (row + r >= rows)
                    break;
                real *to = out + (row + r) * out_stride;
                const vec of_row = splat(scale ? scale[row + r] : 1);
                UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                {
                    vec result = total[r][v] * of_row;
                    if (first)
                        result = load(to + v * LANES) + result;
                    store(to + v * LANES, result);
                }
            }
        }
    }
}

/* From so many rows of results on, joining pays. */
enum { LEAST_ROWS = 16 };

static int32_t tile_start[TILE_VECTORS];

static int begin_pointwise(struct pointwise_run *run, const struct pointwise *p, int backward)
{
    memset(run, 0, sizeof *run);
    run->p = p;
    run->pixels_in = p->height * p->width;
    run->pixels = p->height_out * p->width_out;
    run->tiles = (run->pixels + TILE - 1) / TILE;
    run->filters = p->channels_out / p->halves;
    run->by_pairs = p->height % 2 == 0 && p->width % 2 == 0 && p->width_out % LANES == 0;
    run->chunks = least(p->n * run->tiles, MOST_CHUNKS);
    const int64_t weights = run->filters * p->channels_in, channels = most(p->channels_in, p->channels_out);
    const int64_t parts = most(p->n, run->chunks), pixels = p->n * run->tiles * TILE;
    run->wide = rounded_up(p->channels_in, LANES);
    run->whole = run->chunks * weights > pixels * (run->wide + run->filters + 1);
    const int64_t for_weights =
        !backward ? 0 : p->halves * (run->whole ? pixels * (run->wide + run->filters) : run->chunks * weights);
    const int64_t rows = backward ? p->channels_in : run->filters, terms = backward ? run->filters : p->channels_in;
    size_t size = sizeof(double) * 4 * parts * channels + sizeof(real) * 3 * channels + 2 * sizeof(struct norm) * channels +
                  sizeof(real) * (weights * p->halves + for_weights) +
                  sizeof(real) * p->channels_out + sizeof(int32_t) * (channels + 2 * run->pixels + pixels) +
                  sizeof(int32_t) * p->halves * choices_size(rows, terms);
    if (!(run->memory = malloc(size)))
        return -1;
    run->partial = run->memory;
    real *next = (real *)(run->partial + 4 * parts * channels);
    real **arrays[] = {&run->by_grad, &run->by_y, &run->offset_y};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++, next += channels)
        *arrays[i] = next;
    int joins = rows >= LEAST_ROWS;
    for (int64_t h = 0; h < p->halves; h++, next += run->filters) {
        run->scale[h] = next;
        joins = joins && find_scales(p->weight[h], run->filters, p->channels_in, next);
    }
    for (int64_t h = 0; h < p->halves; h++, next += weights) {
        run->packed[h] = next;
        if (joins)
            continue;
        if (backward)
            pack_matrix(p->weight[h], p->channels_in, run->filters, 1, p->channels_in, next);
        else
            pack_matrix(p->weight[h], run->filters, p->channels_in, p->channels_in, 1, next);
    }
    run->norm1 = (struct norm *)next;
    run->norm2 = run->norm1 + channels;
    next = (real *)(run->norm2 + channels);
    run->partial_weight = run->inputs = next;
    run->grads = run->inputs + p->halves * pixels * run->wide;
    next += for_weights;
    run->offset = (int32_t *)next;
    run->at_pixel = run->offset + channels + 2 * run->pixels;
    for (int64_t i = 0; i < pixels && backward && run->whole; i++)
        run->at_pixel[i] = (int32_t)(i * run->wide);
    int32_t *chosen = run->at_pixel + pixels;
    for (int64_t h = 0; h < p->halves && joins; h++, chosen += choices_size(rows, terms)) {
        run->chosen[h] = chosen;
        choose_rows(
            p->weight[h], rows, terms, backward ? 1 : p->channels_in, backward ? p->channels_in : 1, chosen);
    }
    for (int64_t i = 0; i < channels; i++)
        run->offset[i] = (int32_t)(i * TILE);
    for (int i = 0; i < TILE_VECTORS; i++)
        tile_start[i] = i * LANES;
    for (int64_t h = 0; h < 2 && p->halves == 2; h++) {
        run->pixel[h] = run->offset + channels + h * run->pixels;
        for (int64_t i = 0; i < p->height_out; i++)
            for (int64_t j = 0; j < p->width_out; j++) {
                const int64_t row = 2 * i + h, column = 2 * j + h;
                run->pixel[h][i * p->width_out + j] =
                    row < p->height && column < p->width ? (int32_t)(row * p->width + column) : -1;
            }
    }
    return 0;
}

/* The BNs' settings, from the statistics that forward has written. */
static void set_norms(
    struct norm *norms, const real *statistics, int64_t channels, const real *weight, const real *bias)
{
    for (int64_t c = 0; c < channels; c++) {
        const real inverse_std = statistics[channels + c];
        norms[c] = (struct norm){
            statistics[c], inverse_std, weight ? weight[c] * inverse_std : inverse_std, bias ? bias[c] : 0};
    }
}

static void moments_of_image(void *argument, int64_t task)
{
    const struct pointwise_run *run = argument;
    struct moments *parts = (struct moments *)run->partial + task * run->p->channels_in;
    for (int64_t c = 0; c < run->p->channels_in; c++)
        parts[c] = plane_moments(run->p->x + (task * run->p->channels_in + c) * run->pixels_in, run->pixels_in);
}

static void moments_of_result(void *argument, int64_t task)
{
    const struct pointwise_run *run = argument;
    struct moments *parts = (struct moments *)run->partial + task * run->p->channels_out;
    for (int64_t c = 0; c < run->p->channels_out; c++)
        parts[c] = plane_moments(run->p->y + (task * run->p->channels_out + c) * run->pixels, run->pixels);
}

/* Of the batch in training, else the running ones: mean, 1 / std, unbiased variance. */
static void set_statistics(
    const struct pointwise_run *run, int64_t channels, int64_t pixels, double eps, const real *mean, const real *var,
    real *statistics)
{
    const int64_t n = run->p->n;
    const double count = (double)(n * pixels);
    for (int64_t c = 0; c < channels; c++) {
        struct moments all;
        if (run->p->training) {
            all = joined_moments((struct moments *)run->partial + c, n, channels, pixels);
            statistics[2 * channels + c] = (real)(all.squares / (count - 1));
        } else
            all = (struct moments){mean[c], var[c] * count};
        statistics[c] = (real)all.mean;
        statistics[channels + c] = (real)(1 / sqrt(all.squares / count + eps));
    }
}

/* What the product reads of x. */
INLINE vec product_input(vec x, struct norm norm, const int normalises, const int signs)
{
    if (normalises)
        x = normalised(x, norm);
    return signs ? sign(x) : x;
}

/* A tile: of which image, from which pixel of its plane on, and how many pixels. */
struct tile {
    int64_t image, first, count;
};

INLINE struct tile tile_at(const struct pointwise_run *run, int64_t number)
{
    const int64_t first = number % run->tiles * TILE;
    return (struct tile){number / run->tiles, first, least(TILE, run->pixels - first)};
}

static void find_tiles(const struct pointwise_run *run, int64_t number, int64_t tiles, struct tile *at)
{
    for (int64_t t = 0; t < tiles; t++)
        at[t] = tile_at(run, number + t);
}

/* LANES pixels of a half, two apart in a line of x, where run->by_pairs. */
INLINE vec load_half(const real *plane, int64_t pixel, int64_t half)
{
    const real *from = plane + pixel - half;
    const vec a = load(from), b = load(from + LANES);
    return half ? odd_lanes(a, b) : even_lanes(a, b);
}

INLINE void store_half(real *plane, int64_t pixel, int64_t half, vec v)
{
    real *to = plane + pixel - half;
    const vec even = half ? splat(0) : v, odd = half ? v : splat(0);
    store(to, first_pairs(even, odd));
    store(to + LANES, last_pairs(even, odd));
}

INLINE void fill_tiles_body(
    const struct pointwise_run *run, int64_t half, const struct tile *tile, int64_t tiles, real *to,
    int64_t stride, const int normalises, const int signs)
{
    const int64_t channels = run->p->channels_in, pixels_in = run->pixels_in;
    const int32_t *pixel = run->pixel[half];
    for (int64_t c = 0; c < channels; c++, to += TILE) {
        const struct norm norm = normalises ? run->norm1[c] : no_norm;
        for (int64_t t = 0; t < tiles; t++) {
            const struct tile at = tile[t];
            const real *plane = run->p->x + (at.image * channels + c) * pixels_in;
            real *of_tile = to + t * stride;
            if (!pixel && at.count == TILE) {
                UNROLL for (int i = 0; i < TILE; i += LANES)
                    store(of_tile + i, product_input(load(plane + at.first + i), norm, normalises, signs));
            } else if (!pixel) {
                for (int64_t i = 0; i < TILE; i += LANES) {
                    const int64_t left = at.count - i;
                    const vec x = load_n(plane + at.first + i, left);
                    store(of_tile + i, keep_n(product_input(x, norm, normalises, signs), left));
                }
            } else if (run->by_pairs) {
                for (int64_t i = 0; i < TILE; i += LANES) {
                    vec x = splat(0);
                    if (i < at.count)
                        x = product_input(
                            load_half(plane, pixel[at.first + i], half), norm, normalises, signs);
                    store(of_tile + i, x);
                }
            } else {
                const int32_t *from = pixel + at.first;
                for (int64_t i = 0; i < TILE; i++)
                    of_tile[i] = i < at.count && from[i] >= 0 ? plane[from[i]] : 0;
                for (int64_t i = 0; i < TILE; i += LANES)
                    store(of_tile + i, product_input(load(of_tile + i), norm, normalises, signs));
                for (int64_t i = 0; i < TILE; i++)
                    if (i >= at.count || from[i] < 0)
                        of_tile[i] = 0;
            }
        }
    }
}

/* What the product reads of `tiles` tiles, each `stride` numbers after the one before; 0 where there is no
   pixel. Channel after channel, because a channel's pixels lie together in memory. */
static void fill_tiles(
    const struct pointwise_run *run, int64_t half, const struct tile *tile, int64_t tiles, real *to,
    int64_t stride)
{
    if (run->p->weight1 && run->p->signs)
        fill_tiles_body(run, half, tile, tiles, to, stride, 1, 1);
    else if (run->p->weight1)
        fill_tiles_body(run, half, tile, tiles, to, stride, 1, 0);
    else if (run->p->signs)
        fill_tiles_body(run, half, tile, tiles, to, stride, 0, 1);
    else
        fill_tiles_body(run, half, tile, tiles, to, stride, 0, 0);
}

/* How many tiles of `rows` channels fit the cache. */
INLINE int64_t tiles_at_once(int64_t rows)
{
    return most(2, least(MOST_TILES, CACHED / (int64_t)sizeof(real) / (rows * TILE)));
}

static void forward_chunk(void *argument, int64_t chunk)
{
    struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    const int64_t size = TILE * p->channels_in, at_once = tiles_at_once(p->channels_in + run->filters);
    real *tiles = scratch(sizeof(real) * (size * at_once + TILE * run->filters));
    if (!tiles) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    real *aside = tiles + size * at_once;
    const int64_t all = p->n * run->tiles, end = (chunk + 1) * all / run->chunks;
    for (int64_t first = chunk * all / run->chunks; first < end; first += at_once)
        for (int64_t h = 0; h < p->halves; h++) {
            const int64_t number = least(at_once, end - first);
            struct tile tile[MOST_TILES];
            find_tiles(run, first, number, tile);
            fill_tiles(run, h, tile, number, tiles, size);
            for (int64_t t = 0; t < number; t++) {
                const struct tile at = tile[t];
                real *y = p->y + (at.image * p->channels_out + h * run->filters) * run->pixels + at.first;
                const int whole = at.count == TILE;
                real *to = whole ? y : aside;
                const int64_t stride = whole ? run->pixels : TILE;
                if (run->chosen[h])
                    multiply_joined(
                        tiles + t * size, NULL, p->channels_in, run->chosen[h], run->scale[h], run->filters, to,
                        stride);
                else
                    convolve(
                        tiles + t * size, tile_start, TILE_VECTORS, run->offset, p->channels_in, run->packed[h],
                        run->filters, to, stride);
                for (int64_t f = 0; f < run->filters && !whole; f++)
                    memcpy(y + f * run->pixels, aside + f * TILE, at.count * sizeof(real));
            }
        }
}

/* z = BN2(y) [+ residual] at `at` of a plane of channel c */
INLINE vec before_activation(const struct pointwise_run *run, int64_t c, vec y, const real *residual, int64_t at, int64_t left)
{
    vec z = run->p->normalized ? y : normalised(y, run->norm2[c]);
    if (residual)
        z = z + load_n(residual + at, left);
    return z;
}

static void activate_image(void *argument, int64_t image)
{
    const struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    const vec factor = splat(p->factor ? p->factor[image] : 1);
    for (int64_t c = 0; c < p->channels_out; c++) {
        const int64_t plane = (image * p->channels_out + c) * run->pixels;
        const real *residual = p->residual ? p->residual + plane : NULL;
        const vec shift = splat(p->shift ? p->shift[c] : 0), slope = splat(p->slope ? p->slope[c] : 1);
        for (int64_t i = 0; i < run->pixels; i += LANES) {
            const int64_t left = run->pixels - i;
            const vec y = load_n(p->y + plane + i, left);
            vec z = before_activation(run, c, y, residual, i, left);
            if (p->slope)
                z = if_less(splat(0), z, z, z * slope);
            if (p->shift)
                z = z + shift;
            if (p->factor)
                z = z * factor;
            store_n(p->out + plane + i, z, left);
        }
    }
}

/* Returns 0, or -1 where there is no memory. */
EXPORT int64_t pointwise_forward(const struct pointwise *p)
{
    struct pointwise_run run;
    if (begin_pointwise(&run, p, 0))
        return -1;
    if (p->weight1) {
        if (p->training)
            parallel_for(p->n, p->threads, moments_of_image, &run);
        set_statistics(&run, p->channels_in, run.pixels_in, p->eps, p->mean1, p->var1, p->statistics1);
        set_norms(run.norm1, p->statistics1, p->channels_in, p->weight1, p->bias1);
    }
    parallel_for(run.chunks, p->threads, forward_chunk, &run);
    if (p->training)
        parallel_for(p->n, p->threads, moments_of_result, &run);
    set_statistics(&run, p->channels_out, run.pixels, p->eps, p->mean2, p->var2, p->statistics2);
    set_norms(run.norm2, p->statistics2, p->channels_out, p->weight2, p->bias2);
    parallel_for(p->n, p->threads, activate_image, &run);
    free(run.memory);
    return run.failed ? -1 : 0;
}

/* Backward */

struct output_gradient {
    vec of_z, y, of_slope, of_shift;
};

/* What is the same for all pixels of a channel of the result. */
struct output_channel {
    int64_t c;
    struct norm norm;
    real slope;
    const real *grad; /* of the first image */
    int64_t grad_image; /* from one image to the next */
};

INLINE struct output_channel output_channel(const struct pointwise_run *run, int64_t c)
{
    const struct pointwise *p = run->p;
    const real *grad = p->grad;
    int64_t in_part = c, grad_image = p->grad_image;
    for (int64_t i = 0; i < p->parts; in_part -= p->part_channels[i], i++) {
        grad = p->part_grad[i];
        grad_image = p->part_channels[i] * run->pixels;
        if (in_part < p->part_channels[i])
            break;
    }
    return (struct output_channel){
        c, p->normalized ? no_norm : run->norm2[c], p->slope ? p->slope[c] : 1, grad + in_part * run->pixels,
        grad_image};
}

/* At pixel i of a channel's plane of an image, of which `left` pixels are left: lanes past them are 0. */
INLINE struct output_gradient output_gradient(
    const struct pointwise_run *run, struct output_channel channel, int64_t image, int64_t i, int64_t left)
{
    const struct pointwise *p = run->p;
    const int64_t at = (image * p->channels_out + channel.c) * run->pixels + i;
    struct output_gradient g = {splat(0), splat(0), splat(0), splat(0)};
    vec grad = load_n(channel.grad + image * channel.grad_image + i, left);
    g.y = load_n(p->y + at, left);
    if (p->factor)
        grad = grad * splat(p->factor[image]);
    g.of_z = g.of_shift = grad;
    if (p->slope) {
        vec z = normalised(g.y, channel.norm);
        if (p->residual)
            z = z + load_n(p->residual + at, left);
        z = keep_n(z, left);
        g.of_slope = if_less(splat(0), z, splat(0), z * grad);
        g.of_z = if_less(splat(0), z, grad, grad * splat(channel.slope));
    }
    return g;
}

enum { GRAD_SUMS = 4 };

static void output_sums(void *argument, int64_t image)
{
    const struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    double *sums = run->partial + image * p->channels_out * GRAD_SUMS;
    for (int64_t c = 0; c < p->channels_out; c++, sums += GRAD_SUMS) {
        vec total[GRAD_SUMS] = {splat(0), splat(0), splat(0), splat(0)};
        const vec mean = splat(p->normalized ? 0 : run->norm2[c].mean);
        const struct output_channel channel = output_channel(run, c);
        for (int64_t i = 0; i < run->pixels; i += LANES) {
            const int64_t left = run->pixels - i;
            const struct output_gradient g = output_gradient(run, channel, image, i, left);
            total[0] = total[0] + g.of_z;
            total[1] = fma(g.of_z, g.y - mean, total[1]);
            total[2] = total[2] + g.of_slope;
            total[3] = total[3] + g.of_shift;
            if (p->grad_residual) {
                store_n(p->grad_residual + (image * p->channels_out + c) * run->pixels + i, g.of_z, left);
            }
        }
        for (int i = 0; i < GRAD_SUMS; i++)
            sums[i] = sum(total[i]);
    }
    if (p->grad_x && p->halves == 2) /* whose pixels are not all read */
        memset(p->grad_x + image * p->channels_in * run->pixels_in, 0, sizeof(real) * p->channels_in * run->pixels_in);
}

static void join_output_sums(struct pointwise_run *run)
{
    const struct pointwise *p = run->p;
    const double count = (double)(p->n * run->pixels);
    for (int64_t c = 0; c < p->channels_out; c++) {
        double total[GRAD_SUMS] = {0};
        for (int64_t image = 0; image < p->n; image++)
            for (int i = 0; i < GRAD_SUMS; i++)
                total[i] += run->partial[(image * p->channels_out + c) * GRAD_SUMS + i];
        const double inverse = run->norm2[c].inverse_std, weight = p->weight2 ? p->weight2[c] : 1;
        const double scale = inverse * weight, mean = p->normalized ? 0 : run->norm2[c].mean;
        /* of y as it is given: normalised, or not */
        const double of_y = p->normalized ? total[1] : total[1] * inverse * inverse;
        run->by_grad[c] = (real)scale;
        run->by_y[c] = p->training ? (real)(-scale * of_y / count) : 0;
        run->offset_y[c] = p->training ? (real)(-scale * (total[0] - of_y * mean) / count) : 0;
        if (p->grad_weight2)
            p->grad_weight2[c] = (real)(total[1] * (p->normalized ? 1 : inverse));
        if (p->grad_bias2)
            p->grad_bias2[c] = (real)total[0];
        if (p->grad_slope)
            p->grad_slope[c] = (real)total[2];
        if (p->grad_shift)
            p->grad_shift[c] = (real)total[3];
    }
}

/* Sums of a channel for BN1's gradient. */
struct product_sums {
    vec total, along;
};

/* From the product's gradient that of x, or of a = BN1(x), which is added to the sums. */
INLINE vec product_gradient(
    vec grad, vec x, int64_t left, struct norm norm, const int normalises, const int signs,
    struct product_sums *sums)
{
    if (signs)
        grad = grad * sign_slope(normalises ? normalised(x, norm) : x);
    grad = keep_n(grad, left);
    if (normalises) {
        sums->total = sums->total + grad;
        sums->along = fma(grad, keep_n(x - splat(norm.mean), left), sums->along);
    }
    return grad;
}

INLINE void write_gradients_body(
    const struct pointwise_run *run, int64_t half, const struct tile *tile, int64_t tiles, const real *from,
    double *of_input, const int normalises, const int signs)
{
    const struct pointwise *p = run->p;
    const int64_t channels = p->channels_in, pixels_in = run->pixels_in, stride = channels * TILE;
    const int32_t *pixel = run->pixel[half];
    for (int64_t c = 0; c < channels; c++, from += TILE) {
        const struct norm norm = normalises ? run->norm1[c] : no_norm;
        struct product_sums sums = {splat(0), splat(0)};
        for (int64_t t = 0; t < tiles; t++) {
            const struct tile at = tile[t];
            const real *grads = from + t * stride, *x = p->x + (at.image * channels + c) * pixels_in;
            real *grad_x = p->grad_x + (at.image * channels + c) * pixels_in;
            if (!pixel && at.count == TILE) {
                UNROLL for (int i = 0; i < TILE; i += LANES)
                    store(grad_x + at.first + i,
                          product_gradient(
                              load(grads + i), load(x + at.first + i), LANES, norm, normalises, signs, &sums));
                continue;
            }
            for (int64_t i = 0; i < at.count; i += LANES) {
                const int64_t left = at.count - i;
                if (!pixel) {
                    const vec of_x = load_n(x + at.first + i, left);
                    store_n(
                        grad_x + at.first + i,
                        product_gradient(load(grads + i), of_x, left, norm, normalises, signs, &sums), left);
                    continue;
                }
                const int32_t *at_x = pixel + at.first + i;
                if (run->by_pairs) {
                    const vec of_x = load_half(x, at_x[0], half);
                    store_half(
                        grad_x, at_x[0], half,
                        product_gradient(load(grads + i), of_x, LANES, norm, normalises, signs, &sums));
                    continue;
                }
                real line[LANES], of_grads[LANES]; /* a gradient of 0 where there is no pixel */
                for (int64_t j = 0; j < LANES; j++) {
                    const int exists = j < left && at_x[j] >= 0;
                    line[j] = exists ? x[at_x[j]] : norm.mean;
                    of_grads[j] = exists ? grads[i + j] : 0;
                }
                store(line,
                      product_gradient(load(of_grads), load(line), LANES, norm, normalises, signs, &sums));
                for (int64_t j = 0; j < least(left, LANES); j++)
                    if (at_x[j] >= 0)
                        grad_x[at_x[j]] = line[j];
            }
        }
        if (normalises) {
            of_input[2 * c] += sum(sums.total);
            of_input[2 * c + 1] += sum(sums.along);
        }
    }
}

/* From the product's gradients of `tiles` tiles that of x, or of a = BN1(x); in the latter case of_input[2c] +=
   da and of_input[2c + 1] += da * (x - mean1). */
static void write_gradients(
    const struct pointwise_run *run, int64_t half, const struct tile *tile, int64_t tiles, const real *from,
    double *of_input)
{
    if (run->p->weight1 && run->p->signs)
        write_gradients_body(run, half, tile, tiles, from, of_input, 1, 1);
    else if (run->p->weight1)
        write_gradients_body(run, half, tile, tiles, from, of_input, 1, 0);
    else if (run->p->signs)
        write_gradients_body(run, half, tile, tiles, from, of_input, 0, 1);
    else
        write_gradients_body(run, half, tile, tiles, from, of_input, 0, 0);
}

/* The gradient of y of `tiles` tiles; 0 where there is no pixel. */
static void fill_gradients(
    const struct pointwise_run *run, int64_t half, const struct tile *tile, int64_t tiles, real *to,
    int64_t stride)
{
    for (int64_t f = 0; f < run->filters; f++, to += TILE) {
        const int64_t c = half * run->filters + f;
        const vec by_grad = splat(run->by_grad[c]), by_y = splat(run->by_y[c]), offset = splat(run->offset_y[c]);
        const struct output_channel channel = output_channel(run, c);
        for (int64_t t = 0; t < tiles; t++) {
            const struct tile at = tile[t];
            for (int64_t i = 0; i < TILE; i += LANES) {
                const int64_t left = at.count - i;
                vec grad = splat(0);
                if (left > 0) {
                    const struct output_gradient g = output_gradient(run, channel, at.image, at.first + i, left);
                    grad = keep_n(fma(g.of_z, by_grad, fma(g.y, by_y, offset)), left);
                }
                store(to + t * stride + i, grad);
            }
        }
    }
}

/* Where the sums of a chunk's weight gradient, a vector a weight, fit the cache, they are taken along the
   pixels; else a few pixels at a time along the channels, from inputs that are transposed for it. */
INLINE int along_pixels(const struct pointwise_run *run)
{
    return run->filters * run->p->channels_in * LANES * (int64_t)sizeof(real) <= CACHED / 2;
}

/* Inputs, the first cin channels of tiles of `rows` channels, as (pixels, wide), with zeros after the cin. */
static void transpose_inputs(
    const real *panel, int64_t rows, int64_t cin, int64_t wide, int64_t tiles, real *restrict to)
{
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t c0 = 0; c0 < wide; c0 += LANES)
            for (int64_t i = 0; i < TILE; i++) {
                const real *from = panel + (t * rows + c0) * TILE + i;
                real *line = to + (t * TILE + i) * wide + c0;
                if (c0 + LANES <= cin)
                    UNROLL for (int c = 0; c < LANES; c++) line[c] = from[c * TILE];
                else
                    for (int64_t c = 0; c < LANES; c++)
                        line[c] = c0 + c < cin ? from[c * TILE] : 0;
            }
}

/* The gradients of `block` filters, from channel `first` of tiles of `rows` channels on, as (pixels, block). */
static void pack_gradients(
    const real *panel, int64_t rows, int64_t first, int64_t block, int64_t tiles, real *restrict packed)
{
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t b = 0; b < block; b++) {
            const real *from = panel + (t * rows + first + b) * TILE;
            for (int64_t i = 0; i < TILE; i++)
                packed[(t * TILE + i) * block + b] = from[i];
        }
}

/* sums (block, wide) = gradients, packed, times transposed inputs */
static void multiply_transposed(
    const real *inputs, const int32_t *at_pixel, int64_t pixels, const real *packed, int64_t block, int64_t wide,
    real *sums)
{
    int32_t start[TILE_VECTORS];
    for (int64_t v = 0; v < wide / LANES; v += TILE_VECTORS) {
        const int64_t vectors = least(TILE_VECTORS, wide / LANES - v);
        for (int64_t i = 0; i < vectors; i++)
            start[i] = (int32_t)((v + i) * LANES);
        convolve(inputs, start, vectors, at_pixel, pixels, packed, block, sums + v * LANES, wide);
    }
}

/* to (filters, cin) += the gradients (filters, pixels) times the transposed inputs (pixels, cin) of tiles of
   `rows` channels: cin inputs, then the filters' gradients. `memory` takes (cin + MOST_FILTERS) * pixels +
   MOST_FILTERS * cin numbers, cin rounded up to LANES. */
static void add_transposed(
    const real *panel, int64_t rows, int64_t cin, int64_t filters, int64_t tiles, real *memory, real *to)
{
    const int64_t wide = rounded_up(cin, LANES), pixels = tiles * TILE;
    real *transposed = memory, *packed = transposed + wide * pixels, *sums = packed + MOST_FILTERS * pixels;
    int32_t at_pixel[MOST_TILES * TILE];
    for (int64_t i = 0; i < pixels; i++)
        at_pixel[i] = (int32_t)(i * wide);
    transpose_inputs(panel, rows, cin, wide, tiles, transposed);
    for (int64_t f = 0, block; f < filters; f += block) {
        block = filter_block(filters - f);
        pack_gradients(panel, rows, cin + f, block, tiles, packed);
        multiply_transposed(transposed, at_pixel, pixels, packed, block, wide, sums);
        for (int64_t b = 0; b < block; b++)
            for (int64_t c = 0; c < cin; c++)
                to[(f + b) * cin + c] += sums[b * wide + c];
    }
}

/* Where the weights are many and the pixels few, sums of weights for each chunk would take more memory than
   inputs and gradients of all pixels. Chunks keep these then, and after them the filters are shared out,
   MOST_FILTERS a task, each summed over all pixels. */
static void keep_for_weights(
    const struct pointwise_run *run, int64_t half, int64_t first, int64_t tiles, const real *panel, int64_t rows)
{
    const int64_t cin = run->p->channels_in, filters = run->filters, pixels = run->p->n * run->tiles * TILE;
    transpose_inputs(
        panel, rows, cin, run->wide, tiles, run->inputs + (half * pixels + first * TILE) * run->wide);
    for (int64_t f = 0, block; f < filters; f += block) {
        block = filter_block(least(MOST_FILTERS - f % MOST_FILTERS, filters - f));
        pack_gradients(
            panel, rows, cin + f, block, tiles,
            run->grads + (half * filters + f) * pixels + first * TILE * block);
    }
}

static void whole_weight_gradient(void *argument, int64_t task)
{
    struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    const int64_t tasks = (run->filters + MOST_FILTERS - 1) / MOST_FILTERS, half = task / tasks;
    const int64_t cin = p->channels_in, pixels = p->n * run->tiles * TILE;
    real *sums = scratch(sizeof(real) * MOST_FILTERS * run->wide);
    if (!sums) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    const int64_t first = task % tasks * MOST_FILTERS, end = least(first + MOST_FILTERS, run->filters);
    for (int64_t f = first, block; f < end; f += block) {
        block = filter_block(end - f);
        multiply_transposed(
            run->inputs + half * pixels * run->wide, run->at_pixel, pixels,
            run->grads + (half * run->filters + f) * pixels, block, run->wide, sums);
        for (int64_t b = 0; b < block; b++)
            memcpy(p->grad_weight[half] + (f + b) * cin, sums + b * run->wide, sizeof(real) * cin);
    }
}

static void backward_chunk(void *argument, int64_t chunk)
{
    struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    const int64_t cin = p->channels_in, filters = run->filters, rows = cin + filters, weights = cin * filters;
    const int64_t at_once = tiles_at_once(2 * cin + filters), wide = rounded_up(cin, LANES);
    const int along = along_pixels(run);
    const int64_t for_weights =
        along ? p->halves * weights * LANES : (wide + MOST_FILTERS) * at_once * TILE + MOST_FILTERS * wide;
    /* tiles of inputs and, behind them, of gradients of y; of gradients of the inputs */
    real *panel = scratch(sizeof(real) * (at_once * (rows + cin) * TILE + for_weights));
    if (!panel) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    real *grads = panel + at_once * rows * TILE, *memory = grads + at_once * cin * TILE;
    real *grad_weight = run->partial_weight + chunk * p->halves * weights;
    double *input_sums = run->partial + chunk * cin * 2;
    int32_t start[MOST_TILES * TILE_VECTORS];
    for (int64_t i = 0; i < at_once * TILE_VECTORS; i++)
        start[i] = (int32_t)(i / TILE_VECTORS * rows * TILE + i % TILE_VECTORS * LANES);
    memset(input_sums, 0, sizeof(double) * cin * 2);
    if (!run->whole)
        memset(grad_weight, 0, sizeof(real) * p->halves * weights);
    if (along && !run->whole)
        memset(memory, 0, sizeof(real) * for_weights);
    const int64_t all = p->n * run->tiles, end = (chunk + 1) * all / run->chunks;
    for (int64_t first = chunk * all / run->chunks; first < end; first += at_once)
        for (int64_t h = 0; h < p->halves; h++) {
            const int64_t tiles = least(at_once, end - first);
            struct tile tile[MOST_TILES];
            find_tiles(run, first, tiles, tile);
            fill_gradients(run, h, tile, tiles, panel + cin * TILE, rows * TILE);
            if (p->grad_x) {
                for (int64_t t = 0; t < tiles; t++) {
                    const real *of_y = panel + (t * rows + cin) * TILE;
                    real *to = grads + t * cin * TILE;
                    if (run->chosen[h])
                        multiply_joined(of_y, run->scale[h], filters, run->chosen[h], NULL, cin, to, TILE);
                    else
                        convolve(
                            of_y, tile_start, TILE_VECTORS, run->offset, filters, run->packed[h], cin, to,
                            TILE);
                }
                write_gradients(run, h, tile, tiles, grads, input_sums);
            }
            if (!p->grad_weight[h])
                continue;
            fill_tiles(run, h, tile, tiles, panel, rows * TILE);
            if (run->whole)
                keep_for_weights(run, h, first, tiles, panel, rows);
            else if (along)
                correlate(
                    panel + cin * TILE, TILE, filters, panel, start, tiles * TILE_VECTORS, run->offset, cin,
                    memory + h * weights * LANES);
            else
                add_transposed(panel, rows, cin, filters, tiles, memory, grad_weight + h * weights);
        }
    for (int64_t i = 0; i < p->halves * weights && along && !run->whole; i++)
        grad_weight[i] = sum(load(memory + i * LANES));
}

static void finish_input(void *argument, int64_t image)
{
    const struct pointwise_run *run = argument;
    const struct pointwise *p = run->p;
    for (int64_t c = 0; c < p->channels_in; c++) {
        const int64_t plane = (image * p->channels_in + c) * run->pixels_in;
        const vec by_grad = splat(run->by_grad[c]), by_x = splat(run->by_y[c]), offset = splat(run->offset_y[c]);
        for (int64_t i = 0; i < run->pixels_in; i += LANES) {
            const int64_t left = run->pixels_in - i;
            const vec x = load_n(p->x + plane + i, left);
            real *to = p->grad_x + plane + i;
            vec grad = load_n(to, left) * by_grad + (x * by_x + offset);
            if (p->adds_input)
                grad = grad + load_n(p->grad_residual + plane + i, left);
            store_n(to, grad, left);
        }
    }
}

EXPORT int64_t pointwise_backward(const struct pointwise *p)
{
    struct pointwise_run run;
    if (begin_pointwise(&run, p, 1))
        return -1;
    if (p->weight1)
        set_norms(run.norm1, p->statistics1, p->channels_in, p->weight1, p->bias1);
    set_norms(run.norm2, p->statistics2, p->channels_out, p->weight2, p->bias2);
    parallel_for(p->n, p->threads, output_sums, &run);
    join_output_sums(&run);
    parallel_for(run.chunks, p->threads, backward_chunk, &run);
    const int64_t weights = run.filters * p->channels_in;
    if (run.whole && p->grad_weight[0])
        parallel_for(
            p->halves * ((run.filters + MOST_FILTERS - 1) / MOST_FILTERS), p->threads, whole_weight_gradient, &run);
    for (int64_t h = 0; h < p->halves; h++)
        if (p->grad_weight[h] && !run.whole)
            for (int64_t i = 0; i < weights; i++) {
                real total = 0;
                for (int64_t chunk = 0; chunk < run.chunks; chunk++)
                    total += run.partial_weight[(chunk * p->halves + h) * weights + i];
                p->grad_weight[h][i] = total;
            }
    if (p->weight1 && p->grad_x) {
        const double count = (double)(p->n * run.pixels_in);
        for (int64_t c = 0; c < p->channels_in; c++) {
            double total = 0, along = 0;
            for (int64_t chunk = 0; chunk < run.chunks; chunk++) {
                total += run.partial[(chunk * p->channels_in + c) * 2];
                along += run.partial[(chunk * p->channels_in + c) * 2 + 1];
            }
            const double inverse = run.norm1[c].inverse_std, scale = inverse * p->weight1[c];
            const double of_x = along * inverse * inverse;
            if (p->grad_weight1)
                p->grad_weight1[c] = (real)(along * inverse);
            if (p->grad_bias1)
                p->grad_bias1[c] = (real)total;
            run.by_grad[c] = (real)scale;
            run.by_y[c] = p->training ? (real)(-scale * of_x / count) : 0;
            run.offset_y[c] = p->training ? (real)(-scale * (total - of_x * run.norm1[c].mean) / count) : 0;
        }
        parallel_for(p->n, p->threads, finish_input, &run);
    }
    free(run.memory);
    return run.failed ? -1 : 0;
}

/* A unit whose convolution is 1x1 over all channels. */
static int is_pointwise(const struct unit *u)
{
    const struct shape *s = &u->shape;
    return u->weight1 && u->slope && s->groups == 1 && s->kernel[0] == 1 && s->kernel[1] == 1 && s->stride[0] == 1 && s->stride[1] == 1 &&
           s->padding[0] == 0 && s->padding[1] == 0;
}

static int run_pointwise(struct unit *u, int backward)
{
    const struct shape *s = &u->shape;
    struct pointwise p = {
        .n = s->n, .channels_in = s->channels_in, .channels_out = s->channels_out, .height = s->height_in,
        .width = s->width_in, .height_out = s->height_out, .width_out = s->width_out, .halves = 1,
        .signs = u->signs, .training = u->training, .threads = u->threads, .eps = u->eps, .x = u->x,
        .residual = u->residual_kind == INPUT ? u->x : u->residual_kind == TENSOR ? u->residual : NULL,
        .weight = {u->weight}, .weight1 = u->weight1, .bias1 = u->bias1, .weight2 = u->weight2,
        .bias2 = u->bias2, .slope = u->slope, .shift = u->shift, .factor = u->factor, .mean1 = u->mean1,
        .var1 = u->var1, .mean2 = u->mean2, .var2 = u->var2, .statistics1 = u->statistics1,
        .statistics2 = u->statistics2, .y = u->y, .out = u->out, .grad = u->grad, .grad_image = u->grad_image, .grad_x = u->grad_x,
        .grad_residual = u->grad_residual, .grad_weight = {u->grad_weight}, .grad_weight1 = u->grad_weight1,
        .grad_bias1 = u->grad_bias1, .grad_weight2 = u->grad_weight2, .grad_bias2 = u->grad_bias2,
        .grad_slope = u->grad_slope, .grad_shift = u->grad_shift, .adds_input = u->residual_kind == INPUT,
    };
    if (!backward)
        return (int)pointwise_forward(&p);
    real *of_residual = NULL;
    if (p.adds_input) {
        of_residual = malloc(sizeof(real) * s->n * s->channels_out * s->height_out * s->width_out);
        if (!of_residual)
            return -1;
        p.grad_residual = of_residual;
    }
    const int result = (int)pointwise_backward(&p);
    free(of_residual);
    return result;
}

/* Both return 0, or -1 where there is no memory. */
EXPORT int unit_forward(struct unit *u)
{
    return is_pointwise(u) ? run_pointwise(u, 0) : run_groups(u, forward_group);
}

EXPORT int unit_backward(struct unit *u)
{
    return is_pointwise(u) ? run_pointwise(u, 1) : run_groups(u, backward_group);
}
