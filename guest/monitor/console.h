/* The interactive prompt. It never returns, never hangs, and answers whatever is typed. */
#ifndef MONITOR_CONSOLE_H
#define MONITOR_CONSOLE_H

void console_run(void) __attribute__((noreturn));

#endif
