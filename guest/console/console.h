/* The interactive prompt. It never returns, never hangs, and answers whatever is typed. */
#ifndef CONSOLE_CONSOLE_H
#define CONSOLE_CONSOLE_H

void console_run(void) __attribute__((noreturn));

#endif
