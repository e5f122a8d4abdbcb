#include "monitor/records.h"

#include <stdbool.h>

#include "lib/crc.h"
#include "lib/format.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "vmx_facts.h"

enum {
	LINE_BYTES = 1024,
	LIST_BYTES = 512, /* a list that is longer goes on in another record */
	NUMBER_CHARACTERS = 18,
	END_CHARACTERS = 7, /* "*hhhh\r\n" */
};

const char *const record_register_keys[GENERAL_REGISTERS] = {
	"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
	"r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15",
};

static char line[LINE_BYTES + END_CHARACTERS];
static size_t length;
static size_t sent;       /* how much of the line has left already */
static bool list_is_open; /* the line is a list of successes that may go on */

/* A record longer than the line would be cut; its checksum then fails on purpose, so nobody reads half of it. */
static void append(const char *text, size_t bytes)
{
	if (bytes > LINE_BYTES - length)
		bytes = LINE_BYTES - length;
	memcpy(line + length, text, bytes);
	length += bytes;
}

static void append_text(const char *text)
{
	append(text, strlen(text));
}

static void send(void)
{
	serial_write(line + sent, length - sent);
	sent = length;
}

void record_end_list(void)
{
	if (list_is_open)
		record_end();
}

void record_begin(const char *kind)
{
	record_end_list();
	length = 0;
	sent = 0;
	append_text("@");
	append_text(kind);
}

static void append_key(const char *key)
{
	append_text(" ");
	append_text(key);
	append_text("=");
}

static void append_hex(uint64_t value)
{
	char number[NUMBER_CHARACTERS];
	append(number, format_hex(number, value));
}

void record_number(const char *key, uint64_t value)
{
	append_key(key);
	append_hex(value);
}

void record_nonzero(const char *key, uint64_t value)
{
	if (value)
		record_number(key, value);
}

void record_word(const char *key, const char *word)
{
	append_key(key);
	append_text(word);
}

void record_bytes(const char *key, const uint8_t *bytes, size_t count)
{
	append_key(key);
	for (size_t i = 0; i < count; i++) {
		char digits[2];
		format_digits(digits, bytes[i], 2);
		append(digits, sizeof(digits));
	}
}

void record_field(uint32_t field, uint64_t value)
{
	char key[6] = "f";
	format_digits(key + 1, field, 4);
	record_number(key, value);
}

void record_outcome(vmx_outcome outcome)
{
	uint64_t error = 0;
	switch (vmx_outcome_kind(outcome)) {
	case VMX_SUCCEED:
	case VMX_ENTERED:
		record_word("rc", "ok");
		break;
	case VMX_FAIL_INVALID:
		record_word("rc", "invalid");
		break;
	case VMX_FAIL_VALID:
		vmx_vmread(VMCS_VM_INSTRUCTION_ERROR, &error);
		record_word("rc", "valid");
		record_number("error", error);
		break;
	case VMX_FAULT:
		record_word("rc", "fault");
		record_number("vector", vmx_outcome_vector(outcome));
		record_number("code", vmx_outcome_error_code(outcome));
		break;
	}
}

static void append_success(const char *operation)
{
	if (list_is_open && length < LIST_BYTES) {
		append_text(",");
	} else {
		record_begin("vmx");
		append_key("ok");
		list_is_open = true;
	}
	append_text(operation);
}

void record_success(const char *operation)
{
	append_success(operation);
	send();
}

void record_successes(const char *operation, uint32_t count)
{
	append_success(operation);
	append_text(":");
	append_hex(count);
	send();
}

void record_end(void)
{
	bool whole = length < LINE_BYTES;
	uint16_t crc = crc16(line + 1, length - 1);
	line[length] = '*';
	format_digits(line + length + 1, whole ? crc : (uint16_t)~crc, 4);
	line[length + 5] = '\r';
	line[length + 6] = '\n';
	length += END_CHARACTERS;
	list_is_open = false;
	send();
}

void print(const char *text)
{
	record_end_list();
	for (; *text; text++) {
		if (*text == '\n')
			serial_write("\r", 1);
		serial_write(text, 1);
	}
}
