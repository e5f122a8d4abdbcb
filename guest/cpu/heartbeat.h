/* Under KVM: a timer that lets the host have the processor back now and then. */
#ifndef CPU_HEARTBEAT_H
#define CPU_HEARTBEAT_H

void heartbeat_start(void);

#endif
