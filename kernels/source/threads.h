/* Tasks shared among threads.

   parallel_for(tasks, threads, run, argument) calls run(argument, task) for every task 0 <= task < tasks, on
   the calling thread and on up to threads - 1 others, and returns when all are done. Which thread takes a
   task is chance, so a task must not depend on another one; then the result is the same for any number of
   threads. scratch(size) gives a task `size` bytes of its thread's memory, aligned to 64 bytes, whose content
   is left over from earlier tasks; NULL where there is no memory.

   The threads are started at first use. They spin for some ten microseconds when there is nothing to do, then
   sleep. A thread that has not begun when all tasks are taken is not waited for. A call that finds the threads
   busy with another call works alone. After a fork the child starts threads of its own. */

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

enum { MOST_THREADS = 256, SPINS = 400 };

typedef void task_function(void *argument, int64_t task);

static struct pool {
    pthread_mutex_t owner; /* held by the call that uses the threads */
    pthread_mutex_t lock;  /* of all that follows but `next`, `round` and `busy`, which are read without it */
    pthread_cond_t begin, end;
    int64_t started; /* threads, beside the calling one */
    int64_t round;   /* counts the calls */
    int64_t wanted;  /* threads that may still join this round */
    int64_t busy;    /* threads that have joined and not finished */
    int64_t next, tasks;
    task_function *run;
    void *argument;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .begin = PTHREAD_COND_INITIALIZER,
          .end = PTHREAD_COND_INITIALIZER};

static pthread_once_t prepared = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;

struct scratch_memory {
    size_t size;
    void *memory;
};

static void free_scratch(void *argument)
{
    struct scratch_memory *scratch = argument;
    free(scratch->memory);
    free(scratch);
}

static void after_fork(void)
{
    pool = (struct pool){.owner = PTHREAD_MUTEX_INITIALIZER,
                         .lock = PTHREAD_MUTEX_INITIALIZER,
                         .begin = PTHREAD_COND_INITIALIZER,
                         .end = PTHREAD_COND_INITIALIZER};
}

static void prepare(void)
{
    pthread_atfork(0, 0, after_fork);
    pthread_key_create(&scratch_key, free_scratch);
}

static void *scratch(size_t size)
{
    pthread_once(&prepared, prepare);
    struct scratch_memory *own = pthread_getspecific(scratch_key);
    if (!own) {
        own = calloc(1, sizeof *own);
        if (!own || pthread_setspecific(scratch_key, own)) {
            free(own);
            return NULL;
        }
    }
    if (own->size < size) {
        free(own->memory);
        own->size = 0;
        if (posix_memalign(&own->memory, 64, size)) {
            own->memory = NULL;
            return NULL;
        }
        own->size = size;
    }
    return own->memory;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_tasks(task_function *run, void *argument, int64_t tasks)
{
    for (int64_t task; (task = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED)) < tasks;)
        run(argument, task);
}

static void *thread_main(void *argument)
{
    int64_t seen = (int64_t)(intptr_t)argument;
    for (;;) {
        for (int i = 0; i < SPINS && __atomic_load_n(&pool.round, __ATOMIC_ACQUIRE) == seen; i++)
            relax();
        pthread_mutex_lock(&pool.lock);
        while (pool.round == seen)
            pthread_cond_wait(&pool.begin, &pool.lock);
        seen = pool.round;
        if (pool.wanted > 0) {
            pool.wanted--;
            __atomic_fetch_add(&pool.busy, 1, __ATOMIC_RELAXED);
            task_function *run = pool.run;
            void *of_run = pool.argument;
            const int64_t tasks = pool.tasks;
            pthread_mutex_unlock(&pool.lock);
            take_tasks(run, of_run, tasks);
            pthread_mutex_lock(&pool.lock);
            if (__atomic_sub_fetch(&pool.busy, 1, __ATOMIC_RELEASE) == 0)
                pthread_cond_signal(&pool.end);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* The owner's; the new thread takes no signal, for these are the program's. */
static void start_threads(int64_t wanted)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, thread_main, (void *)(intptr_t)pool.round))
            break;
        pthread_detach(thread);
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void parallel_for(int64_t tasks, int64_t threads, task_function *run, void *argument)
{
    pthread_once(&prepared, prepare);
    threads = least(least(threads, tasks), MOST_THREADS);
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner)) {
        for (int64_t task = 0; task < tasks; task++)
            run(argument, task);
        return;
    }
    if (pool.started < threads - 1)
        start_threads(threads - 1);
    pthread_mutex_lock(&pool.lock);
    pool.run = run;
    pool.argument = argument;
    pool.tasks = tasks;
    pool.wanted = threads - 1;
    __atomic_store_n(&pool.next, 0, __ATOMIC_RELAXED);
    __atomic_fetch_add(&pool.round, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool.begin);
    pthread_mutex_unlock(&pool.lock);
    take_tasks(run, argument, tasks);
    for (int i = 0; i < SPINS && __atomic_load_n(&pool.busy, __ATOMIC_ACQUIRE); i++)
        relax();
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;
    while (pool.busy)
        pthread_cond_wait(&pool.end, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}
