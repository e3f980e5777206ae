/* The packed kernel, called through pipes by kernel_process.py. A request on the standard input is a head,
   the steps, the bytes of each array that they point to, the arena and the images; the answer is the arena
   and the logits. It ends at the end of its input. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct counter;
struct step; /* WORDS words, of which those from FIRST_POINTER on are pointers: kernel_process.py says how many */

int best_path(void);
void encode_weights(int path, const uint8_t *bytes, int64_t groups, int64_t filters, int64_t terms,
                    uint32_t *encoded);
void run_steps(int path, const struct step *steps, int64_t n, float *arena);
int64_t share_steps(int path, const struct step *steps, int64_t n, float *arena, int64_t own,
                    struct counter *counters);
void run_network(int path, const struct step *steps, int64_t n, float *arena, const float *images,
                 int64_t count, int64_t channels, int64_t pixels, float *logits);

enum { BEST_PATH, ENCODE_WEIGHTS, RUN_UNITS, RUN_NETWORK, SHARE_UNITS };
struct head {
    int64_t function, path, n, arena, /* bytes */ count, channels, pixels, classes;
};

static void *received(int64_t bytes)
{
    void *memory = malloc(bytes + !bytes); /* no more, for the sanitizer to see what is read beyond it */
    if (memory == NULL || fread(memory, 1, bytes, stdin) != (size_t)bytes)
        exit(1);
    return memory;
}

static void send(const void *memory, int64_t bytes)
{
    if (fwrite(memory, 1, bytes, stdout) != (size_t)bytes)
        exit(1);
}

static void encode(const struct head *head)
{
    const int64_t size = head->count * head->channels * head->pixels; /* groups, filters, terms */
    uint8_t *bytes = received(size);
    uint32_t *encoded = malloc(size * sizeof *encoded);
    encode_weights((int)head->path, bytes, head->count, head->channels, head->pixels, encoded);
    send(encoded, size * sizeof *encoded);
    free(bytes);
    free(encoded);
}

enum { THREADS = 3 };
struct share {
    const struct head *head;
    const int64_t *steps;
    float *arena;
    struct counter *counters;
    int64_t own;
};

static void *share_of(void *argument)
{
    const struct share *s = argument;
    share_steps((int)s->head->path, (const struct step *)s->steps, s->head->n, s->arena, s->own, s->counters);
    return NULL;
}

/* The scratch memory of thread i lies i arenas behind that of the first. */
static void share(const struct head *head, const int64_t *steps, float *arena)
{
    struct counter *counters = calloc(head->n, 4 * sizeof(int32_t));
    struct share shares[THREADS];
    pthread_t threads[THREADS];
    for (int64_t i = 0; i < THREADS; i++) {
        shares[i] = (struct share){head, steps, arena, counters, i * head->arena / (int64_t)sizeof *arena};
        pthread_create(threads + i, NULL, share_of, shares + i);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    free(counters);
}

static void run(const struct head *head)
{
    int64_t *steps = received(head->n * WORDS * sizeof *steps);
    for (int64_t i = 0; i < head->n; i++)
        for (int64_t j = FIRST_POINTER; j < WORDS; j++) {
            int64_t *pointer = steps + i * WORDS + j; /* so far, how many bytes it points to */
            *pointer = *pointer ? (int64_t)received(*pointer) : 0;
        }
    float *arena = received(head->arena);
    float *images = received(head->count * head->channels * head->pixels * sizeof *images);
    float *logits = calloc(head->count * head->classes + 1, sizeof *logits);
    if (head->function == SHARE_UNITS) {
        arena = realloc(arena, THREADS * head->arena);
        memset((char *)arena + head->arena, 0, (THREADS - 1) * head->arena);
        share(head, steps, arena);
    } else if (head->function == RUN_UNITS)
        run_steps((int)head->path, (struct step *)steps, head->n, arena);
    else
        run_network((int)head->path, (struct step *)steps, head->n, arena, images, head->count,
                    head->channels, head->pixels, logits);
    send(arena, head->arena);
    send(logits, head->count * head->classes * sizeof *logits);
    for (int64_t i = 0; i < head->n; i++)
        for (int64_t j = FIRST_POINTER; j < WORDS; j++)
            free((void *)steps[i * WORDS + j]);
    free(steps);
    free(arena);
    free(images);
    free(logits);
}

int main(void)
{
    struct head head;
    while (fread(&head, sizeof head, 1, stdin) == 1) {
        if (head.function == BEST_PATH) {
            const int32_t path = best_path();
            send(&path, sizeof path);
        } else if (head.function == ENCODE_WEIGHTS) {
            encode(&head);
        } else {
            run(&head);
        }
        fflush(stdout);
    }
    return 0;
}
