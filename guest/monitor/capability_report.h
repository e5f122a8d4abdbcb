/* The capability MSRs as a record. */
#ifndef MONITOR_CAPABILITY_REPORT_H
#define MONITOR_CAPABILITY_REPORT_H

/* "@caps m480=0x...": those that the processor has. */
void report_capabilities(void);

#endif
