/*
 * Faults in the monitor (L1). A fault at an instruction listed in the fix-up table becomes that
 * instruction's outcome; any other is reported, the running case ends, and the monitor lives on.
 */
#ifndef CPU_TRAPS_H
#define CPU_TRAPS_H

#include <stdbool.h>
#include <stdint.h>

/* In the order in which cpu/trap_entry.S pushes them, last first. */
struct trap_frame {
	uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
	uint64_t rdi, rsi, rbp, rbx, rdx, rcx, rax;
	uint64_t vector, error_code;
	uint64_t rip, cs, rflags, rsp, ss;
};

/* A fault, and the control registers as it found them. */
struct trap_seen {
	struct trap_frame frame;
	uint64_t cr0, cr2, cr3, cr4;
};

/* The last fault that went on at trap_recovery. */
extern struct trap_seen trap_last;

/* Makes the IDT and loads it. */
void traps_init(void);

/* Ends the blocking of NMIs, which a case may leave behind. */
void nmi_unblock(void);

/* While set, NMIs and interrupts (vectors 32 and up) are taken and forgotten, with an EOI; else they are faults. */
extern bool trap_events_wanted;

/* Loads IDTR again, whatever a VM exit put there. */
void traps_reload(void);

/*
 * Where an unexpected fault goes on: like setjmp, returns 0 at first and 1 after each fault.
 * The caller's frame must still be live when the fault happens.
 */
struct recovery {
	uint64_t rbx, rbp, r12, r13, r14, r15, rsp, rip;
};
int recovery_set(struct recovery *recovery) __attribute__((returns_twice));
void recovery_go(const struct recovery *recovery) __attribute__((noreturn));

/* The recovery point in force; NULL before the first: a fault then is a panic. */
extern struct recovery *trap_recovery;

#endif
