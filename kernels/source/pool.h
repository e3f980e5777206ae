/* 3x3 pools with padding 1, at stride 1 or 2, forward and backward, one channel of one image at a time.

   A maximum keeps nothing but its input: the backward pass finds the largest pixel of each window again, and
   its gradient goes to the first of equal ones, row by row; to the last NaN, where there is one. The border is
   -infinity, which no pixel is below. An average does not count the border.

   Planes are padded, and a vector holds the pixel of one tap for LANES windows of a line: at stride 1 it lies
   in memory like that, at stride 2 it is every other number of two vectors. The maximum is taken along the lines
   first, then of three lines. */

struct pool_call {
    int64_t planes, height, width, height_out, width_out, stride, average, threads;
    int64_t channels, grad_image; /* of an image; from one image of grad to the next */
    const real *x;      /* (planes, height, width); of a maximum only, in the backward pass */
    const real *grad;   /* (planes, height_out, width_out), but for grad_image */
    real *out, *grad_x; /* forward, backward */
    int64_t failed;     /* for want of memory */
};

struct padded {
    int64_t pitch, size; /* numbers from line to line; of a whole plane */
    int64_t line;        /* numbers of a line of windows */
};

static struct padded padded_plane(const struct pool_call *p)
{
    const int64_t pitch = rounded_up(p->width, LANES) + 2;
    return (struct padded){
        pitch, rounded_up((p->height + 3) * pitch + 4 * LANES, LANES), rounded_up(p->width_out, LANES)};
}

/* x with a border of `border`. */
static void pad(const real *x, int64_t height, int64_t width, real border, struct padded to, real *plane)
{
    for (int64_t i = 0; i < to.size; i += LANES)
        store(plane + i, splat(border));
    for (int64_t i = 0; i < height; i++)
        memcpy(plane + (i + 1) * to.pitch + 1, x + i * width, width * sizeof(real));
}

/* The pixels of one line of LANES windows, the first of which begins at `corner`. */
struct line_taps {
    vec tap[3];
};

INLINE struct line_taps line_taps(const real *corner, const int stride)
{
    if (stride == 1)
        return (struct line_taps){{load(corner), load(corner + 1), load(corner + 2)}};
    const vec a = load(corner), b = load(corner + LANES);
    const vec c = load(corner + 2), d = load(corner + 2 + LANES);
    return (struct line_taps){{even_lanes(a, b), odd_lanes(a, b), even_lanes(c, d)}};
}

/* The largest number so far, and where it was. */
struct largest {
    vec found, where;
};

INLINE struct largest larger(struct largest so_far, vec next, vec where)
{
    return (struct largest){
        if_nan(next, next, if_less(so_far.found, next, next, so_far.found)),
        if_nan(next, where, if_less(so_far.found, next, where, so_far.where))};
}

/* Of each line of a padded plane the largest pixel of each window's part, and which of the three it is. */
INLINE void largest_of_lines(
    const struct pool_call *p, struct padded to, const real *plane, real *found, real *where, const int stride)
{
    const int64_t lines = (p->height_out - 1) * stride + 3;
    for (int64_t i = 0; i < lines; i++, plane += to.pitch)
        for (int64_t j = 0; j < p->width_out; j += LANES, found += LANES, where += LANES) {
            const struct line_taps taps = line_taps(plane + j * stride, stride);
            struct largest of = {taps.tap[0], splat(0)};
            of = larger(of, taps.tap[1], splat(1));
            of = larger(of, taps.tap[2], splat(2));
            store(found, of.found);
            store(where, of.where);
        }
}

/* Of three lines from `found` on. `where`: 0 to 8, row by row. */
INLINE struct largest largest_of_windows(const real *found, const real *where, int64_t line)
{
    struct largest of = {load(found), load(where)};
    of = larger(of, load(found + line), load(where + line) + splat(3));
    return larger(of, load(found + 2 * line), load(where + 2 * line) + splat(6));
}

/* How many pixels of a window lie in the image, along one side. */
INLINE int64_t inside(int64_t at, int64_t stride, int64_t size)
{
    const int64_t first = most(at * stride - 1, 0), last = least(at * stride + 1, size - 1);
    return last - first + 1;
}

/* to = from / the pixels of each window of line i. */
static void divided_line(const struct pool_call *p, int64_t i, const real *from, real *to)
{
    const int64_t rows = inside(i, p->stride, p->height), last = p->width_out - 1;
    if (p->width > 2) {
        for (int64_t j = 1; j < last; j++)
            to[j] = from[j] / (real)(3 * rows);
        to[0] = from[0] / (real)(2 * rows);
        to[last] = from[last] / (real)(rows * inside(last, p->stride, p->width));
    } else
        for (int64_t j = 0; j <= last; j++)
            to[j] = from[j] / (real)(rows * inside(j, p->stride, p->width));
}

INLINE void pool_lines(
    const struct pool_call *p, struct padded to, real *plane, real *found, real *where, real *out,
    const int stride)
{
    if (!p->average)
        largest_of_lines(p, to, plane, found, where, stride);
    for (int64_t i = 0; i < p->height_out; i++, out += p->width_out) {
        for (int64_t j = 0; j < p->width_out; j += LANES) {
            vec result;
            if (p->average) {
                result = splat(0);
                UNROLL for (int row = 0; row < 3; row++)
                {
                    const struct line_taps taps =
                        line_taps(plane + (i * stride + row) * to.pitch + j * stride, stride);
                    result = ((result + taps.tap[0]) + taps.tap[1]) + taps.tap[2];
                }
            } else {
                const int64_t at = i * stride * to.line + j;
                result = largest_of_windows(found + at, where + at, to.line).found;
            }
            store_n(out + j, result, p->width_out - j);
        }
        if (p->average)
            divided_line(p, i, out, out);
    }
}

/* Scratch memory for a plane, another one, and two numbers for each window's part of each line; or NULL. */
static real *pool_scratch(struct pool_call *p, struct padded to)
{
    real *memory = scratch((2 * to.size + 2 * (p->height + 3) * to.line) * sizeof(real));
    if (!memory)
        __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
    return memory;
}

static void pool_plane(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    real *plane = pool_scratch(p, to);
    if (!plane)
        return;
    real *found = plane + 2 * to.size, *where = found + (p->height + 3) * to.line;
    real *out = p->out + task * p->height_out * p->width_out;
    pad(p->x + task * p->height * p->width, p->height, p->width, p->average ? 0 : (real)-INFINITY, to, plane);
    if (p->stride == 1)
        pool_lines(p, to, plane, found, where, out, 1);
    else
        pool_lines(p, to, plane, found, where, out, 2);
}

/* Where the gradient of each window goes, 0 to 8: of windows of nothing but -infinity to their first pixel in
   the image. */
INLINE vec chosen_of_windows(const real *found, const real *where, int64_t line, int64_t i, int64_t j)
{
    static const real second[LANES] = {1}; /* of the first window of a line: its first pixel is border */
    const vec first = (j ? splat(0) : load(second)) + splat(i ? 0 : 3);
    const struct largest of = largest_of_windows(found, where, line);
    return if_less(of.found, splat(LOWEST), first, of.where);
}

/* grad where chosen is t, else 0 */
INLINE vec if_chosen(vec chosen, int t, vec grad)
{
    return if_less(absolute(chosen - splat((real)t)), splat((real)0.5), grad, splat(0));
}

/* At stride 1 each pixel takes the gradients of the nine windows that hold it, where they chose it: `chosen`
   and `grads` are padded planes of windows. */
static void collect_line(
    const struct pool_call *p, const real *chosen, const real *grads, int64_t pitch, real *grad_x)
{
    for (int64_t j = 0; j < p->width; j += LANES) {
        vec total = splat(0);
        UNROLL for (int t = 8; t >= 0; t--)
        {
            const int64_t window = (2 - t / 3) * pitch + 2 - t % 3 + j;
            const vec grad = load(grads + window);
            total = total + (p->average ? grad : if_chosen(load(chosen + window), t, grad));
        }
        store_n(grad_x + j, total, p->width - j);
    }
}

static void pool_backward_1(
    const struct pool_call *p, struct padded to, real *plane, real *found, real *where, const real *grad,
    real *grads, real *grad_x)
{
    if (!p->average)
        largest_of_lines(p, to, plane, found, where, 1);
    for (int64_t i = 0; i < p->height; i++, grad += p->width) {
        real *line = grads + (i + 1) * to.pitch + 1, *chosen = plane + (i + 1) * to.pitch + 1;
        if (p->average) {
            divided_line(p, i, grad, line);
            continue;
        }
        memcpy(line, grad, p->width * sizeof(real));
        for (int64_t j = 0; j < p->width; j += LANES) /* border that it writes to has a gradient of 0 */
            store(chosen + j, chosen_of_windows(found + i * to.line + j, where + i * to.line + j, to.line, i, j));
    }
    for (int64_t i = 0; i < p->height; i++)
        collect_line(p, plane + i * to.pitch, grads + i * to.pitch, to.pitch, grad_x + i * p->width);
}

/* At stride 2 each window adds to the pixels that it holds, window after window. */
static void pool_backward_2(
    const struct pool_call *p, struct padded to, const real *plane, real *found, real *where, const real *grad,
    real *grads, real *grad_x)
{
    if (!p->average)
        largest_of_lines(p, to, plane, found, where, 2);
    for (int64_t i = 0; i < p->height_out; i++, grad += p->width_out) {
        if (p->average)
            divided_line(p, i, grad, found);
        for (int64_t j = 0; j < p->width_out; j += LANES) {
            const vec g = load_n(p->average ? found + j : grad + j, p->width_out - j);
            const int64_t at = 2 * i * to.line + j;
            const vec chosen =
                p->average ? splat(0) : chosen_of_windows(found + at, where + at, to.line, i, j);
            UNROLL for (int row = 0; row < 3; row++)
            {
                vec part[3];
                UNROLL for (int t = 0; t < 3; t++)
                    part[t] = p->average ? g : if_chosen(chosen, 3 * row + t, g);
                real *corner = grads + (2 * i + row) * to.pitch + 2 * j, *third = corner + 2;
                store(third, load(third) + first_pairs(part[2], splat(0)));
                store(third + LANES, load(third + LANES) + last_pairs(part[2], splat(0)));
                store(corner, load(corner) + first_pairs(part[0], part[1]));
                store(corner + LANES, load(corner + LANES) + last_pairs(part[0], part[1]));
            }
        }
    }
    for (int64_t i = 0; i < p->height; i++)
        memcpy(grad_x + i * p->width, grads + (i + 1) * to.pitch + 1, p->width * sizeof(real));
}

static void pool_plane_backward(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    real *plane = pool_scratch(p, to);
    if (!plane)
        return;
    real *grads = plane + to.size, *found = grads + to.size, *where = found + (p->height + 3) * to.line;
    const real *grad = p->grad + task / p->channels * p->grad_image +
                       task % p->channels * p->height_out * p->width_out;
    for (int64_t i = 0; i < to.size; i += LANES)
        store(grads + i, splat(0));
    if (!p->average)
        pad(p->x + task * p->height * p->width, p->height, p->width, (real)-INFINITY, to, plane);
    real *grad_x = p->grad_x + task * p->height * p->width;
    if (p->stride == 1)
        pool_backward_1(p, to, plane, found, where, grad, grads, grad_x);
    else
        pool_backward_2(p, to, plane, found, where, grad, grads, grad_x);
}

/* Both return 0, or -1 where there is no memory. */
EXPORT int pool_forward(struct pool_call *p)
{
    parallel_for(p->planes, p->threads, pool_plane, p);
    return p->failed ? -1 : 0;
}

EXPORT int pool_backward(struct pool_call *p)
{
    parallel_for(p->planes, p->threads, pool_plane_backward, p);
    return p->failed ? -1 : 0;
}
