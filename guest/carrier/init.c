/*
 * The carrier's first and only process beside QEMU: it loads KVM, starts QEMU when the harness says so, and
 * tells when it ended. vmxlab.engines.carrier is its other end.
 *
 * ttyS0 is Linux's console, and where QEMU's own messages go. ttyS1 is the serial line of QEMU's machine,
 * ttyS2 its QMP. ttyS3 is ours: commands come, a word a line, and what happened goes back, a line each.
 * What is too long for a serial line lies on the disk: a job, and the image that it boots.
 *
 * QEMU comes and goes, but ttyS1 and ttyS2 stay the same streams. A mark, which only the harness and we know,
 * separates what belongs to one QEMU from what belongs to the next, in both directions.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "carrier/disk.h"
#include "carrier/system.h"
#include "lib/memory.h"

enum {
	/* The disk: vmxlab.engines.carrier.disk. */
	JOB_SECTOR = 0,
	JOB_SECTORS = 16,
	DATA_SECTOR = JOB_SECTORS,
	MARK_BYTES = 32,
	MAX_WORDS = 120,

	CHUNK_SECTORS = 128,
	COMMAND_BYTES = 32,
	DRAIN_QUIET_MS = 1000,
	IO_PRIVILEGE = 3,
	CONSOLE_LEVEL_ACTION = 8, /* syslog(2), SYSLOG_ACTION_CONSOLE_LEVEL */
	CONSOLE_LEVEL_INFO = 7,
	TERMINAL_SET = 0x5402, /* TCSETS */
};

#define IMAGE_FILE "/image.rom"
#define MEMORY_FILE "/memory.bin"
#define QEMU "/usr/bin/qemu-system-x86_64"

struct job {
	char magic[8];
	uint32_t image_bytes;
	uint32_t words;
	char mark[MARK_BYTES];
	/* So many words, each with a zero at its end: what QEMU is started with, or the modules' parameters. */
	char text[JOB_SECTORS * SECTOR_BYTES - 16 - MARK_BYTES];
};

/* struct termios of the kernel (include/uapi/asm-generic/termbits.h). */
struct terminal {
	uint32_t input, output, control, local;
	uint8_t line;
	uint8_t characters[19];
};

static struct job job __attribute__((aligned(16)));
static char chunk[CHUNK_SECTORS * SECTOR_BYTES] __attribute__((aligned(16)));
static int64_t serial, monitor, control;

/* The running QEMU, and a descriptor that can be read when it has ended. 0: none runs. */
static int64_t qemu, qemu_end;

/* --- telling --------------------------------------------------------------------------------------------- */

static void say(const char *what, const char *detail)
{
	char line[160] = "@carrier ";
	size_t used = strlen(line);
	for (const char *parts[] = {what, detail}, **part = parts; part < parts + 2; part++)
		for (const char *c = *part; *c && used < sizeof(line) - 1; c++)
			line[used++] = *c;
	line[used++] = '\n';
	file_write(control, line, used);
}

static void say_number(const char *what, uint64_t number)
{
	char digits[24];
	char *first = digits + sizeof(digits) - 1;
	*first = 0;
	do
		*--first = (char)('0' + number % 10);
	while (number /= 10);
	say(what, first);
}

/* --- the disk -------------------------------------------------------------------------------------------- */

static bool read_job(void)
{
	if (disk_read(JOB_SECTOR, JOB_SECTORS, &job) &&
	    memcmp(job.magic, "VMXLABJB", sizeof(job.magic)) == 0 && job.words <= MAX_WORDS &&
	    job.text[sizeof(job.text) - 1] == 0)
		return true;
	say("error ", "there is no job on the disk");
	return false;
}

/* The words of the job, and a null pointer behind the last. */
static void list_words(char *words[MAX_WORDS + 1])
{
	char *next = job.text;
	for (uint32_t i = 0; i < job.words; i++) {
		words[i] = next;
		next += strlen(next) + (next < job.text + sizeof(job.text) - 1);
	}
	words[job.words] = NULL;
}

static uint32_t sectors_in(uint32_t bytes)
{
	return (bytes + SECTOR_BYTES - 1) / SECTOR_BYTES;
}

static bool copy_image(void)
{
	int64_t file = file_open(IMAGE_FILE, OPEN_WRITE_NEW);
	uint32_t left = job.image_bytes, sector = DATA_SECTOR;
	while (left) {
		uint32_t bytes = left < sizeof(chunk) ? left : sizeof(chunk);
		if (!disk_read(sector, sectors_in(bytes), chunk) || file_write(file, chunk, bytes) != bytes)
			break;
		sector += CHUNK_SECTORS;
		left -= bytes;
	}
	file_close(file);
	if (left)
		say("error ", "the image can't be copied from the disk");
	return left == 0;
}

static void save_memory(void)
{
	int64_t file = file_open(MEMORY_FILE, OPEN_READ);
	uint32_t sector = DATA_SECTOR;
	uint64_t total = 0;
	int64_t bytes;
	while ((bytes = file_read(file, chunk, sizeof(chunk))) > 0) {
		if (!disk_write(sector, sectors_in((uint32_t)bytes), chunk))
			break;
		sector += CHUNK_SECTORS;
		total += (uint64_t)bytes;
	}
	file_close(file);
	if (bytes)
		say("error ", "the memory can't be copied to the disk");
	else
		say_number("saved ", total);
}

/* --- the streams ----------------------------------------------------------------------------------------- */

static int64_t open_line(const char *path)
{
	int64_t line = file_open(path, OPEN_READ_WRITE | OPEN_NO_CONTROLLING_TERMINAL | OPEN_NOT_INHERITED);
	/* 115200 baud, 8 bits, receiver on, no modem lines; nothing is changed on its way, no echo. */
	struct terminal raw = {.control = 0010002 | 0000060 | 0000200 | 0004000};
	raw.characters[6] = 1; /* VMIN: a read waits for one byte */
	file_control(line, TERMINAL_SET, &raw);
	return line;
}

static void put_mark(int64_t line)
{
	file_write(line, job.mark, MARK_BYTES);
}

/* Drops what the harness sent, up to the mark, or until nothing has come for a while. */
static void drain(int64_t line)
{
	char window[MARK_BYTES] = {0};
	struct poll_entry entry = {.descriptor = (int32_t)line, .events = POLL_IN};
	while (memcmp(window, job.mark, MARK_BYTES) != 0) {
		if (wait_for(&entry, 1, DRAIN_QUIET_MS) <= 0)
			return;
		memmove(window, window + 1, MARK_BYTES - 1);
		file_read(line, &window[MARK_BYTES - 1], 1);
	}
}

/* --- QEMU ------------------------------------------------------------------------------------------------ */

static void start_qemu(void)
{
	char *words[MAX_WORDS + 1];
	char *environment[] = {"PATH=/usr/bin", "HOME=/", NULL};
	if (qemu || !read_job() || !copy_image())
		return;
	list_words(words);
	qemu = system_call(SYS_FORK, 0, 0, 0, 0, 0);
	if (qemu == 0) {
		system_call(SYS_EXECVE, QEMU, words, environment, 0, 0);
		system_call(SYS_EXIT, 127, 0, 0, 0, 0);
	}
	qemu_end = system_call(SYS_PIDFD_OPEN, qemu, 0, 0, 0, 0);
	say("started", "");
}

static void qemu_has_ended(void)
{
	int32_t status = 0;
	system_call(SYS_WAIT4, qemu, &status, 0, 0, 0);
	file_close(qemu_end);
	qemu = 0;
	put_mark(serial);
	put_mark(monitor);
	if (status & 0x7f)
		say_number("ended signal=", (uint64_t)(status & 0x7f));
	else
		say_number("ended exit=", (uint64_t)(status >> 8 & 0xff));
}

/* --- commands -------------------------------------------------------------------------------------------- */

static void run_command(const char *command)
{
	if (strcmp(command, "start") == 0) {
		start_qemu();
	} else if (strcmp(command, "end") == 0) {
		if (qemu)
			process_signal(qemu, SIGNAL_KILL);
		else
			say("ended ", "before");
	} else if (strcmp(command, "mark") == 0) {
		put_mark(serial);
		say("marked", "");
	} else if (strcmp(command, "hold") == 0) {
		/* It must not take from the stream what is to be drained. */
		if (qemu)
			process_signal(qemu, SIGNAL_STOP);
		say("held", "");
	} else if (strcmp(command, "drain") == 0) {
		drain(serial);
		if (!qemu)
			drain(monitor);
		say("drained", "");
	} else if (strcmp(command, "go") == 0) {
		if (qemu)
			process_signal(qemu, SIGNAL_CONTINUE);
		say("gone", "");
	} else if (strcmp(command, "save") == 0) {
		save_memory();
	} else {
		say("error there is no command ", command);
	}
}

static void take_commands(void)
{
	static char line[COMMAND_BYTES];
	static size_t length;
	char bytes[COMMAND_BYTES];
	int64_t count = file_read(control, bytes, sizeof(bytes));
	for (int64_t i = 0; i < count; i++) {
		if (bytes[i] == '\n') {
			line[length] = 0;
			length = 0;
			run_command(line);
		} else if (length < sizeof(line) - 1) {
			line[length++] = bytes[i];
		}
	}
}

/* --- start ----------------------------------------------------------------------------------------------- */

static void load_module(const char *path, const char *parameters)
{
	int64_t file = file_open(path, OPEN_READ);
	int64_t result = system_call(SYS_FINIT_MODULE, file, parameters, 0, 0, 0);
	file_close(file);
	if (result < 0)
		say("error can't be loaded: ", path);
}

/* Words of the first job: the parameters of kvm, and of kvm_intel. */
static void load_kvm(void)
{
	char *words[MAX_WORDS + 1];
	if (!read_job() || job.words != 2)
		return;
	list_words(words);
	load_module("/modules/irqbypass.ko", "");
	load_module("/modules/kvm.ko", words[0]);
	load_module("/modules/kvm-intel.ko", words[1]);
	say("ready", "");
}

int main(void)
{
	system_call(SYS_MOUNT, "proc", "/proc", "proc", 0, 0);
	system_call(SYS_MOUNT, "sys", "/sys", "sysfs", 0, 0);
	system_call(SYS_MOUNT, "dev", "/dev", "devtmpfs", 0, 0);
	system_call(SYS_IOPL, IO_PRIVILEGE, 0, 0, 0, 0);
	/* The kernel was quiet while it booted; from here on all that it says is wanted. */
	system_call(SYS_SYSLOG, CONSOLE_LEVEL_ACTION, 0, CONSOLE_LEVEL_INFO, 0, 0);
	open_line("/dev/ttyS0"); /* made raw; the kernel opened it already */
	serial = open_line("/dev/ttyS1");
	monitor = open_line("/dev/ttyS2");
	control = open_line("/dev/ttyS3");
	load_kvm();
	for (;;) {
		struct poll_entry entries[] = {
			{.descriptor = (int32_t)control, .events = POLL_IN},
			{.descriptor = (int32_t)(qemu ? qemu_end : -1), .events = POLL_IN},
		};
		wait_for(entries, 2, -1);
		if (entries[1].happened)
			qemu_has_ended();
		else if (entries[0].happened)
			take_commands();
	}
}

/* The kernel enters with the stack pointer on a multiple of 16, as after a call it never is. */
asm(".globl _start\n_start:\n\txor %ebp, %ebp\n\tcall main\n\tud2\n");
