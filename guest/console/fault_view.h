/* A fault in the monitor (L1), for people. */
#ifndef CONSOLE_FAULT_VIEW_H
#define CONSOLE_FAULT_VIEW_H

/* Shows the last fault with its registers, makes the processor the monitor's own again, and says what is left. */
void fault_show(void);

#endif
