/* Starts a program on the emulated boards mps2-an385, -an386 and -an500 (Cortex-M3, M4, M7); its output and its
   exit status go through semihosting, newlib's rdimon. */

#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

extern uint32_t bss_begin[], bss_end[], stack_top[];
void initialise_monitor_handles(void);
int main(void);

static void reset(void)
{
#if defined(__ARM_FP)
    *(volatile uint32_t *)0xe000ed88 |= 15u << 20; /* CPACR: the floating-point unit is on */
    __asm__ volatile("dsb\n isb");
#endif
    for (uint32_t *word = bss_begin; word < bss_end; word++)
        *word = 0;
    initialise_monitor_handles();
    const int status = main();
    fflush(stdout);
    _exit(status);
}

static void fault(void)
{
    _exit(1);
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {stack_top, reset, fault, fault,
                                                                                fault, fault, fault};
