/* The packed kernel, called through pipes: arm_kernel.py runs it under an emulator. A request on the standard
   input is a head, the units, the bytes of each array that they point to, the arena and the images; the
   answer is the arena and the logits. It ends at the end of its input. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct unit; /* WORDS words, of which those from FIRST_POINTER on are pointers */
enum { WORDS = 28, FIRST_POINTER = 19 };

int best_path(void);
void encode_weights(int path, const uint8_t *bytes, int64_t groups, int64_t filters, int64_t terms,
                    uint32_t *encoded);
void run_units(int path, const struct unit *units, int64_t n, float *arena);
void run_network(int path, const struct unit *units, int64_t n, float *arena, const float *images,
                 int64_t count, int64_t channels, int64_t pixels, float *logits);

enum { BEST_PATH, ENCODE_WEIGHTS, RUN_UNITS, RUN_NETWORK };
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

static void run(const struct head *head)
{
    int64_t *units = received(head->n * WORDS * sizeof *units);
    for (int64_t i = 0; i < head->n; i++)
        for (int64_t j = FIRST_POINTER; j < WORDS; j++) {
            int64_t *pointer = units + i * WORDS + j; /* so far, how many bytes it points to */
            *pointer = *pointer ? (int64_t)received(*pointer) : 0;
        }
    float *arena = received(head->arena);
    float *images = received(head->count * head->channels * head->pixels * sizeof *images);
    float *logits = calloc(head->count * head->classes + 1, sizeof *logits);
    if (head->function == RUN_UNITS)
        run_units((int)head->path, (struct unit *)units, head->n, arena);
    else
        run_network((int)head->path, (struct unit *)units, head->n, arena, images, head->count,
                    head->channels, head->pixels, logits);
    send(arena, head->arena);
    send(logits, head->count * head->classes * sizeof *logits);
    for (int64_t i = 0; i < head->n; i++)
        for (int64_t j = FIRST_POINTER; j < WORDS; j++)
            free((void *)units[i * WORDS + j]);
    free(units);
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
