/* What the carrier's init asks of Linux: system calls, without a C library. */
#ifndef CARRIER_SYSTEM_H
#define CARRIER_SYSTEM_H

#include <stddef.h>
#include <stdint.h>

/* Numbers: Linux, arch/x86/entry/syscalls/syscall_64.tbl. */
enum {
	SYS_READ = 0,
	SYS_WRITE = 1,
	SYS_OPEN = 2,
	SYS_CLOSE = 3,
	SYS_POLL = 7,
	SYS_IOCTL = 16,
	SYS_FORK = 57,
	SYS_EXECVE = 59,
	SYS_EXIT = 60,
	SYS_WAIT4 = 61,
	SYS_KILL = 62,
	SYS_SYSLOG = 103,
	SYS_MOUNT = 165,
	SYS_IOPL = 172,
	SYS_FINIT_MODULE = 313,
	SYS_PIDFD_OPEN = 434,
};

enum {
	OPEN_READ = 0,
	OPEN_READ_WRITE = 2,
	OPEN_WRITE_NEW = 01 | 0100 | 01000, /* O_WRONLY | O_CREAT | O_TRUNC */
	OPEN_NO_CONTROLLING_TERMINAL = 0400,
	OPEN_NOT_INHERITED = 02000000,
	POLL_IN = 1,
	SIGNAL_KILL = 9,
	SIGNAL_CONTINUE = 18,
	SIGNAL_STOP = 19,
};

struct poll_entry {
	int32_t descriptor;
	int16_t events;
	int16_t happened;
};

/* Returns what the kernel does: minus an error number for a failure. */
static inline int64_t system_call(int64_t number, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e)
{
	register int64_t r10 asm("r10") = d;
	register int64_t r8 asm("r8") = e;
	int64_t result;
	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
		     : "rcx", "r11", "memory");
	return result;
}

#define system_call(number, a, b, c, d, e)                                                                   \
	(system_call)(number, (int64_t)(a), (int64_t)(b), (int64_t)(c), (int64_t)(d), (int64_t)(e))

static inline int64_t file_open(const char *path, int flags)
{
	return system_call(SYS_OPEN, path, flags, 0644, 0, 0);
}

static inline int64_t file_read(int64_t file, void *data, size_t bytes)
{
	return system_call(SYS_READ, file, data, bytes, 0, 0);
}

static inline int64_t file_write(int64_t file, const void *data, size_t bytes)
{
	return system_call(SYS_WRITE, file, data, bytes, 0, 0);
}

static inline void file_close(int64_t file)
{
	system_call(SYS_CLOSE, file, 0, 0, 0, 0);
}

static inline int64_t file_control(int64_t file, uint64_t request, const void *argument)
{
	return system_call(SYS_IOCTL, file, request, argument, 0, 0);
}

/* Waits until one of the files can be read; 0 when the time (in ms, -1: for ever) is over. */
static inline int64_t wait_for(struct poll_entry *entries, unsigned int count, int timeout_ms)
{
	return system_call(SYS_POLL, entries, count, timeout_ms, 0, 0);
}

static inline void process_signal(int64_t process, int number)
{
	system_call(SYS_KILL, process, number, 0, 0, 0);
}

#endif
