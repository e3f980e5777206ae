/* 3x3 pools with padding 1, forward and backward, one channel of one image at a time.

   A maximum keeps nothing but its input: the backward pass finds the largest pixel of each window again, and
   its gradient goes to the first of equal ones, row by row. The border is -infinity, which no pixel is below.
   An average does not count the border.

   At stride 1 the planes are padded, so that every tap of a window is a vector at a constant offset. */

struct pool_call {
    int64_t planes, height, width, height_out, width_out, stride, average, threads;
    const real *x;      /* (planes, height, width); of a maximum only, in the backward pass */
    const real *grad;   /* (planes, height_out, width_out) */
    real *out, *grad_x; /* forward, backward */
    int64_t failed;     /* for want of memory */
};

/* x where a == b or either is NaN, else y. */
INLINE vec if_equal(vec a, vec b, vec x, vec y) { return if_less(a, b, y, if_less(b, a, y, x)); }

/* The larger one; NaN where either is. */
INLINE vec larger(vec a, vec b) { return if_nan(b, b, if_less(a, b, b, a)); }

struct padded {
    int64_t pitch, size; /* numbers from line to line; of a whole plane */
};

static struct padded padded_plane(const struct pool_call *p)
{
    const int64_t pitch = rounded_up(p->width, LANES) + 2;
    return (struct padded){pitch, (p->height + 2) * pitch + LANES};
}

/* x with a border of `border`. */
static void pad(const real *x, int64_t height, int64_t width, real border, struct padded to, real *plane)
{
    for (int64_t i = 0; i < to.size; i += LANES)
        store(plane + i, splat(border));
    for (int64_t i = 0; i < height; i++)
        memcpy(plane + (i + 1) * to.pitch + 1, x + i * width, width * sizeof(real));
}

INLINE vec largest_of_window(const real *corner, int64_t pitch)
{
    vec found = load(corner);
    UNROLL for (int t = 1; t < 9; t++) found = larger(found, load(corner + t / 3 * pitch + t % 3));
    return found;
}

INLINE vec sum_of_window(const real *corner, int64_t pitch)
{
    vec total = load(corner);
    UNROLL for (int t = 1; t < 9; t++) total = total + load(corner + t / 3 * pitch + t % 3);
    return total;
}

/* 1 / the number of pixels of a window that lie in the image, along one side. */
INLINE int64_t inside(int64_t at, int64_t stride, int64_t size)
{
    const int64_t first = most(at * stride - 1, 0), last = least(at * stride + 1, size - 1);
    return last - first + 1;
}

static void pool_plane(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    real *plane = scratch((to.size + LANES + p->width_out) * sizeof(real));
    if (!plane) {
        p->failed = 1;
        return;
    }
    const real *x = p->x + task * p->height * p->width;
    real *out = p->out + task * p->height_out * p->width_out;
    pad(x, p->height, p->width, p->average ? 0 : (real)-INFINITY, to, plane);
    for (int64_t i = 0; i < p->height_out; i++, out += p->width_out) {
        const real *corner = plane + i * p->stride * to.pitch;
        if (p->stride == 1)
            for (int64_t j = 0; j < p->width; j += LANES) {
                const real *at = corner + j;
                store_n(out + j, p->average ? sum_of_window(at, to.pitch) : largest_of_window(at, to.pitch),
                        p->width - j);
            }
        else
            for (int64_t j = 0; j < p->width_out; j++) {
                const real *at = corner + j * p->stride;
                real found = at[0];
                for (int t = 1; t < 9; t++) {
                    const real next = at[t / 3 * to.pitch + t % 3];
                    found = p->average ? found + next : next > found || next != next ? next : found;
                }
                out[j] = found;
            }
        if (p->average)
            for (int64_t j = 0; j < p->width_out; j++)
                out[j] /= (real)(inside(i, p->stride, p->height) * inside(j, p->stride, p->width));
    }
}

static void pool_plane_backward(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    real *plane = scratch((2 * to.size + 2 * LANES + rounded_up(p->width_out, LANES)) * sizeof(real));
    if (!plane) {
        p->failed = 1;
        return;
    }
    real *grad_x = plane + rounded_up(to.size, LANES), *line = grad_x + rounded_up(to.size, LANES);
    const real *grad = p->grad + task * p->height_out * p->width_out;
    for (int64_t i = 0; i < to.size; i += LANES)
        store(grad_x + i, splat(0));
    if (!p->average)
        pad(p->x + task * p->height * p->width, p->height, p->width, (real)-INFINITY, to, plane);
    for (int64_t i = 0; i < p->height_out; i++, grad += p->width_out) {
        const int64_t corner = i * p->stride * to.pitch;
        const real *given = grad;
        if (p->average) {
            for (int64_t j = 0; j < p->width_out; j++)
                line[j] = grad[j] / (real)(inside(i, p->stride, p->height) * inside(j, p->stride, p->width));
            given = line;
        }
        if (p->stride == 1)
            for (int64_t j = 0; j < p->width; j += LANES) {
                const real *at = plane + corner + j;
                real *to_x = grad_x + corner + j;
                vec left = load_n(given + j, p->width - j);
                const vec found = p->average ? splat(0) : largest_of_window(at, to.pitch);
                UNROLL for (int t = 0; t < 9; t++)
                {
                    const int64_t tap = t / 3 * to.pitch + t % 3;
                    vec taken = left;
                    if (!p->average) {
                        const vec pixel = load(at + tap);
                        taken = if_equal(pixel, found, left, splat(0));
                        left = if_equal(pixel, found, splat(0), left);
                    }
                    store(to_x + tap, load(to_x + tap) + taken);
                }
            }
        else
            for (int64_t j = 0; j < p->width_out; j++) {
                const real *at = plane + corner + j * p->stride;
                real *to_x = grad_x + corner + j * p->stride;
                if (p->average) {
                    for (int t = 0; t < 9; t++)
                        to_x[t / 3 * to.pitch + t % 3] += given[j];
                    continue;
                }
                int64_t first = 0;
                real found = at[0];
                for (int t = 1; t < 9; t++) {
                    const int64_t tap = t / 3 * to.pitch + t % 3;
                    const int better = at[tap] > found || at[tap] != at[tap];
                    first = better ? tap : first;
                    found = better ? at[tap] : found;
                }
                to_x[first] += given[j];
            }
    }
    real *result = p->grad_x + task * p->height * p->width;
    for (int64_t i = 0; i < p->height; i++)
        memcpy(result + i * p->width, grad_x + (i + 1) * to.pitch + 1, p->width * sizeof(real));
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
