/* Products of signs with the weights of binary filters, each +s or -s of its filter, in bytes.

   JOINED channels (or fewer) are joined: for each pixel there are their sums with all choices of signs, of
   which a filter adds the one that its weights choose. So JOINED products cost one addition of bytes, which
   are 4 times as many in a vector as float numbers. Sums of bytes are added to the result before they can
   leave the range of a byte. All sums but the last, which adds such parts, are exact.

   Planes, as in convolution.h, are of bytes: 1, -1, or 0 around the image. Sums lie [join][choice][plane]. */

enum { BYTES = sizeof(vec), JOINED = 4, MOST_SUMS = 127 / JOINED, MOST_AT_ONCE = 4 /* vectors */ };

/* Unsigned, so that sums may wrap in lanes behind a line, which hold anything and which nobody reads. */
typedef uint8_t bytes __attribute__((vector_size(sizeof(vec))));

INLINE bytes load_bytes(const int8_t *p)
{
    bytes v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_bytes(int8_t *p, bytes v) { memcpy(p, &v, sizeof v); }

/* signs[i] = -1 where a[i] < 0, else 1 */
INLINE void sign_bytes(const real *restrict a, int64_t size, int8_t *restrict signs)
{
    for (int64_t i = 0; i < size; i++)
        signs[i] = a[i] < 0 ? -1 : 1;
}

/* How channels are joined: the same number of them, or one fewer, in each join. */
INLINE int64_t joins_of(int64_t channels) { return (channels + JOINED - 1) / JOINED; }
INLINE int64_t first_joined(int64_t channels, int64_t join) { return join * channels / joins_of(channels); }
INLINE int64_t joined(int64_t channels, int64_t join)
{
    return first_joined(channels, join + 1) - first_joined(channels, join);
}

/* How many planes of sums there are before this join. */
static int64_t first_sum(int64_t channels, int64_t join)
{
    int64_t sums = 0;
    for (int64_t j = 0; j < join; j++)
        sums += (int64_t)1 << joined(channels, j);
    return sums;
}

INLINE void join_planes_body(const int number, const int8_t *planes, int64_t size, int8_t *sums)
{
    for (int64_t i = 0; i < size; i += BYTES) {
        bytes sum[1 << JOINED];
        sum[0] = load_bytes(planes + i);
        sum[1] = -sum[0];
        UNROLL for (int c = 1; c < number; c++)
        {
            const bytes plane = load_bytes(planes + c * size + i);
            UNROLL for (int k = 0; k < 1 << c; k++)
            {
                sum[k + (1 << c)] = sum[k] - plane;
                sum[k] = sum[k] + plane;
            }
        }
        UNROLL for (int k = 0; k < 1 << number; k++) store_bytes(sums + k * size + i, sum[k]);
    }
}

/* All sums of `number` planes of `size` bytes, a multiple of BYTES; choice k has the sign - for the planes
   whose bits are set in it. */
static void join_planes(int64_t number, const int8_t *planes, int64_t size, int8_t *sums)
{
    switch (number) {
    case 1:
        join_planes_body(1, planes, size, sums);
        return;
    case 2:
        join_planes_body(2, planes, size, sums);
        return;
    case 3:
        join_planes_body(3, planes, size, sums);
        return;
    default:
        join_planes_body(4, planes, size, sums);
    }
}

/* The scale of each filter, if the weights (filters, terms) of every one are +scale and -scale; else 0. */
static int find_scales(const real *weight, int64_t filters, int64_t terms, real *scale)
{
    for (int64_t f = 0; f < filters; f++, weight += terms) {
        const real of_filter = scale[f] = weight[0] < 0 ? -weight[0] : weight[0];
        bits others = 0;
        for (int64_t t = 0; t < terms; t++)
            others |= (weight[t] != of_filter) & (weight[t] != -of_filter);
        if (others)
            return 0;
    }
    return 1;
}

/* Which planes of sums each filter adds, [filter][join][tap]: where they begin, and `offset` of the tap. */
static void choose_sums(
    const real *weight, int64_t filters, int64_t channels, int64_t taps, int64_t size, const int32_t *offset,
    int32_t *chosen)
{
    for (int64_t f = 0; f < filters; f++, weight += channels * taps)
        for (int64_t j = 0, sums = 0; j < joins_of(channels); sums += (int64_t)1 << joined(channels, j), j++)
            for (int64_t t = 0; t < taps; t++) {
                int64_t choice = 0;
                for (int64_t c = 0; c < joined(channels, j); c++)
                    choice |= (int64_t)(weight[(first_joined(channels, j) + c) * taps + t] < 0) << c;
                *chosen++ = (int32_t)((sums + choice) * size + offset[t]);
            }
}

INLINE void add_signs_body(
    const int V, const int8_t *const *from, const int32_t *chosen, int64_t terms, real scale, real *restrict out)
{
    for (int64_t first = 0; first < terms; first += MOST_SUMS) {
        bytes total[MOST_AT_ONCE];
        UNROLL for (int v = 0; v < V; v++) total[v] = (bytes){0};
        const int64_t end = least(first + MOST_SUMS, terms);
        for (int64_t t = first; t < end; t++)
            UNROLL for (int v = 0; v < V; v++) total[v] = total[v] + load_bytes(from[v] + chosen[t]);
        int8_t line[MOST_AT_ONCE * BYTES];
        UNROLL for (int v = 0; v < V; v++) store_bytes(line + v * BYTES, total[v]);
        if (first == 0)
            for (int i = 0; i < V * BYTES; i++)
                out[i] = scale * line[i];
        else
            for (int i = 0; i < V * BYTES; i++)
                out[i] += scale * line[i];
    }
}

/* out[v * BYTES + i] = scale * the sum over terms of sums[chosen[term] + start[v] + i], for `vectors` vectors. */
static void add_signs(
    const int8_t *sums, const int32_t *start, int64_t vectors, const int32_t *chosen, int64_t terms, real scale,
    real *out)
{
    for (int64_t v = 0, done; v < vectors; v += done, out += done * BYTES) {
        const int8_t *from[MOST_AT_ONCE];
        done = least(MOST_AT_ONCE, vectors - v);
        for (int64_t i = 0; i < done; i++)
            from[i] = sums + start[v + i];
        if (done == MOST_AT_ONCE)
            add_signs_body(MOST_AT_ONCE, from, chosen, terms, scale, out);
        else
            for (int64_t i = 0; i < done; i++)
                add_signs_body(1, from + i, chosen, terms, scale, out + i * BYTES);
    }
}
