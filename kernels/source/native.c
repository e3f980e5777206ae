/* Training's forward and backward passes on a CPU, compiled at first use by native.py for one instruction set
   and one type of number: see vector.h. */

#include "vector.h"

#include "threads.h"

#include "convolution.h"

#include "signs.h"

#include "unit.h"

#include "pointwise.h"

#include "pool.h"

#include "search.h"

EXPORT int64_t lanes(void) { return LANES; }

/* rounds * INDEPENDENT * LANES multiply-adds, none of which waits for the one before: what a core can do. */
enum { INDEPENDENT = 12 };
EXPORT int64_t multiply_adds(int64_t rounds, real *result)
{
    vec sums[INDEPENDENT], x = load(result);
    UNROLL for (int i = 0; i < INDEPENDENT; i++) sums[i] = x;
    for (int64_t round = 0; round < rounds; round++)
        UNROLL for (int i = 0; i < INDEPENDENT; i++) sums[i] = fma(sums[i], x, x);
    UNROLL for (int i = 1; i < INDEPENDENT; i++) sums[0] = sums[0] + sums[i];
    store(result, sums[0]);
    return rounds * INDEPENDENT * LANES;
}
