/* Prints what the training kernels compute of made-up numbers, for a test that compares two builds. */

#include "native.c"

#include <stdio.h>

static uint32_t state = 1;

static real *numbers(int64_t count)
{
    real *made = malloc((size_t)count * sizeof(real));
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        made[i] = (real)((state >> 8) / 8388608.0 - 1.0);
    }
    return made;
}

static void print(const char *name, const real *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        printf("%s %.12g\n", name, (double)values[i]);
}

static void try_unit(int64_t groups, int64_t kernel, int64_t stride, int64_t dilation, int64_t size, int64_t residual)
{
    enum { N = 3, C = 6 };
    const int64_t out = (size + stride - 1) / stride, per = C / groups, padding = kernel / 2 * dilation;
    const int64_t in_count = N * C * size * size, out_count = N * C * out * out, weights = C * per * kernel * kernel;
    struct unit u = {
        .shape = {N, C, C, groups, size, size, out, out, {kernel, kernel}, {stride, stride}, {padding, padding},
                  {dilation, dilation}},
        .signs = 1, .residual_kind = residual, .training = 1, .threads = 2, .eps = 1e-5,
        .x = numbers(in_count), .weight = numbers(weights), .slope = numbers(C), .weight1 = numbers(C),
        .bias1 = numbers(C), .weight2 = numbers(C), .bias2 = numbers(C), .statistics1 = numbers(3 * C),
        .statistics2 = numbers(3 * C), .y = numbers(out_count), .out = numbers(out_count),
        .grad = numbers(out_count), .grad_image = C * out * out, .grad_x = numbers(in_count), .grad_weight = numbers(weights),
        .grad_slope = numbers(C), .grad_weight1 = numbers(C), .grad_bias1 = numbers(C),
        .grad_weight2 = numbers(C), .grad_bias2 = numbers(C)};
    if (unit_forward(&u) || unit_backward(&u))
        exit(1);
    print("out", u.out, out_count);
    print("x", u.grad_x, in_count);
    print("weight", u.grad_weight, weights);
    print("slope", u.grad_slope, C);
}

/* A stem: without BN1, PReLU and the gradient of its input. */
static void try_stem(int64_t stride, int64_t size)
{
    enum { N = 3, IN = 3, C = 18 };
    const int64_t out = (size + stride - 1) / stride, out_count = N * C * out * out, weights = C * IN * 9;
    struct unit u = {
        .shape = {N, IN, C, 1, size, size, out, out, {3, 3}, {stride, stride}, {1, 1}, {1, 1}},
        .training = 1, .threads = 2, .relu = 1, .eps = 1e-5, .x = numbers(N * IN * size * size),
        .weight = numbers(weights), .weight2 = numbers(C), .bias2 = numbers(C), .statistics2 = numbers(3 * C),
        .y = numbers(out_count), .out = numbers(out_count), .grad = numbers(out_count),
        .grad_image = C * out * out, .grad_weight = numbers(weights), .grad_weight2 = numbers(C),
        .grad_bias2 = numbers(C)};
    if (unit_forward(&u) || unit_backward(&u))
        exit(1);
    print("stem", u.out, out_count);
    print("stem weight", u.grad_weight, weights);
}

static void try_pool(int64_t stride, int64_t average, int64_t size)
{
    const int64_t out = (size + stride - 1) / stride;
    struct pool_call p = {
        .planes = 4, .height = size, .width = size, .height_out = out, .width_out = out, .stride = stride,
        .average = average, .threads = 2, .channels = 2, .grad_image = 2 * out * out, .x = numbers(4 * size * size), .grad = numbers(4 * out * out),
        .out = numbers(4 * out * out), .grad_x = numbers(4 * size * size)};
    if (pool_forward(&p) || pool_backward(&p))
        exit(1);
    print("pool", p.out, 4 * out * out);
    print("pool x", p.grad_x, 4 * size * size);
}

static void try_search(int64_t stride, int64_t size)
{
    enum { N = 3, K = 4, C = 8, S = C / K };
    const int64_t out = (size + stride - 1) / stride, pixels = out * out;
    struct cell c = {
        .n = N, .channels = C, .k = K, .stride = stride, .height = size, .width = size, .height_out = out,
        .width_out = out, .training = 1, .threads = 2, .eps = 1e-5,
        .state = {numbers(N * C * size * size), numbers(N * C * size * size)}, .edges = numbers(14),
        .operations = numbers(98), .out = numbers(N * 4 * C * pixels), .grad = numbers(N * 4 * C * pixels),
        .grad_state = {numbers(N * C * size * size), numbers(N * C * size * size)},
        .grad_edges = calloc(14, sizeof(real)), .grad_operations = calloc(98, sizeof(real))};
    int64_t kept = 0;
    for (int64_t s = 0; s < SOURCES; s++) {
        const int64_t halves = s < 2 && stride == 2, filters = edges_of[s] * S;
        kept += (KINDS + halves) * filters + (2 + halves) * S;
        for (int64_t p = 0; p < KINDS + 2 * halves; p++) {
            const int64_t taps = p < KINDS ? kind_shape[p].size * kind_shape[p].size : 1;
            const int64_t weights = (p < KINDS ? filters : filters / 2) * S * taps;
            c.weight[s][p] = numbers(weights);
            c.grad_weight[s][p] = numbers(weights);
        }
    }
    c.kept = numbers(N * kept * pixels);
    c.statistics = numbers(3 * kept);
    if (cell_forward(&c) || cell_backward(&c))
        exit(1);
    print("cell", c.out, N * 4 * C * pixels);
    print("cell state", c.grad_state[0], N * C * size * size);
    print("cell weight", c.grad_weight[1][2], edges_of[1] * S * S * 9);
    print("cell edges", c.grad_edges, 14);
    print("cell operations", c.grad_operations, 98);
}

int main(void)
{
    try_unit(2, 3, 1, 1, 9, INPUT);
    try_unit(6, 5, 1, 2, 8, INPUT);
    try_unit(3, 3, 2, 1, 7, HALVED_INPUT);
    try_unit(1, 1, 1, 1, 9, NONE);
    for (int64_t stride = 1; stride <= 2; stride++) {
        try_pool(stride, 0, 11);
        try_pool(stride, 1, 8);
        try_stem(stride, 9);
        try_search(stride, 9);
    }
    return 0;
}
