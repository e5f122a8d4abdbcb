/* The lines that were typed. */
#ifndef CONSOLE_HISTORY_H
#define CONSOLE_HISTORY_H

/* Remembers a line, unless it is empty or the one before. The oldest is forgotten when there are too many. */
void history_add(const char *line);

/* The line that was typed so many lines ago, 1 for the last; NULL where there is none. */
const char *history_line(unsigned int back);

#endif
