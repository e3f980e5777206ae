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
