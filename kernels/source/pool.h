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

/* How many pixels of a window lie in the image, along one side. */
INLINE int64_t inside(int64_t at, int64_t stride, int64_t size)
{
    const int64_t first = most(at * stride - 1, 0), last = least(at * stride + 1, size - 1);
    return last - first + 1;
}

static void pool_plane(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    real *plane = scratch((to.size + LANES) * sizeof(real));
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

/* The pixels of a window, row by row, that the gradient goes to: 0 to 8. */
INLINE vec first_of_largest(const real *corner, int64_t pitch)
{
    const vec found = largest_of_window(corner, pitch);
    vec first = splat(8);
    UNROLL for (int t = 7; t >= 0; t--)
        first = if_equal(load(corner + t / 3 * pitch + t % 3), found, splat((real)t), first);
    return first;
}

/* At stride 1: each pixel takes the gradients of the nine windows that hold it, where they chose it. */
static void pool_backward_line(
    const struct pool_call *p, const real *which, const real *grads, int64_t pitch, real *grad_x)
{
    for (int64_t j = 0; j < p->width; j += LANES) {
        vec total = splat(0);
        UNROLL for (int t = 0; t < 9; t++)
        {
            const int64_t window = (2 - t / 3) * pitch + 2 - t % 3 + j;
            const vec grad = load(grads + window);
            total = total + (p->average ? grad : if_equal(load(which + window), splat((real)t), grad, splat(0)));
        }
        store_n(grad_x + j, total, p->width - j);
    }
}

static void pool_plane_backward(void *argument, int64_t task)
{
    struct pool_call *p = argument;
    const struct padded to = padded_plane(p);
    const int64_t size = rounded_up(to.size, LANES);
    real *plane = scratch(3 * size * sizeof(real));
    if (!plane) {
        p->failed = 1;
        return;
    }
    real *grads = plane + size, *which = grads + size; /* [window], with a border of 0; at stride 2, [pixel] */
    const real *grad = p->grad + task * p->height_out * p->width_out;
    real *result = p->grad_x + task * p->height * p->width;
    for (int64_t i = 0; i < size; i += LANES)
        store(grads + i, splat(0));
    if (!p->average)
        pad(p->x + task * p->height * p->width, p->height, p->width, (real)-INFINITY, to, plane);
    if (p->stride == 1) {
        for (int64_t i = 0; i < p->height; i++, grad += p->width) {
            real *line = grads + (i + 1) * to.pitch + 1;
            memcpy(line, grad, p->width * sizeof(real));
            if (p->average)
                for (int64_t j = 0; j < p->width; j++)
                    line[j] /= (real)(inside(i, 1, p->height) * inside(j, 1, p->width));
            else
                for (int64_t j = 0; j < p->width; j += LANES)
                    store(which + (i + 1) * to.pitch + 1 + j, first_of_largest(plane + i * to.pitch + j, to.pitch));
        }
        for (int64_t i = 0; i < p->height; i++)
            pool_backward_line(p, which + i * to.pitch, grads + i * to.pitch, to.pitch, result + i * p->width);
        return;
    }
    for (int64_t i = 0; i < p->height_out; i++, grad += p->width_out) {
        const int64_t corner = i * p->stride * to.pitch;
        for (int64_t j = 0; j < p->width_out; j++) {
            const real *at = plane + corner + j * p->stride;
            real *to_x = grads + corner + j * p->stride;
            if (p->average) {
                const real part =
                    grad[j] / (real)(inside(i, p->stride, p->height) * inside(j, p->stride, p->width));
                for (int t = 0; t < 9; t++)
                    to_x[t / 3 * to.pitch + t % 3] += part;
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
            to_x[first] += grad[j];
        }
    }
    for (int64_t i = 0; i < p->height; i++)
        memcpy(result + i * p->width, grads + (i + 1) * to.pitch + 1, p->width * sizeof(real));
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
